"""Pictures of the studies, from rows and nothing else; the same rows give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.arms import arm_named, sham_of
from benchmarks.learning.rows import Row
from benchmarks.learning.studies import STUDIES
from benchmarks.learning.summary import Line, Table, contenders, front, rows_of, tables_of

# Okabe and Ito's palette, which colour-blind eyes tell apart too.
_COLOURS = ("#6e6e6e", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442")


@dataclass(frozen=True)
class Growth:
    """What was known before a growth, and what it brought.

    Attributes:
        study, arm, width, dendrites: where; `dendrites` after the growth.
        predicted: the candidates' mean held-out |correlation| with the error.
        realised: the share of the validation loss that went, less the share that went from the
            sham of the same seed in the same phase.
    """

    study: str
    arm: str
    width: float
    dendrites: int
    predicted: float
    realised: float


def growths(rows: Sequence[Row]) -> list[Growth]:
    """Return every growth of perforated arms that has a sham beside it."""
    shams = {_setting(row, row.arm): row for row in rows if row.arm.startswith("sham")}
    found = []
    for row in rows:
        if not row.arm.startswith("perforated"):
            continue
        control = sham_of(arm_named(row.arm, STUDIES[row.study].selections))
        sham = shams.get(_setting(row, control))
        if sham is None:
            continue
        for index in range(1, min(len(row.stages), len(sham.stages))):
            stage = row.stages[index]
            score = (stage.growth or {}).get("candidate_score")
            if score is None:
                continue
            gains = [
                1 - run.stages[index].phase_loss / run.stages[index - 1].phase_loss
                for run in (row, sham)
            ]
            found.append(
                Growth(
                    row.study,
                    row.arm,
                    row.width,
                    stage.dendrites,
                    score,
                    gains[0] - gains[1],
                )
            )
    return found


def _setting(row: Row, arm: str) -> tuple[object, ...]:
    """Return what a run has in common with its control, whose arm is named."""
    # A run that two studies share stands in the rows of one.
    lengths = tuple(stage.epochs for stage in row.stages)
    return STUDIES[row.study].net, row.width, row.seed, lengths, arm


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what there are rows for into `folder`; return the files."""
    written = []
    for study in STUDIES:
        if study == "ablations" and not any(row.study == study for row in rows):
            continue
        tables = tables_of(rows_of(study, rows))
        # The study's own protocol is the one with most lines; others are ablations.
        main = max(tables, key=lambda table: len(table.lines), default=None)
        if main is None:
            continue
        draw = _DRAWN.get(study, _draw_widths)
        written.append(_draw(folder / f"{study}.svg", lambda axes, d=draw, m=main: d(axes, m)))
    if found := growths(rows):
        written.append(
            _draw(folder / "calibration.svg", lambda axes: _draw_calibration(axes, found))
        )
    return written


def _draw(path: Path, draw: Callable[[Any], None]) -> Path:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "pbfx", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
    return path


def _draw_widths(axes: Any, table: Table) -> None:
    """Draw how each arm ends beside the plain net of the same width, as a share of its error."""
    last = {(line.arm, line.width): line for line in contenders(table)}
    arms = [arm for arm in dict.fromkeys(arm for arm, _ in last) if arm != "plain"]
    widths = sorted({line.width for line in table.lines}, reverse=True)
    for number, arm in enumerate(arms):
        offset = 0.8 * ((number + 0.5) / len(arms) - 0.5)
        _draw_shares(
            axes,
            [
                (i + offset, last.get((arm, w)), last.get(("plain", w)))
                for i, w in enumerate(widths)
            ],
            fmt="o" if number < len(_COLOURS) else "s",
            color=_COLOURS[number % len(_COLOURS)],
            label=arm,
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(widths)), [f"width {width:g}" for width in widths])
    figure = "loss" if STUDIES[table.study].score == "loss" else "error"
    axes.set_ylabel(f"test {figure} beside the plain net's, %")
    axes.set_title(f"{table.study}: mean and 95 % interval, less is better", loc="left")
    axes.legend(frameon=False, fontsize="small")


