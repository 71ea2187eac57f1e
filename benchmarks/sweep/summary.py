"""What a sweep amounts to: counts by library, the conditions it must meet, and every loss."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from benchmarks.benchmark import Case
from benchmarks.sweep.check import NO, VARIES

Row = Mapping[str, str]
# What a sweep has to show.
MODELS, TRANSFORMED_PERCENT, COVERED_PERCENT = 300, 95.0, 90.0
NOT_BUILT, TRANSFORMED, REFUSED = "not built", "transformed", "refused"
_COMPARED = ("identical_eval", "identical_train", "unchanged_grown")


def summarise(rows: Sequence[Row], notes: Sequence[str] = ()) -> Case:
    """Return a table by library, with conditions and failures as notes."""
    headings = ("library", "ran", "transformed", "identical", "covered", "not built")
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    cells = [_line(name, [r for r in rows if r["library"] == name]) for name in libraries]
    if len(libraries) > 1:
        cells.append(_line("all", rows))
    return Case(
        f"{len(rows)} models, {len(_ran(rows))} of which run by themselves",
        headings,
        cells,
        [*notes, *conditions(rows), *losses(rows)],
        [],
    )


def conditions(rows: Sequence[Row]) -> list[str]:
    """Return one sentence per condition, with the number that decides it."""
    ran = _ran(rows)
    done = [row for row in ran if row["outcome"] == TRANSFORMED]
    broken = [row for row in ran if row["outcome"] not in (TRANSFORMED, REFUSED)]
    different = [row for row in done if _different(row)]
    varying = [row for row in done if any(row[column] == VARIES for column in _COMPARED)]
    share, covered = _percent(len(done), len(ran)), _covered(ran)
    return [
        _met(len(ran) >= MODELS, f"{len(ran)} models ran and were tried, wanted {MODELS}"),
        _met(not broken, f"{len(broken)} crashed or ran out of time, wanted 0"),
        _met(
            not different,
            f"{len(done) - len(different)} of {len(done)} transformed models have identical "
            f"outputs ({len(varying)} of them vary by themselves), wanted all",
        ),
        _met(
            share >= TRANSFORMED_PERCENT,
            f"{share:.1f} % of the models were transformed, wanted {TRANSFORMED_PERCENT:g} %",
        ),
        _met(
            covered >= COVERED_PERCENT,
            f"{covered:.1f} % of linear and conv parameters are covered on average, "
            f"wanted {COVERED_PERCENT:g} %",
        ),
    ]


def losses(rows: Sequence[Row]) -> list[str]:
    """Return a line for each model that failed, differs or is covered badly, and why."""
    lines = []
    for row in _ran(rows):
        name = f"{row['library']} {row['model']}"
        if row["outcome"] != TRANSFORMED:
            lines.append(f"{name}: {row['outcome'].upper()}: {row['reason']}")
        elif _different(row):
            columns = ", ".join(column for column in _COMPARED if row[column] == NO)
            lines.append(f"{name}: DIFFERS in {columns}")
        elif float(row["covered_percent"] or 0) < COVERED_PERCENT:
            covered = float(row["covered_percent"] or 0)
            lines.append(f"{name}: covered {covered:.0f} %: {row['left_out'] or 'nothing found'}")
    kinds = collections.Counter(
        row["reason"].split(":")[0] + ":" + row["reason"].split(":")[1][:40]
        for row in rows
        if row["outcome"] == NOT_BUILT
    )
    lines += [f"not built, {count} x {kind.strip()}" for kind, count in kinds.most_common(8)]
    return lines


def _ran(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["outcome"] != NOT_BUILT]


def _different(row: Row) -> bool:
    return any(row[column] == NO for column in _COMPARED)


def _covered(ran: Sequence[Row]) -> float:
    """Return the mean share; a model that was not transformed counts as 0."""
    shares = [float(r["covered_percent"] or 0) for r in ran if float(r["linear_conv"] or 1) > 0]
    return sum(shares) / len(shares) if shares else 0.0


def _line(name: str, rows: Sequence[Row]) -> tuple[str, ...]:
    ran = _ran(rows)
    done = [row for row in ran if row["outcome"] == TRANSFORMED]
    same = [row for row in done if not _different(row)]
    return (
        name,
        str(len(ran)),
        f"{len(done)} ({_percent(len(done), len(ran)):.0f} %)",
        f"{len(same)} ({_percent(len(same), len(done)):.0f} %)",
        f"{_covered(ran):.1f} %",
        str(len(rows) - len(ran)),
    )


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0


def _met(met: bool, sentence: str) -> str:
    return f"{'met' if met else 'NOT MET'}: {sentence}"
