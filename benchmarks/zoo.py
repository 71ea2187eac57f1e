"""Does every model that people have survive `pbfx.transform`? A sweep over three libraries.

Each model of torchvision, timm and transformers that can be built without a download, with random
weights, goes through the same checks in a process of its own (`benchmarks.sweep.check`). Rows are
appended as they come, and a second run with the same file goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.benchmark import Benchmark, Case
from benchmarks.errors import UsageError
from benchmarks.options import count, positive
from benchmarks.records import as_text, results_path
from benchmarks.sweep.check import BUILD, PLAIN, Finding, check
from benchmarks.sweep.choice import choose, interleave, names_of
from benchmarks.sweep.pool import STARTING, Ended, run_each
from benchmarks.sweep.subject import LIBRARIES, Name
from benchmarks.sweep.summary import NOT_BUILT, summarise

_FINDINGS = tuple(field.name for field in dataclasses.fields(Finding))
COLUMNS = ("library", "version", "model", "family", *_FINDINGS, "seconds")
_PRELOAD = ("benchmarks.sweep.check", *LIBRARIES, "transformers.modeling_utils")
# Rows are written and shown together that come within this many seconds.
_BATCH_SECONDS = 5.0


def run(args: argparse.Namespace) -> Iterator[Case]:
    """Check model by model; yield rows as they come, and a summary of all of them at the end.

    Raises:
        UsageError: for options that mean nothing here, or when no library is installed.
    """
    if args.device != "cpu" or args.dtype != "float32" or args.compile:
        raise UsageError("the sweep runs on the CPU in float32, not compiled")
    path = results_path(BENCHMARK.name, args)
    known = _known(path)
    rows = list(known.values())
    if args.summary:
        if not rows:
            raise UsageError("--summary reads the rows of --out or --save, and there are none")
        yield summarise(rows)
        return
    found, notes = names_of(args.libraries)
    if not found:
        raise UsageError("; ".join(notes))
    chosen = [choose(names, args.limit) for names in found.values()]
    wanted = [name for name in interleave(chosen) if _selected(name, args.only)]
    left = [name for name in wanted if (name.library, name.model) not in known]
    print(f"{len(left)} models to check, {len(wanted) - len(left)} done before", flush=True)
    versions = {library: importlib.metadata.version(library) for library in found}
    jobs = args.jobs or len(os.sched_getaffinity(0))
    ends = run_each(
        functools.partial(_check, seed=args.seed),
        left,
        jobs,
        args.time_limit,
        args.budget,
        _PRELOAD,
    )
    done = 0
    for batch in _batches(ends):
        done += len(batch)
        new = [row_of(end, versions[end.task.library]) for end in batch]
        rows += [as_text(row) for row in new]
        yield _progress(new, done, len(left))
    if done < len(left):
        notes.append(f"{len(left) - done} models not reached in time; another run takes them up")
    yield summarise(rows, notes)


def _check(name: Name, reached: Callable[[str], None], seed: int) -> Finding:
    return check(name, seed, reached)


def row_of(end: Ended[Name], version: str) -> dict[str, object]:
    """Return the CSV row of one model."""
    finding = end.result
    if finding is None:
        # The plain model's own fault, unless pbfx had begun.
        own = end.stage in (STARTING, BUILD, PLAIN)
        late = (end.fault or "").startswith("no end")
        outcome = NOT_BUILT if own else "timed out" if late else "crashed"
        finding = Finding(outcome=outcome, reason=f"{end.stage}: {end.fault}")
    name = {"library": end.task.library, "version": version, "model": end.task.model}
    row: dict[str, object] = {**name, "family": end.task.family}
    return row | dataclasses.asdict(finding) | {"seconds": end.seconds}


def _known(path: Path | None) -> dict[tuple[str, str], dict[str, str]]:
    """Return the rows of earlier runs, the last one of each model."""
    if path is None or not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["library"], row["model"]): row for row in csv.DictReader(file)}


def _selected(name: Name, only: list[str] | None) -> bool:
    return not only or any(name.model == one for one in only)


def _batches(ends: Iterator[Ended[Name]]) -> Iterator[list[Ended[Name]]]:
    batch: list[Ended[Name]] = []
    since = time.monotonic()
    for end in ends:
        batch.append(end)
        if time.monotonic() - since > _BATCH_SECONDS:
            yield batch
            batch, since = [], time.monotonic()
    if batch:
        yield batch


def _progress(rows: list[dict[str, object]], done: int, total: int) -> Case:
    headings = ("model", "outcome", "sites", "covered", "same", "transform")
    cells = []
    for row in rows:
        same = {row["identical_eval"], row["identical_train"], row["unchanged_grown"]}
        shown = (
            "-"
            if same == {None}
            else "yes"
            if same == {"yes"}
            else "NO"
            if "no" in same
            else "varies"
        )
        covered, seconds = row["covered_percent"], row["seconds_transform"]
        cells.append(
            (
                f"{row['library']} {row['model']}",
                str(row["outcome"]),
                "-" if row["sites"] is None else str(row["sites"]),
                "-" if covered is None else f"{covered:.0f} %",
                shown,
                "-" if seconds is None else f"{seconds:.2f} s",
            )
        )
    return Case(f"{done} of {total}", headings, cells, [], rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument(
        "--limit", type=count, metavar="N", help="models per library, families first (default: all)"
    )
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these models, by exact name")
    parser.add_argument("--jobs", type=count, help="processes at a time (default: one per core)")
    parser.add_argument(
        "--time-limit", type=positive, default=60.0, metavar="S", help="per model (default 60)"
    )
    parser.add_argument(
        "--budget", type=positive, metavar="S", help="end the sweep after this long"
    )
    parser.add_argument(
        "--summary", action="store_true", help="run nothing, summarise the rows of the file"
    )


BENCHMARK = Benchmark(
    "zoo", "transform every model of torchvision, timm, transformers", COLUMNS, add_arguments, run
)
