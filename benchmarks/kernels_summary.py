"""Sum up what `python -m benchmarks kernels` measured, from its CSV file and nothing else.

A *case* is a layer with D dendrites in one mode; of each, the rows of the latest run that compiled
rivals were in, and against one rival those of the latest run that this one was in. Multiples are of
times measured in the same run, so rows of different runs are never divided by one another.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import incumbent
from benchmarks.benchmark import Case
from benchmarks.errors import UsageError
from benchmarks.layer_providers import (
    CANDIDATE,
    COMPILED,
    FORWARD,
    INDUCTOR,
    LOOP,
    MAX_AUTOTUNE,
    MODES,
    PACKED,
    PACKED_INDUCTOR,
    PBFX,
    PLAIN,
    RIVALS,
    STEP,
    TUNED_GEMM,
)
from benchmarks.table import multiple

OURS = (PBFX, COMPILED)
# Slower than the best rival by more than this is a loss.
_LOSS = 1.05
_LARGE = 1024
# What the kernels are meant to reach.
_BOUNDS = {
    (FORWARD, MAX_AUTOTUNE): 1.5,
    (FORWARD, incumbent.NAME): 4.0,
    (STEP, PLAIN): 2.3,
    (CANDIDATE, PLAIN): 1.7,
    "large": 0.85,
    "memory": 0.5,
}
_AGAINST = (*(INDUCTOR, TUNED_GEMM, MAX_AUTOTUNE, PACKED_INDUCTOR), incumbent.NAME, LOOP, PACKED)
_SHOWN_LOSSES = 6

Row = Mapping[str, str]
# Rows by provider.
Measured = dict[str, Row]


def summarize(path: Path) -> list[Case]:
    """Return a table for each dtype and mode of the rows of a CSV file.

    Raises:
        UsageError: if the file cannot be read, or holds no such rows.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--summary {path}: {error}") from error
    needed = {"utc", "revision", "dtype", "layer", "dendrites", "mode", "provider", "us_p50"}
    if not rows or not needed <= rows[0].keys():
        raise UsageError(f"--summary {path}: no rows of `python -m benchmarks kernels`")
    tables = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for mode in MODES:
            chosen = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
            if any(row["provider"] == PBFX for row in chosen):
                tables.append(_table(dtype, mode, chosen))
    return tables


def latest(rows: Iterable[Row], having: Collection[str] = ()) -> dict[tuple[str, int], Measured]:
    """Return the rows of the latest run of each layer and D, by provider.

    Args:
        rows: of one dtype and mode.
        having: providers; runs without any of them do not count. All runs do where none is named.
    """
    runs: dict[tuple[str, int], dict[tuple[str, str], Measured]] = {}
    for row in sorted(rows, key=lambda row: row["utc"]):
        case, run = (row["layer"], int(row["dendrites"])), (row["utc"], row["revision"])
        runs.setdefault(case, {}).setdefault(run, {})[row["provider"]] = row
    found: dict[tuple[str, int], Measured] = {}
    for case, measured in runs.items():
        kept = [each for each in measured.values() if not having or any(map(each.get, having))]
        if kept:
            found[case] = kept[-1]
    return found


def compared(rows: Sequence[Row]) -> dict[tuple[str, int], Measured]:
    """Return the rows of each case's latest run against compiled rivals, or of its latest run."""
    return latest(rows) | latest(rows, having=(INDUCTOR, PACKED_INDUCTOR))


def gains(cases: Mapping[tuple[str, int], Measured], rival: str, own: str) -> list[float]:
    """Return by which factor `own` is faster than `rival`, for all cases that have both."""
    return [
        _time(case[rival]) / _time(case[own])
        for case in cases.values()
        if rival in case and own in case
    ]


def against_best(
    cases: Mapping[tuple[str, int], Measured], own: str
) -> dict[tuple[str, int], float]:
    """Return the time of `own` over that of the best rival of the same run, by case."""
    found = {}
    for key, case in cases.items():
        rivals = [_time(case[name]) for name in RIVALS if name in case]
        if own in case and rivals:
            found[key] = _time(case[own]) / min(rivals)
    return found


def memory_bound(row: Row) -> bool:
    """Return whether the traffic, and not the arithmetic, sets the roofline of a case."""
    roles = int(row["dendrites"]) + 1
    flops = 2 * roles * math.prod(int(row[name]) for name in ("positions", "neurons", "inputs"))
    arithmetic = flops / (float(row["product_tflops"]) * 1e6)
    # The file has six digits.
    return float(row["roofline_us"]) > arithmetic * 1.0001


