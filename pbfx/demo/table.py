"""The table that a person reads at the end: no wider than 80 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pbfx.demo.statistics import Comparison, Estimate
from pbfx.demo.summary import ArmSummary, Summary

WIDTH = 80

_BASELINE = "plain"
_VERDICT_STYLES = {"lower": "green", "higher": "red", "undecided": "yellow"}


def print_summary(
    summary: Summary, file: TextIO, *, title: str | None = None, notes: Sequence[str] = ()
) -> None:
    """Print tables, sentences and notes to `file`, coloured where it is a terminal."""
    console = Console(file=file, highlight=False)
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    sign = "±" if console.encoding.lower().startswith("utf") else "+/-"
    console.print(_arms_table(summary, title, sign))
    if summary.comparisons:
        console.print(_differences_table(summary))
    for sentence in summary.sentences:
        console.print(sentence)
    for note in (*notes, parameter_growth(summary)):
        if note:
            console.print(note, style="dim")


def parameter_growth(summary: Summary) -> str | None:
    """Say what the gain costs in parameters, and which rival the table does not have."""
    counts = {arm.arm: arm.parameters for arm in summary.arms}
    base = counts.get(_BASELINE)
    lines = [
        f"{versus.treated} has {counts[versus.treated] / base:.1f}x plain's parameters"
        for versus in summary.comparisons
        if base and versus.control == _BASELINE and counts[versus.treated] > base
    ]
    if not lines:
        return None
    return f"{'; '.join(lines)}. A plain net as large is a hard rival: see --width."


def _arms_table(summary: Summary, title: str | None, sign: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("arm")
    for heading in ("accuracy %", "error %", "parameters", "epochs", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in summary.arms:
        table.add_row(*_arm_cells(arm, sign))
    return table


def _arm_cells(arm: ArmSummary, sign: str) -> tuple[str, ...]:
    return (
        arm.arm,
        f"{arm.accuracy:.2f}",
        _with_interval(arm.error, sign),
        _whole(arm.parameters),
        _whole(arm.epochs),
        f"{arm.seconds:.1f}",
    )


def _differences_table(summary: Summary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("paired difference")
    for heading in ("error points", "95 % interval", "of its error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for versus in summary.comparisons:
        comparison = versus.comparison
        table.add_row(
            f"{versus.treated} - {versus.control}",
            Text(f"{comparison.difference.mean:+.2f}", style=_VERDICT_STYLES[comparison.verdict]),
            _interval(comparison.difference),
            _relative(comparison),
        )
    return table


def _with_interval(value: Estimate, sign: str) -> str:
    if math.isnan(value.half_width):
        return f"{value.mean:.2f}"
    return f"{value.mean:.2f} {sign} {value.half_width:.2f}"


def _interval(value: Estimate) -> str:
    return "none" if math.isnan(value.low) else f"{value.low:+.2f} .. {value.high:+.2f}"


def _relative(comparison: Comparison) -> str:
    return "none" if math.isnan(comparison.relative) else f"{100 * comparison.relative:+.1f} %"


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"
