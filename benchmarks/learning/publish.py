"""Write the tables of the rows into docs/results.md, between markers; the words there stay.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, NAME being a study or `costs`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.errors import UsageError
from benchmarks.learning.rows import RESULTS, Row, read
from benchmarks.learning.studies import STUDIES
from benchmarks.learning.summary import REPORTS, rows_of, tables_of
from pbfx.files import atomic_path

PAGE = ROOT / "docs" / "results.md"
_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(verb: str, folder: Path, rest: Sequence[str]) -> int:
    """Do `summary` or `plots` for the rows in `folder`, and print what comes of it.

    Raises:
        UsageError: if there are more words, or no rows.
    """
    if rest:
        raise UsageError(f"`{verb}` takes no study, got {' '.join(rest)}")
    rows = all_rows(folder)
    if not rows:
        raise UsageError(f"{folder} holds no rows of learning studies")
    if verb == "plots":
        from benchmarks.learning.plots import draw_all

        for path in draw_all(rows, folder):
            print(path)
        return 0
    for name in (*STUDIES, "costs"):
        if block := block_of(name, rows):
            print(f"\n## {name}\n\n{block}")
    if folder == RESULTS and PAGE.exists():
        write(PAGE, fill(PAGE.read_text(encoding="utf-8"), rows))
    return 0


def all_rows(folder: Path) -> list[Row]:
    """Return the rows of every study in `folder`."""
    return [row for name in STUDIES for row in read(folder / f"{name}.csv")]


def fill(page: str, rows: Sequence[Row]) -> str:
    """Return `page` with each table that it has a place for made anew.

    Raises:
        UsageError: if a place is for a table that does not exist.
    """

    def made(found: re.Match[str]) -> str:
        if found[2] not in (*STUDIES, "costs"):
            raise UsageError(f"docs/results.md has a place for {found[2]!r}, which is no study")
        return f"{found[1]}\n{block_of(found[2], rows) or '_Not run yet._'}\n\n{found[3]}"

    return _BLOCK.sub(made, page)


def block_of(name: str, rows: Sequence[Row]) -> str:
    """Return the tables of a study, a part for each protocol; empty where there are no rows."""
    if name == "costs":
        return _costs(rows)
    tables = tables_of(rows_of(name, rows))
    return "\n\n".join(REPORTS[name](table) for table in tables)


def _costs(rows: Sequence[Row]) -> str:
    """Return what each study took, and on what."""
    if not rows:
        return ""
    lines = ["| study | runs | GPU-s | devices | torch | revisions |", "|---|---|---|---|---|---|"]
    for name in STUDIES:
        own = [row for row in rows if row.study == name]
        if own:
            seconds = sum(row.gpu_seconds for row in own)
            told = (
                ", ".join(dict.fromkeys(row.cells[column] for row in own))
                for column in ("device", "torch", "revision")
            )
            lines.append(f"| {name} | {len(own)} | {seconds:,.0f} | {' | '.join(told)} |")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