def _draw_shares(
    axes: Any,
    points: Sequence[tuple[float, Line | None, Line | None]],
    *,
    across: bool = False,
    **style: Any,
) -> None:
    """Draw paired differences between two lines, with their intervals, in % of the second.

    Args:
        axes: where.
        points: a place, a line, and what it is compared with.
        across: whether the places are along the other axis.
        style: of `errorbar`.
    """
    drawn = []
    for place, line, rival in points:
        found = None if line is None or rival is None else line.against(rival)
        if found is None or rival is None:
            continue
        share, half = 100 / rival.score.mean, found.difference.half_width
        drawn.append(
            (place, share * found.difference.mean, 0 if math.isnan(half) else share * half)
        )
    if drawn:
        places, means, halves = zip(*drawn, strict=True)
        ends: dict[str, Any] = {"xerr" if across else "yerr": halves}
        where = (means, places) if across else (places, means)
        axes.errorbar(*where, **ends, capsize=2, linestyle="", **style)


def _draw_front(axes: Any, table: Table) -> None:
    """Draw parameters against error, and the nets that none as small beats."""
    lines = contenders(table)
    for number, arm in enumerate(dict.fromkeys(line.arm for line in lines)):
        own = [line for line in lines if line.arm == arm]
        axes.scatter(
            [line.parameters for line in own],
            [line.score.mean for line in own],
            label=arm,
            s=[25 + 25 * line.dendrites for line in own],
            color=_COLOURS[number % len(_COLOURS)],
            alpha=0.8,
        )
    best = front(lines)
    axes.step(
        [line.parameters for line in best],
        [line.score.mean for line in best],
        where="post",
        color="black",
        linewidth=0.8,
        label="front",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("parameters")
    axes.set_ylabel("test error, %")
    axes.set_title("compression: larger dots have more dendrites", loc="left")
    axes.legend(frameon=False)


def _draw_ablations(axes: Any, table: Table) -> None:
    """Draw how each arm ends beside the arm without settings, as a share of its error."""
    widths = sorted({line.width for line in table.lines}, reverse=True)
    last = {(line.arm, line.width): line for line in table.lines}
    arms = [arm for arm in dict.fromkeys(line.arm for line in table.lines) if arm != "perforated"]
    for number, width in enumerate(widths):
        usual, offset = last.get(("perforated", width)), 0.2 * (number - (len(widths) - 1) / 2)
        _draw_shares(
            axes,
            [(-place - offset, last.get((arm, width)), usual) for place, arm in enumerate(arms)],
            across=True,
            fmt="o",
            color=_COLOURS[(number + 1) % len(_COLOURS)],
            label=f"width {width:g}",
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks([-place for place in range(len(arms))], arms, fontsize="small")
    axes.set_xlabel("test error beside perforated's, %: mean and 95 % interval, less is better")
    axes.set_title("ablations", loc="left")
    axes.legend(frameon=False, fontsize="small")


def _draw_calibration(axes: Any, found: Sequence[Growth]) -> None:
    for number, study in enumerate(dict.fromkeys(growth.study for growth in found)):
        own = [growth for growth in found if growth.study == study]
        axes.scatter(
            [growth.predicted for growth in own],
            [100 * growth.realised for growth in own],
            s=14,
            alpha=0.7,
            label=study,
            color=_COLOURS[(number + 1) % len(_COLOURS)],
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("candidates' mean held-out |correlation| with the error, before the growth")
    axes.set_ylabel("validation loss gone, beyond the sham's, %")
    axes.set_title("Does the correlation foretell the gain?", loc="left")
    axes.legend(frameon=False)


_DRAWN: dict[str, Callable[[Any, Table], None]] = {
    "compression": _draw_front,
    "ablations": _draw_ablations,
}
"""How studies are drawn that are not about widths."""