def _table(dtype: str, mode: str, rows: Sequence[Row]) -> Case:
    cases, cells = compared(rows), []
    for rival in _AGAINST:
        met = latest(rows, having=(rival,))
        found = {own: gains(met, rival, own) for own in OURS}
        if any(found.values()):
            count = max(map(len, found.values()))
            bound = _BOUNDS.get((mode, rival))
            label = f"faster than {rival}, {count} cases"
            cells.append(_line(label, [_mean(found[own]) for own in OURS], bound, "x"))
    beaten = {own: against_best(cases, own) for own in OURS}
    worst = [max(beaten[own].values(), default=None) for own in OURS]
    cells.append(_line("slowest against the best rival", worst, _LOSS, "x", least=False))
    losses = {own: [key for key, x in beaten[own].items() if x > _LOSS] for own in OURS}
    cells.append(
        (
            "losses of more than 5 %",
            *(f"{len(losses[own])} of {len(beaten[own])}" if beaten[own] else "-" for own in OURS),
            "none",
        )
    )
    if mode == FORWARD:
        cells += _shares(cases)
    elif mode == STEP:
        cells.append(_steps("step / plain, D = 3, GEMM-bound", cases, (STEP, PLAIN), 3))
    elif mode == CANDIDATE:
        cells.append(_steps("step / plain, D = 0", cases, (CANDIDATE, PLAIN), 0))
    notes = [f"{own}: {_named(losses[own], beaten[own])}" for own in OURS if losses[own]]
    devices = sorted({row["device"] for case in cases.values() for row in case.values()})
    title = f"{', '.join(devices)}, {dtype}, {mode}: {len(cases)} cases; means are geometric"
    return Case(title, ("", *OURS, "wanted"), cells, notes, [])


def _shares(cases: Mapping[tuple[str, int], Measured]) -> list[tuple[str, ...]]:
    """Return the lines on the roofline: of large products, and of what moves memory."""
    lines = []
    sizes = ("positions", "neurons", "inputs")
    for label, key, wanted in (
        (f"roofline, M, N, K >= {_LARGE}", "large", False),
        ("roofline, memory-bound", "memory", True),
    ):
        found: dict[str, list[float]] = {own: [] for own in OURS}
        for case in cases.values():
            for own in OURS:
                row = case.get(own)
                if row is None or not row["roofline_share"] or not int(row["dendrites"]):
                    continue
                large = all(int(row[size]) >= _LARGE for size in sizes)
                if memory_bound(row) if wanted else large:
                    found[own].append(float(row["roofline_share"]))
        if any(found.values()):
            bound = _BOUNDS[key]
            lines.append(
                (
                    f"{label}, least and mean",
                    *(
                        f"{min(found[own]):.0%} {_mean(found[own]):.0%}" if found[own] else "-"
                        for own in OURS
                    ),
                    f">= {bound:.0%}",
                )
            )
    return lines


def _steps(
    label: str,
    cases: Mapping[tuple[str, int], Measured],
    bound: tuple[str, str],
    dendrites: int,
) -> tuple[str, ...]:
    worst: list[float | None] = []
    for own in OURS:
        found = [
            _time(case[own]) / _time(case[PLAIN])
            for (_, d), case in cases.items()
            if d == dendrites
            and own in case
            and PLAIN in case
            # The arithmetic of a step is three forwards', with the same shapes.
            and (bound[0] != STEP or _gemm_bound(case[own]))
        ]
        worst.append(max(found, default=None))
    return _line(f"{label}, worst", worst, _BOUNDS[bound], "x", least=False)


def _gemm_bound(row: Row) -> bool:
    """Return whether a linear layer's products take longer than its traffic, by a factor of two."""
    if not row["layer"].startswith("linear"):
        return False
    p, n, k = (int(row[name]) for name in ("positions", "neurons", "inputs"))
    size = 2 if row["dtype"] == "bfloat16" else 4
    moved = (p * k + p * n + 4 * n * k) * size / (float(row["copy_gbs"]) * 1e9)
    return 8 * p * n * k / (float(row["product_tflops"]) * 1e12) > 2 * moved


def _line(
    label: str, values: Sequence[float | None], bound: float | None, unit: str, least: bool = True
) -> tuple[str, ...]:
    cells = ("-" if value is None else f"{multiple(value)}{unit}" for value in values)
    sign = ">=" if least else "<="
    return (label, *cells, "" if bound is None else f"{sign} {bound:g}{unit}")


def _mean(values: Sequence[float]) -> float | None:
    """Return the geometric mean."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None


def _named(losses: Sequence[tuple[str, int]], times: Mapping[tuple[str, int], float]) -> str:
    """Return the largest losses in words."""
    ranked = sorted(losses, key=lambda key: -times[key])
    words = [f"{layer} D={d} {multiple(times[layer, d])}x" for layer, d in ranked[:_SHOWN_LOSSES]]
    more = len(ranked) - len(words)
    return "; ".join(words) + (f"; and {more} more" if more > 0 else "")


def _time(row: Row) -> float:
    return float(row["us_p50"])
