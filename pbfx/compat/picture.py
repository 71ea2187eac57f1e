"""The picture of a run: scores by epoch above, learning rate below, growths and phases marked."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from pbfx import DependencyError, Epoch, Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind eyes tell apart too.
_SCORE, _SHADE = "#0072b2", "#0072b2"
_EXTRAS = ("#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#6e6e6e")


def run_png(
    history: Sequence[Epoch],
    running: Sequence[float],
    curves: Mapping[str, Sequence[float | None]],
    title: str,
) -> bytes:
    """Return a PNG. Needs no display and leaves pyplot's state alone.

    Args:
        history: of the tracker.
        running: the running score of each epoch.
        curves: more scores by name, one an epoch, None where there was none.
        title: of the picture.

    Raises:
        DependencyError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError(
            "pbfx.compat: drawing needs matplotlib; pip install 'pbfx[plots]'"
        ) from error
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    scores, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    numbers = [epoch.number - 1 for epoch in history]
    scores.plot(
        numbers, [e.score for e in history], color=_SCORE, linewidth=1.8, label="validation"
    )
    if list(running) != [epoch.score for epoch in history]:
        scores.plot(numbers, running, color=_SCORE, linestyle=":", label="running validation")
    for index, (name, values) in enumerate(curves.items()):
        points = [float("nan") if value is None else value for value in values]
        scores.plot(numbers, points, color=_EXTRAS[index % len(_EXTRAS)], linewidth=1, label=name)
    _mark(scores, history)
    scores.set_title(title, loc="left")
    scores.set_ylabel("score")
    scores.legend(frameon=False)
    rates.plot(numbers, [e.learning_rates[0] for e in history], color="#6e6e6e", linewidth=1.2)
    if any(epoch.learning_rates[0] > 0 for epoch in history):
        rates.set_yscale("log")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("epoch")
    for axes in (scores, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    buffer = io.BytesIO()
    # No software or date: the same run gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _mark(axes: Axes, history: Sequence[Epoch]) -> None:
    for before, epoch in pairwise(history):
        if epoch.dendrites != before.dendrites:
            axes.axvline(epoch.number - 1.5, color=_SHADE, linewidth=0.9, linestyle=":")
            axes.annotate(
                f"{epoch.dendrites}",
                (epoch.number - 1.5, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -9),
                textcoords="offset points",
                color=_SHADE,
            )
    for epoch in history:
        if epoch.phase is Phase.DENDRITE:
            axes.axvspan(epoch.number - 1.5, epoch.number - 0.5, color=_SHADE, alpha=0.09, lw=0)
