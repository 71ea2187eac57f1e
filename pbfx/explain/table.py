"""An explanation as text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from pbfx.explain.collapse import collapse, collapse_alike, write
from pbfx.explain.records import KeptReport, PartReport, SiteReport, SkippedReport

# A terminal's width by custom.
COLUMNS = 80
# Below this a column of paths tells nothing.
_LEAST = 16
ROOT = "(model)"

Row = tuple[str, ...]


def sites_table(sites: Sequence[SiteReport]) -> list[str]:
    """Return a line for every site or group of repeated ones, and a total; numbers are sums."""
    alike = collapse_alike(
        (s.name, (s.op, s.norm or "", s.calls, s.dendrites, s.parameters, s.next_dendrite))
        for s in sites
    )
    rows = [
        (
            write(pattern) or ROOT,
            f"x{len(names)}" if len(names) > 1 else "",
            op,
            norm,
            str(calls),
            str(dendrites),
            f"{parameters * len(names):,}",
            f"+{one_more * len(names):,}",
        )
        for pattern, (op, norm, calls, dendrites, parameters, one_more), names in alike
    ]
    total = (
        "total",
        f"x{len(sites)}",
        *("", "", "", ""),
        f"{sum(s.parameters for s in sites):,}",
        f"+{sum(s.next_dendrite for s in sites):,}",
    )
    if len(sites) > 1:
        rows.append(total)
    head = ("site", "", "op", "norm", "calls", "dendrites", "parameters", "one more")
    shown = [0, 2, 5, 6, 7]
    shown += [1] * (len(alike) < len(sites))
    shown += [3] * any(s.norm for s in sites)
    shown += [4] * any(s.calls > 1 for s in sites)
    return table([tuple(row[i] for i in sorted(shown)) for row in (head, *rows)])


def parts_table(parts: Sequence[PartReport], sites: dict[str, int]) -> list[str]:
    """Return a line for every part or group of repeated ones.

    Args:
        parts: the parts.
        sites: how many sites each has, by its path.
    """
    alike = collapse_alike((p.path, (p.class_name, str(p.rung), sites[p.path])) for p in parts)
    head = ("part", "", "class", "rung", "sites")
    rows = [
        (
            write(pattern) or ROOT,
            f"x{len(paths)}" if len(paths) > 1 else "",
            class_name,
            rung,
            str(number * len(paths)),
        )
        for pattern, (class_name, rung, number), paths in alike
    ]
    shown = [0, *[1] * (len(alike) < len(parts)), 2, 3, 4]
    return table([tuple(row[i] for i in shown) for row in (head, *rows)])


def kept_lines(kept: Sequence[KeptReport]) -> list[str]:
    """Return who keeps their own forward, by reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for report in kept:
        groups.setdefault((report.class_name, report.reason), []).append(report.path)
    return _grouped(groups, "own forward kept by")


def part_lines(parts: Sequence[PartReport], kept: Sequence[KeptReport]) -> list[str]:
    """Return why parts have no larger graph around them, where no module's own forward says it."""
    said = {"", *(report.reason for report in kept)}
    groups: dict[tuple[str, str], list[str]] = {}
    for part in parts:
        if part.reason not in said:
            groups.setdefault((part.class_name, part.reason), []).append(part.path)
    return _grouped(groups, "a graph of its own at")


def skipped_lines(skipped: Sequence[SkippedReport]) -> list[str]:
    """Return what carries no dendrites, by reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, op, reason in skipped:
        groups.setdefault((op, reason), []).append(name)
    return _grouped(groups, "no dendrites at")


def _grouped(groups: dict[tuple[str, str], list[str]], verdict: str) -> list[str]:
    """Return a paragraph for each kind and reason: one path in the sentence, several below it."""
    lines: list[str] = []
    for (kind, reason), paths in groups.items():
        texts = [_shorten(write(pattern) or ROOT, COLUMNS - 4) for pattern, _ in collapse(paths)]
        alone = len(paths) == 1
        where = texts[0] if paths[0] else "the model"
        who = f"{where} ({kind})" if alone else f"{len(set(paths))} x {kind}"
        lines += wrap(f"{verdict} {who}: {reason}")
        if not alone:
            lines += wrap(", ".join(texts), first="  ")
    return lines


def wrap(text: str, first: str = "") -> list[str]:
    """Return `text` in lines of at most 80 columns, from the second on indented by two."""
    return textwrap.wrap(
        text, COLUMNS, initial_indent=first, subsequent_indent="  ", break_on_hyphens=False
    )


def table(rows: Sequence[Row]) -> list[str]:
    """Return aligned lines of at most 80 columns; the first column gives way, from the left.

    Args:
        rows: the headings, then the cells. Columns that hold numbers only are aligned right. Where
            the others leave no room for the first, each row becomes a paragraph.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    widths[0] = min(widths[0], COLUMNS - sum(widths[1:]) - 2 * len(widths[1:]))
    if widths[0] < min(_LEAST, max(map(len, columns[0]))):
        return _paragraphs(rows)
    right = [False, *(all(map(_is_number, column[1:])) for column in columns[1:])]
    lines = []
    for row in rows:
        cells = [_shorten(row[0], widths[0]), *row[1:]]
        aligned = [
            f"{cell:>{width}}" if number else f"{cell:<{width}}"
            for cell, width, number in zip(cells, widths, right, strict=True)
        ]
        lines.append("  ".join(aligned).rstrip())
    return lines


def _paragraphs(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    head = rows[0]
    for row in rows[1:]:
        cells = [
            f"{cell} {name}" if _is_number(cell) else cell
            for name, cell in zip(head[1:], row[1:], strict=True)
            if cell
        ]
        lines.append(_shorten(row[0], COLUMNS))
        lines += wrap(", ".join(cells), first="  ")
    return lines


def _is_number(cell: str) -> bool:
    return cell.lstrip("+").replace(",", "").isdigit() or not cell


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[len(text) + 1 - width :]}"
