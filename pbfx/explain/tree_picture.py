"""The modules of a model of many parts as a tree, repeated layers once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from pbfx.explain.canvas import FAINT, GREY, LETTER, LINE, SIZE, STYLES, Canvas, clip
from pbfx.explain.collapse import Pattern, collapse_alike, names, write
from pbfx.explain.flow import APART, LEFT_OUT, OTHER, SITE
from pbfx.explain.records import KeptReport, PartReport, SiteReport, SkippedReport

_INDENT, _GUTTER = 0.2, 0.5
_LETTERS = 52
_ASPECT = 1.5
# Rows that fill a column.
_LENGTH = 24


@dataclasses.dataclass
class _Branch:
    """A module, parameter or op of the tree: what is known of it, and what is inside."""

    notes: list[str] = dataclasses.field(default_factory=list)
    kind: str = OTHER
    dendrites: int = 0
    inside: dict[Pattern, _Branch] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Row:
    depth: int
    kind: str
    dendrites: int
    label: str
    note: str
    parent: int


def draw_tree(
    class_name: str,
    modules: Sequence[str],
    parts: Sequence[PartReport],
    kept: Sequence[KeptReport],
    sites: Sequence[SiteReport],
    skipped: Sequence[SkippedReport],
) -> Any:
    """Return a figure of the tree of modules, in columns.

    Args:
        class_name: of the model.
        modules: the paths of all modules, in the order in which to show them.
        parts: see Explanation, and so on.
        kept: see Explanation.
        sites: see Explanation.
        skipped: see Explanation.
    """
    rows = _rows(_grow(modules, parts, kept, sites, skipped), class_name)
    width = max(_width(row) for row in rows)
    starts = _breaks(rows, width)
    longest = max(b - a for a, b in zip(starts, [*starts[1:], len(rows)], strict=True))
    right = len(starts) * (width + _GUTTER) - _GUTTER
    canvas = Canvas(
        0,
        right,
        -LINE / 2,
        (longest - 0.5) * LINE,
        class_name,
        {row.kind for row in rows} - {OTHER},
    )
    column = [sum(start <= number for start in starts) - 1 for number in range(len(rows))]
    for number, row in enumerate(rows):
        start = starts[column[number]]
        # A parent in another column is out of sight: its line comes from above.
        above = row.parent - start if row.parent >= start else None
        _draw(canvas, row, column[number] * (width + _GUTTER), number - start, above)
    return canvas.figure


def _grow(
    modules: Sequence[str],
    parts: Sequence[PartReport],
    kept: Sequence[KeptReport],
    sites: Sequence[SiteReport],
    skipped: Sequence[SkippedReport],
) -> _Branch:
    """Return the tree, with branches in the order of the modules."""
    own = {site.name for site in sites}
    held = [(k.path, (k.class_name, "own forward")) for k in kept]
    held += [(p.path, (p.class_name, f"one graph ({p.rung})")) for p in parts if p.path not in own]
    grows = [(s.name, (s.op, s.norm or "", s.dendrites)) for s in sites]
    entries: list[tuple[str, Pattern, _Branch]] = []
    for pattern, (name, note), paths in collapse_alike(held):
        entries.append((paths[0], pattern, _Branch([name, note] if paths[0] else [note], APART)))
    for pattern, (op, norm, dendrites), paths in collapse_alike(grows):
        notes = [op, *[norm] * bool(norm), *[f"x{len(paths)}"] * (len(paths) > 1)]
        entries.append((paths[0], pattern, _Branch(notes, SITE, dendrites)))
    for pattern, op, paths in collapse_alike((s.name, s.op) for s in skipped):
        notes = [op, *[f"x{len(paths)}"] * (len(paths) > 1)]
        entries.append((paths[0], pattern, _Branch(notes, LEFT_OUT)))
    place = {path: number for number, path in enumerate(modules)}

    def order(entry: tuple[str, Pattern, _Branch]) -> int:
        # What is named after a parameter stands with the parameter's owner.
        path = entry[0]
        while path not in place:
            path = path.rpartition(".")[0]
        return place[path]

    root = _Branch()
    for _, pattern, found in sorted(entries, key=order):
        branch = root
        for name in names(pattern) if pattern else ():
            branch = branch.inside.setdefault(name, _Branch())
        if branch.kind in (OTHER, APART):
            branch.notes, branch.kind, branch.dendrites = found.notes, found.kind, found.dendrites
    return root


def _rows(root: _Branch, class_name: str) -> list[_Row]:
    rows: list[_Row] = []

    def walk(branch: _Branch, pattern: Pattern, depth: int, parent: int) -> None:
        # A module of which nothing is known but the one inside shares that one's row.
        while branch.kind == OTHER and pattern and len(branch.inside) == 1:
            ((name, branch),) = branch.inside.items()
            pattern += (".", *name)
        label = clip(write(pattern) if pattern else class_name, _LETTERS)
        note = ", ".join(branch.notes)
        rows.append(_Row(depth, branch.kind, branch.dendrites, label, note, parent))
        here = len(rows) - 1
        for name, inner in branch.inside.items():
            walk(inner, name, depth + 1, here)

    walk(root, (), 0, -1)
    return rows


def _breaks(rows: Sequence[_Row], width: float) -> list[int]:
    """Return the first row of each column: near equal columns, broken before an outer module."""
    count = len(rows)
    columns = round(math.sqrt(_ASPECT * count * LINE / (width + _GUTTER)))
    columns = max(1, min(columns, math.ceil(count / _LENGTH)))
    slack = count // columns // 5
    starts = [0]
    for number in range(1, columns):
        ideal = round(number * count / columns)
        window = range(max(starts[-1] + 1, ideal - slack), min(count, ideal + slack + 1))
        starts.append(min(window, key=lambda at: (rows[at].depth, abs(at - ideal))))
    return starts


def _width(row: _Row) -> float:
    return row.depth * _INDENT + (len(row.label) + len(row.note)) * LETTER + 0.5


def _draw(canvas: Canvas, row: _Row, left: float, line: int, above: int | None) -> None:
    x, y = left + row.depth * _INDENT, line * LINE
    if row.parent >= 0:
        start = -0.12 if above is None else above * LINE + 0.1
        bend = x - _INDENT / 2
        canvas.axes.plot([bend, bend, x], [start, y, y], color=FAINT, linewidth=0.7, zorder=1)
    room = 0.1 if row.kind == SITE else 0.0
    width = len(row.label) * LETTER + 0.16 + room
    style = {"zorder": 4, "va": "center_baseline"}
    if row.kind != OTHER:
        canvas.box(x + width / 2, y, width, 0.185, row.kind)
    if row.kind == SITE:
        canvas.badge(x + 0.02, y, row.dendrites)
    colour = STYLES[row.kind][2]
    canvas.text(x + 0.08 + room, y, row.label, color=colour, **style)
    canvas.text(x + width + 0.08, y, row.note, size=SIZE - 0.5, color=GREY, **style)
