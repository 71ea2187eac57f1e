"""`python -m benchmarks learning`: do studies, resume them, and turn their rows into tables.

Exit codes: 0 done; 1 runs failed or were given up, and the same command does the rest; 2 a wrong
option.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.errors import UsageError
from benchmarks.learning import rows
from benchmarks.learning.arms import arm_named, arm_names, setting
from benchmarks.learning.mps import multi_process_service
from benchmarks.learning.nets import parameters_at
from benchmarks.learning.studies import STUDIES, Study
from benchmarks.learning.task import Task
from benchmarks.learning.workers import Placement, work_off
from benchmarks.options import count, natural, positive
from pbfx.errors import PbfxError

SUMMARY = "studies of what dendrites bring, with many paired seeds"
_REPORTS = ("summary", "plots")


def main(argv: Sequence[str]) -> int:
    """Run `python -m benchmarks learning ...` and return its exit code."""
    args = parser().parse_args(argv)
    try:
        if args.study[0] in _REPORTS:
            from benchmarks.learning import publish

            return publish.main(args.study[0], args.out, args.study[1:])
        return _run(args)
    except (UsageError, PbfxError) as error:
        print(f"benchmarks learning: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks learning: interrupted; the same command resumes", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    known = ", ".join(STUDIES)
    parser = argparse.ArgumentParser(prog="python -m benchmarks learning", description=SUMMARY)
    add = parser.add_argument
    add(
        "study",
        nargs="+",
        help=f"{known}; or `summary`, which prints tables and writes them into docs/results.md "
        "(--out names another folder of rows, and then they are only printed), or `plots`",
    )
    add("--seeds", type=count, default=5, help="paired runs of each arm (default 5)")
    add("--first-seed", type=natural, default=0)
    add("--widths", help="such as 1.0,0.25; by default the study's")
    add(
        "--arms",
        help="such as plain,sham,perforated-last,perforated[tuning=full],wider2; by default the "
        "study's",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    add(
        "--ablate",
        action="append",
        default=[],
        metavar="KEY=A|B",
        help="an arm for each value of a setting of pbfx.Config or pbfx.Tracker",
    )
    add("--neuron-epochs", type=count, help="of each neuron phase")
    add("--dendrite-epochs", type=count, help="of each dendrite phase")
    add("--dendrites", type=count, help="to grow")
    add("--devices", default="cpu", help="such as cuda:0,cuda:1 (default cpu)")
    add("--jobs", type=count, default=1, help="processes for each device (default 1)")
    add("--lanes", type=count, default=1, help="runs at a time in each process (default 1)")
    add("--steps-per-graph", type=natural, default=8, help="0: no CUDA graphs (default 8)")
    add(
        "--torch-optimizers",
        action="store_true",
        help="step by torch's own optimizers instead of benchmarks.learning.adadelta",
    )
    add("--mps", action="store_true", help="run NVIDIA's Multi-Process Service for the study")
    add("--budget", type=positive, metavar="SECONDS", help="then stop; the rest can be resumed")
    add("--dry-run", action="store_true", help="say what would be done")
    add("--data-dir", type=Path, default=os.environ.get("PBFX_DATA_DIR"), metavar="DIR")
    add("--out", type=Path, default=rows.RESULTS, metavar="DIR", help="folder of the CSV files")
    add("--revision", help="git revision to record where there is no git checkout")
    return parser


def _run(args: argparse.Namespace) -> int:
    # A run that two studies have in common is done once: only the study's name sets it apart.
    asked = [task for name in args.study for task in tasks_of(name, args)]
    tasks = list({task.key[1:]: task for task in reversed(asked)}.values())
    placement = _placement(args)
    args.out.mkdir(parents=True, exist_ok=True)
    files = {name: args.out / f"{name}.csv" for name in STUDIES}
    for name in args.study:
        if cut := rows.mend(files[name]):
            print(f"{files[name]}: cut off {cut} bytes of a row that was not written to its end")
    done = {rows.key_of(row.cells)[1:] for path in files.values() for row in rows.read(path)}
    left = sorted((task for task in tasks if task.key[1:] not in done), key=_cost, reverse=True)
    if args.budget is not None:
        # What can be done is to be of the studies named first, and whole pairs.
        left.sort(key=lambda task: (args.study.index(task.study), task.seed))
    epochs = sum(task.epochs for task in left)
    print(f"{len(tasks)} runs, {len(tasks) - len(left)} done; {len(left)} to do, {epochs} epochs")
    if args.dry_run:
        for task in left:
            print("  ", *task.key, f"{task.epochs} epochs")
        return 0
    if not left:
        return 0
    begun, finished, trained = time.perf_counter(), 0, 0
    faults: collections.Counter[str] = collections.Counter()
    service = multi_process_service() if args.mps else contextlib.nullcontext()
    with service, contextlib.closing(work_off(left, placement, args.budget)) as reports:
        for report in reports:
            spent = time.perf_counter() - begun
            if report.cells is None:
                assert report.fault is not None
                faults[report.fault.strip().rpartition("\n")[2]] += 1
                what = "a worker" if report.task is None else " ".join(report.task.key)
                print(
                    f"{spent:6.0f} s  {what} failed:\n{report.fault}", file=sys.stderr, flush=True
                )
                continue
            finished, trained = finished + 1, trained + int(report.cells["epochs"])
            cells = report.cells
            rows.append(files[cells["study"]], cells)
            print(
                f"{spent:6.0f} s  {finished}/{len(left)}  {cells['study']} {cells['arm']} "
                f"width {cells['width']} seed {cells['seed']}: test error "
                f"{float(cells['test_error']):.3f} %, {cells['parameters']} parameters, "
                f"{float(cells['seconds']):.1f} s",
                flush=True,
            )
    spent = time.perf_counter() - begun
    if trained:
        each = spent * len(placement.devices) / trained
        print(f"{trained} epochs in {spent:.0f} s: {each:.3g} s of a device an epoch")
    missing = len(left) - finished
    if missing:
        failed = faults.total()
        print(f"{missing} runs are missing ({failed} failed); the same command does them")
        for fault, times in faults.most_common():
            print(f"  {times} x {fault}")
    return 1 if missing else 0


def tasks_of(name: str, args: argparse.Namespace) -> list[Task]:
    """Return the runs that the options ask of a study, whether or not they are done.

    Raises:
        UsageError: if an option cannot be honoured.
    """
    if name not in STUDIES:
        raise UsageError(f"no study {name!r}; there are {', '.join(STUDIES)}")
    study = STUDIES[name]
    variants = _variants(args)
    names = arm_names(args.arms) if args.arms else list(study.arms)
    arms = {
        arm.name: arm
        for settings in variants
        for arm in (arm_named(each, study.selections, settings) for each in names)
    }
    widths = _widths(args.widths, study)
    lengths = {
        key: getattr(args, key) or getattr(study, key)
        for key in ("neuron_epochs", "dendrite_epochs", "dendrites")
    }
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    tasks = [
        Task(name, arm, width, seed, **lengths)
        for seed in seeds
        for width in widths
        for arm in arms.values()
    ]
    for task in tasks:
        if task.arm.mode is not None:
            # A wrong value is to be found now, and not by every run.
            task.arm.config(task.include, study.config, task.seed)
            task.arm.tracker_settings(task.phase_epochs, task.dendrite_epochs)
            assert task.arm.folds
            assert task.arm.trial
    return tasks


def _variants(args: argparse.Namespace) -> list[dict[str, object]]:
    """Return the settings of each variant: `--set`, and on top of it each value of `--ablate`."""
    base = dict(setting(text) for text in args.settings)
    if not args.ablate:
        return [base]
    variants = []
    for text in args.ablate:
        key, _, values = text.partition("=")
        variants += [base | dict([setting(f"{key}={value}")]) for value in values.split("|")]
    return variants


def _widths(text: str | None, study: Study) -> tuple[float, ...]:
    if text is None:
        return study.widths
    try:
        widths = tuple(float(width) for width in text.split(","))
    except ValueError as error:
        raise UsageError(f"--widths must be numbers such as 1.0,0.25, got {text!r}") from error
    if not all(0 < width < 100 for width in widths):
        raise UsageError(f"--widths must be between 0 and 100, got {text!r}")
    return widths


def _placement(args: argparse.Namespace) -> Placement:
    devices = tuple(args.devices.split(","))
    for name in devices:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise UsageError(f"--devices: {name!r} is no device, such as cpu or cuda:0") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(
                f"--devices: {name} is not there; torch sees {torch.cuda.device_count()} CUDA "
                "devices"
            )
    return Placement(
        devices,
        args.jobs,
        args.lanes,
        args.steps_per_graph,
        args.data_dir,
        args.revision,
        not args.torch_optimizers,
    )


def _cost(task: Task) -> float:
    """Guess what a run costs: the longest begin first, so that none is waited for at the end."""
    study = task.of
    grown = 1 + task.dendrites * (task.arm.mode is not None) + (task.arm.rival is not None)
    return task.epochs * grown * parameters_at(study.net, task.width) ** 0.5
