"""Tables that fit a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from benchmarks.benchmark import Case

WIDTH = 80
_GAP = "  "


def render(case: Case) -> str:
    """Return title, table and notes, no line wider than `WIDTH`."""
    parts = [textwrap.fill(case.title, WIDTH), columns(case.headings, case.cells)]
    parts += [
        textwrap.fill(note, WIDTH, initial_indent="  ", subsequent_indent="    ")
        for note in case.notes
    ]
    return "\n".join(parts)


def columns(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table: the first column to the left, the others to the right.

    If the table is too wide its first column is cut, because numbers cannot be.
    """
    table = [tuple(headings), *map(tuple, cells)]
    widths = [max(len(line[i]) for line in table) for i in range(len(headings))]
    rest = sum(widths[1:]) + len(_GAP) * (len(widths) - 1)
    least = min(widths[0], 8)
    widths[0] = min(widths[0], WIDTH - rest)
    assert widths[0] >= least, f"the columns {headings[1:]} leave no room for {headings[0]!r}"

    def line(row: Sequence[str]) -> str:
        first = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 1] + "…"
        numbers = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        return _GAP.join([first.ljust(widths[0]), *numbers]).rstrip()

    ruler = "-" * (widths[0] + rest)
    return "\n".join([line(table[0]), ruler, *map(line, table[1:])])


def milliseconds(seconds: float) -> str:
    """Return a time in ms with three digits."""
    return f"{seconds * 1e3:#.3g}".rstrip(".") if seconds < 1 else f"{seconds * 1e3:.0f}"


def multiple(value: float) -> str:
    """Return a ratio with three digits or so, in at most four characters below 1000."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
