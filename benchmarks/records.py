"""Append rows to a CSV file: the one place that plots read."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.errors import UsageError

RESULTS = ROOT / "benchmarks" / "results"


def results_path(benchmark: str, args: argparse.Namespace) -> Path | None:
    """Return the file that a run's options name for its rows, or None."""
    return args.out or (RESULTS / f"{benchmark}.csv" if args.save else None)


def check_columns(path: Path, columns: tuple[str, ...]) -> None:
    """Refuse a file that cannot be appended to, before any time is spent on measuring.

    Raises:
        UsageError: if `path` holds other columns, or its folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or not path.stat().st_size:
            return
        with path.open(newline="", encoding="utf-8") as file:
            found = tuple(next(csv.reader(file), ()))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    if found != columns:
        odd = sorted(set(found) ^ set(columns)) or ["their order"]
        raise UsageError(
            f"{path} has other columns than this benchmark writes ({', '.join(odd)}); "
            f"name another file with --out"
        )


def append(path: Path, columns: tuple[str, ...], rows: Iterable[Mapping[str, object]]) -> None:
    """Append `rows` to `path`, with a header if the file is new.

    Raises:
        ValueError: if a row lacks a column or has one too many.
    """
    rows = list(rows)
    for row in rows:
        if set(row) != set(columns):
            raise ValueError(f"row and columns differ in {sorted(set(row) ^ set(columns))}")
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(map(as_text, rows))


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of `path`, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_text(row: Mapping[str, object]) -> dict[str, str]:
    """Return a row as it stands in the file."""
    return {
        key: f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
        for key, value in row.items()
    }
