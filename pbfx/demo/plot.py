"""A picture of the study: validation accuracy by epoch, with every growth marked."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pbfx.demo.study import Run

# Okabe and Ito's palette, which colour-blind eyes tell apart too; blue stands for dendrites.
_COLOURS = {"plain": "#6e6e6e", "sham": "#e69f00"}
_OTHER_COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#d55e00")
_SHADE = "#0072b2"


def plot_png(runs: Sequence[Run], *, title: str) -> bytes:
    """Return a PNG of 1,350 x 750 pixels. Needs no display and leaves pyplot's state alone."""
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(run.arm for run in runs))
    others = iter(_OTHER_COLOURS)
    handles: list = []
    means: list[np.ndarray] = []
    for name in names:
        members = [run for run in runs if run.arm == name]
        colour = _COLOURS.get(name) or next(others, _SHADE)
        curves = [_curve(run) for run in members]
        for curve in curves:
            axes.plot(_epochs(curve), curve, color=colour, alpha=0.18, linewidth=0.8)
        mean = _mean_curve(curves)
        means.append(mean)
        (line,) = axes.plot(_epochs(mean), mean, color=colour, linewidth=2.2, label=name, zorder=3)
        handles.append(line)
    _limit(axes, means)
    handles += _mark_growths(axes, [run for run in runs if run.arm == names[-1]])
    axes.set_title(title, loc="left")
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy, %")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    buffer = io.BytesIO()
    # No software or date: the same study gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def dendrite_spans(run: Run) -> list[tuple[int, int]]:
    """Return first and last epoch of every dendrite phase of `run`."""
    spans: list[tuple[int, int]] = []
    for row in run.history:
        if row.phase != "dendrite":
            continue
        if spans and spans[-1][1] == row.epoch - 1:
            spans[-1] = (spans[-1][0], row.epoch)
        else:
            spans.append((row.epoch, row.epoch))
    return spans


def growths(run: Run) -> list[tuple[int, int]]:
    """Return, for every growth of `run`, its first epoch and how many dendrites there are then."""
    rows = run.history
    return [
        (row.epoch, row.dendrites)
        for before, row in pairwise(rows)
        if row.dendrites > before.dendrites
    ]


def _curve(run: Run) -> np.ndarray:
    return 100 * np.array([row.validation_accuracy for row in run.history])


def _epochs(curve: np.ndarray) -> np.ndarray:
    return np.arange(1, len(curve) + 1)


def _mean_curve(curves: Sequence[np.ndarray]) -> np.ndarray:
    longest = max(len(curve) for curve in curves)
    padded = np.full((len(curves), longest), np.nan)
    for row, curve in zip(padded, curves, strict=True):
        row[: len(curve)] = curve
    return np.nanmean(padded, axis=0)


def _limit(axes: Axes, means: Sequence[np.ndarray]) -> None:
    # The first epochs climb from chance; what matters happens in the last few points.
    settled = np.concatenate([mean[len(mean) // 10 :] for mean in means])
    low, high = float(settled.min()), float(settled.max())
    margin = max(0.5, 0.25 * (high - low))
    axes.set_ylim(low - margin, min(100.4, high + margin))
    axes.set_xlim(left=0)


def _mark_growths(axes: Axes, runs: Sequence[Run]) -> list:
    # Phases of fixed length are the same for every seed; else the first seed stands for all.
    spans, grown = dendrite_spans(runs[0]), growths(runs[0])
    for first, last in spans:
        axes.axvspan(first - 0.5, last + 0.5, color=_SHADE, alpha=0.09, linewidth=0)
    for epoch, dendrites in grown:
        axes.axvline(epoch - 0.5, color=_SHADE, linewidth=0.9, linestyle=":")
        axes.annotate(
            f"{dendrites}",
            (epoch - 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            verticalalignment="top",
            color=_SHADE,
        )
    handles: list = []
    if spans:
        handles.append(Patch(color=_SHADE, alpha=0.15, label="dendrite phase"))
    if grown:
        handles.append(
            axes.plot(
                [], [], color=_SHADE, linewidth=0.9, linestyle=":", label="growth (dendrites)"
            )[0]
        )
    return handles
