"""An explanation as text for a terminal of 80 columns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from pbfx.explain.collapse import collapse, collapse_alike, write
from pbfx.explain.records import (
    KeptReport,
    LoweredReport,
    PartReport,
    SiteReport,
    SkippedReport,
)
from pbfx.pipeline import sum_records
from pbfx.wording import counted

# A terminal's width by custom.
COLUMNS = 80
# Below this a column of paths tells nothing.
_LEAST = 16
ROOT = "(model)"

Row = tuple[str, ...]


def sites_table(sites: Sequence[SiteReport]) -> list[str]:
    """Return a line for every site or group of repeated ones, and a total; numbers are sums."""
    alike = collapse_alike(
        (
            s.name,
            (
                *(s.op, s.norm or "", s.calls, s.dendrites),
                "" if s.channels == s.neurons else f"{s.channels} of {s.neurons}",
                *(s.parameters, s.next_dendrite, *_pays(s)),
            ),
        )
        for s in sites
    )
    rows = [
        (
            write(pattern) or ROOT,
            f" x{len(names)}" if len(names) > 1 else "",
            op,
            norm,
            str(calls),
            str(dendrites),
            channels,
            f"{parameters * len(names):,}",
            f"+{one_more * len(names):,}",
            *pays,
        )
        for pattern, (
            op,
            norm,
            calls,
            dendrites,
            channels,
            parameters,
            one_more,
            *pays,
        ), names in alike
    ]
    total = (
        "total",
        f" x{len(sites)}",
        *("", "", "", "", ""),
        f"{sum(s.parameters for s in sites):,}",
        f"+{sum(s.next_dendrite for s in sites):,}",
        *("", ""),
    )
    if len(sites) > 1:
        rows.append(total)
    head = (
        *("site", "", "op", "norm", "calls", "dendrites", "channels", "parameters", "one more"),
        *("r", "p"),
    )
    shown = [0, 1, 2, 5, 7, 8]
    shown += [3] * any(s.norm for s in sites)
    shown += [4] * any(s.calls > 1 for s in sites)
    shown += [6] * any(s.channels != s.neurons for s in sites)
    # Measured in a dendrite phase: correlation with the error on unseen batches, and its p-value.
    shown += [9, 10] * any(s.heldout is not None for s in sites)
    return table([tuple(row[i] for i in sorted(shown)) for row in (head, *rows)])


def _pays(site: SiteReport) -> tuple[str, str]:
    heldout = "" if site.heldout is None else f"{site.heldout:.3f}"
    return heldout, "" if site.p_value is None else f"{site.p_value:.2g}"


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
            f" x{len(paths)}" if len(paths) > 1 else "",
            class_name,
            rung,
            str(number * len(paths)),
        )
        for pattern, (class_name, rung, number), paths in alike
    ]
    return table([head, *rows])


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


def lowered_lines(reports: Sequence[LoweredReport]) -> list[str]:
    """Return what lowering makes of all parts together."""
    if not reports:
        return []
    before, after = sum(r.ops_before for r in reports), sum(r.ops_after for r in reports)
    parts = f" in {len(reports)} graphs" if len(reports) > 1 else ""
    lines = wrap(f"lowered for inference: {before} ops{parts} become {after}")
    for records in zip(*(report.passes for report in reports), strict=True):
        record = sum_records(records)
        if record.rewrites:
            what = counted(record.rewrites, "rewrite")
            # A number stays with what it counts.
            change = re.sub(r"([+-]\d+) ", "\\1\0", record.diff())
            text = f"{record.name}: {what} in {record.seconds * 1e3:.1f} ms: {change}"
            lines += [line.replace("\0", " ") for line in wrap(text, first="  ")]
    fused = [name for report in reports for name in report.fused]
    if fused:
        texts = [_shorten(write(pattern), COLUMNS - 4) for pattern, _ in collapse(fused)]
        lines += wrap(f"one product each at {', '.join(texts)}")
    groups: dict[tuple[str, str], list[str]] = {}
    for report in reports:
        for site in report.apart:
            groups.setdefault(("site", site.reason), []).append(site.name)
    return lines + _grouped(groups, "soma apart from its dendrites at")


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
    """Return aligned lines of at most 80 columns; paths give way, from the left.

    Args:
        rows: the headings, then the cells: path, what stands right after it, and so on. Columns
            that hold numbers only are aligned right. Where the others leave no room for paths, each
            row becomes a paragraph.
    """
    first = [len(path) + len(count) for path, count, *_ in rows]
    columns = list(zip(*(cells for _, _, *cells in rows), strict=True))
    widths = [max(map(len, column)) for column in columns]
    room = min(max(first), COLUMNS - sum(widths) - 2 * len(widths))
    if room < min(_LEAST, max(first)):
        return _paragraphs(rows)
    right = [all(map(_is_number, column[1:])) for column in columns]
    lines = []
    for path, count, *cells in rows:
        aligned = [
            f"{cell:>{width}}" if number else f"{cell:<{width}}"
            for cell, width, number in zip(cells, widths, right, strict=True)
        ]
        whole = f"{_shorten(path, room - len(count))}{count}"
        lines.append("  ".join([f"{whole:<{room}}", *aligned]).rstrip())
    return lines


def _paragraphs(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for path, count, *cells in rows[1:]:
        named = zip(rows[0][2:], cells, strict=True)
        texts = [f"{cell} {name}" if _is_number(cell) else cell for name, cell in named if cell]
        lines.append(f"{_shorten(path, COLUMNS - len(count))}{count}")
        lines += wrap(", ".join(texts), first="  ")
    return lines


def _is_number(cell: str) -> bool:
    return cell.lstrip("+").replace(",", "").isdigit() or not cell


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[len(text) + 1 - width :]}"
