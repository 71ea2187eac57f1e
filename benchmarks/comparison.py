"""pbfx against `perforatedai`: the PyTorch MNIST example with dendrites, side by side, on a CPU.

Each contender trains in a process of its own (`benchmarks.tutorial`), in an empty folder that gets
its files: the same net, seed, data, batches, optimizer and schedule, and the same scores handed in,
so that all grow at the same epochs. Contenders take turns for as many rounds as asked. Times of a
round's middle epoch; of a contender, the median over rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.benchmark import Benchmark, Case
from benchmarks.environment import ROOT
from benchmarks.errors import GateError, UsageError
from benchmarks.options import count, natural, positive
from benchmarks.table import milliseconds
from benchmarks.tutorial import COMPAT, INCUMBENT, NATIVE, PERFORATED, PLAIN

COLUMNS = (
    *("contender", "width", "train_images", "validation_images", "phase_epochs", "rounds"),
    *("dendrites", "epoch_s", "epoch_cpu_s", "validation_s", "call_s", "call_cpu_s"),
    *("growing_call_s", "optimizer_parameters", "files", "left_mb", "written_mb"),
)
CONTENDERS = (PLAIN, NATIVE, PERFORATED, COMPAT, INCUMBENT)
# Per round and contender; far more than a minute means that something waits for a person.
_TIMEOUT = 1800
_NEEDS = {COMPAT: "pbfx.compat.globals_perforatedai", INCUMBENT: INCUMBENT}


def run(args: argparse.Namespace) -> Iterator[Case]:
    """Let all contenders that are installed train in turns, then yield one table.

    Raises:
        UsageError: if the benchmark is asked for a GPU, or has no data.
        GateError: if a contender fails, or they do not grow at the same epochs.
    """
    if args.device != "cpu" or args.dtype != "float32" or args.compile:
        raise UsageError("incumbent compares eager float32 training on a CPU")
    if not args.data_dir.is_dir():
        raise UsageError(f"--data-dir {args.data_dir}: no such folder; it holds MNIST's idx files")
    contenders = []
    for contender in CONTENDERS:
        if contender in _NEEDS and not _installed(_NEEDS[contender]):
            print(f"{contender}: skipped, not installed here")
        else:
            contenders.append(contender)
    options = {
        "threads": args.threads or torch.get_num_threads(),
        "seed": args.seed,
        "data_dir": str(args.data_dir.resolve()),
        "train": args.train,
        "validation": args.validation,
        "width": args.width,
        "phase": args.phase,
        "dendrites": args.dendrites,
    }
    runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in contenders}
    for turn in range(args.rounds):
        # Each round starts with the next one, so that nobody always follows the same neighbour.
        first = turn % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            runs[contender].append(_train(contender, options))
    _check(runs)
    yield _case(args, runs)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _train(contender: str, options: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        work, given, result = Path(folder, "run"), Path(folder, "options"), Path(folder, "result")
        work.mkdir()
        given.write_text(json.dumps(options), encoding="utf-8")
        arguments = [contender, str(given), str(result)]
        try:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "benchmarks.tutorial", *arguments],
                cwd=work,
                env=os.environ | {"PYTHONPATH": _path(), "MPLBACKEND": "Agg"},
                # It opens debuggers: with no input they end, and are reported below.
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise GateError(f"{contender}: not done after {_TIMEOUT} s") from error
        # It also exits the process with 0 where something is wrong.
        if done.returncode or not result.is_file():
            tail = (done.stdout + done.stderr)[-1500:]
            raise GateError(f"{contender} ended with code {done.returncode}, no result:\n{tail}")
        return json.loads(result.read_text(encoding="utf-8"))


def _path() -> str:
    """Return a search path that finds this checkout first, then what this process finds."""
    return os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])


def _check(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Compare at which epochs they grew; dendrite phases come in between and are left out."""

    def growth(found: dict[str, Any]) -> list[int]:
        return [e["dendrites"] for e in found["epochs"] if e["dendrites"] is not None]

    grown = {name: [growth(f) for f in found] for name, found in runs.items() if name != PLAIN}
    reference = grown[NATIVE][0]
    for name, found in grown.items():
        for sequence in found:
            if sequence != reference:
                raise GateError(f"{name} grew at other epochs: {sequence}, {NATIVE} {reference}")


def _case(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> Case:
    rows, cells = [], []
    for contender, found in runs.items():
        for dendrites in range(args.dendrites + 1):
            if contender == PLAIN and dendrites:
                continue
            row = {
                "contender": contender,
                "width": args.width,
                "train_images": args.train,
                "validation_images": args.validation,
                "phase_epochs": args.phase,
                "rounds": args.rounds,
                "dendrites": dendrites,
                **_times(found, dendrites),
                "optimizer_parameters": found[0]["parameters"],
                "files": found[0]["files"],
                "left_mb": found[0]["left_mb"],
                "written_mb": statistics.median(f["written_mb"] for f in found),
            }
            rows.append(row)
            cells.append(_cells(row))
    title = (
        f"MNIST example, width {args.width:g}: {args.train} images an epoch, "
        f"{args.dendrites} dendrites, one every {args.phase} epochs"
    )
    headings = ("", "D", "s/epoch", "ms/call", "growing", "parameters", "files", "MB", "written")
    notes = [
        "s/epoch: training alone. ms/call: handing in a score, growing: one that grows.",
        "parameters: handed to the optimizer at 0 dendrites. Files and MB left; MB written.",
    ]
    return Case(title, headings, cells, notes, rows)


def _times(found: list[dict[str, Any]], dendrites: int) -> dict[str, float | None]:
    """Return medians over rounds of the medians over the epochs with so many dendrites."""

    def median(name: str, grew: bool | None = None) -> float | None:
        rounds = []
        for result in found:
            values = [
                epoch[name]
                for number, epoch in enumerate(result["epochs"])
                if epoch["dendrites"] == dendrites
                and (grew is None or epoch["grew"] is grew)
                # The very first epoch and call also import and allocate.
                and number
            ]
            if values:
                rounds.append(statistics.median(values))
        return statistics.median(rounds) if rounds else None

    return {
        "epoch_s": median("train"),
        "epoch_cpu_s": median("train_cpu"),
        "validation_s": median("validate"),
        "call_s": median("call", grew=False),
        "call_cpu_s": median("call_cpu", grew=False),
        "growing_call_s": median("call", grew=True),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def time(seconds: float | None) -> str:
        return "-" if seconds is None else milliseconds(seconds)

    return (
        row["contender"],
        str(row["dendrites"]),
        f"{row['epoch_s']:.2f}",
        time(row["call_s"]),
        time(row["growing_call_s"]),
        str(row["optimizer_parameters"]),
        str(row["files"]),
        f"{row['left_mb']:.0f}",
        f"{row['written_mb']:.0f}",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--data-dir", type=Path, required=True, metavar="DIR", help="holds MNIST's idx files"
    )
    parser.add_argument("--train", type=count, default=1280, help="images per epoch")
    parser.add_argument("--validation", type=count, default=500, help="images to validate on")
    parser.add_argument("--width", type=positive, default=1.0, help="factor on the net's layers")
    parser.add_argument("--phase", type=count, default=3, help="epochs from growth to growth")
    parser.add_argument("--dendrites", type=natural, default=2, help="to grow and to time")
    parser.add_argument("--rounds", type=count, default=3, help="turns of every contender")


BENCHMARK = Benchmark(
    "incumbent", "a training run with dendrites: pbfx, perforatedai", COLUMNS, add_arguments, run
)
