"""What a benchmark is: a name, options, and a generator of cases that passed their gate."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Case:
    """One measured setting: a table for people and rows for the CSV file.

    Attributes:
        title: a line above the table.
        headings: of the table's columns.
        cells: the table, a tuple per line.
        notes: lines below the table.
        rows: what the CSV file gets, with exactly the benchmark's `columns` as keys.
    """

    title: str
    headings: tuple[str, ...]
    cells: list[tuple[str, ...]]
    notes: list[str]
    rows: list[dict[str, object]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One entry of the registry.

    Attributes:
        name: what the user types.
        summary: one line for the list.
        columns: the CSV columns of its own; those of `benchmarks.environment` come before them.
        add_arguments: adds its options to those that all benchmarks share.
        run: checks the outputs (raises `GateError`), then measures and yields case by case.
        summarize: makes tables of the rows of a CSV file, for `--summary`; None if it has none.
    """

    name: str
    summary: str
    columns: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Iterator[Case]]
    summarize: Callable[[Path], list[Case]] | None = None
