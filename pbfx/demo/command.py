"""`pbfx demo`: its options, and the order in which things happen.

Imports nothing heavy until it runs, so that `pbfx --help` need not wait.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pbfx.demo.settings import DEFAULTS
from pbfx.wording import counted

if TYPE_CHECKING:
    import torch

    from pbfx.demo.data import Digits

SUMMARY = "train plain, sham and dendritic nets on digits, and compare them over paired seeds"

DESCRIPTION = """\
Trains the same small net three ways, over several paired seeds:

  plain      as it is, for as many epochs as the others, on one long schedule
  sham       with the phases and restarts of the dendritic arm, its dendrites silent
  dendritic  growing dendrites by perforated backpropagation

and says with a 95 % interval whether dendrites paid. The epoch is chosen on a
validation split; the test split is read once a run. Writes report.json,
history.csv and plot.png.
"""

# What is imported, and what is installed to have it.
_PACKAGES = {
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "tqdm": "tqdm",
    "rich": "rich",
    "matplotlib": "matplotlib",
}

_OVERRIDES = ("seeds", "neuron_epochs", "dendrite_epochs", "dendrites", "width", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to `parser`."""
    number = whole(1)

    def default(name: str) -> str:
        return ", ".join(f"{data} {getattr(DEFAULTS[data], name):g}" for data in DEFAULTS)

    parser.add_argument(
        "--data", choices=("digits", "mnist"), default="digits", help="what to learn (digits)"
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="folder with MNIST's four idx files, gzipped or not"
    )
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, cuda:1 (cpu)")
    parser.add_argument(
        "--out", default="pbfx-demo", metavar="DIR", help="where results go (pbfx-demo)"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="first seed (0)")
    for name, kind, text in (
        ("seeds", number, "paired runs of each arm"),
        ("neuron_epochs", number, "epochs of a neuron phase"),
        ("dendrite_epochs", number, "epochs of a dendrite phase"),
        ("dendrites", number, "dendrites to grow on each neuron"),
        ("width", positive, "factor on the net's channels"),
        ("batch_size", number, "images a step"),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="X" if kind is positive else "N",
            help=f"{text} ({default(name)})",
        )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no opening line")


def missing_packages() -> list[str]:
    """Return what the demo needs and this Python lacks, by the names to install."""
    return [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]


def run(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Run the demo; return the exit status. Nothing is written before everything is done."""
    lacking = missing_packages()
    if lacking:
        print(f"pbfx demo needs {', '.join(lacking)}: pip install 'pbfx[demo]'", file=sys.stderr)
        return 2

    from pbfx.demo.arms import ARMS
    from pbfx.demo.plot import plot_png
    from pbfx.demo.progress import Progress
    from pbfx.demo.recipes import RECIPES
    from pbfx.demo.report import check_folder, history_csv, report_json, write_atomically
    from pbfx.demo.study import run_study
    from pbfx.demo.summary import candidate_notes, summarise
    from pbfx.demo.table import print_summary

    started = time.perf_counter()
    out = Path(args.out)
    check_folder(out)
    device = choose_device(args.device)
    data = load(args.data, args.data_dir)
    given = {name: getattr(args, name) for name in _OVERRIDES if getattr(args, name) is not None}
    settings = replace(DEFAULTS[args.data], first_seed=args.seed, **given)
    sizes = {name: len(getattr(data, name)) for name in ("train", "validation", "test")}
    if not args.quiet:
        print(
            f"{data.name}: {sizes['train']:,} images train, {sizes['validation']:,} validate, "
            f"{sizes['test']:,} test.\n"
            f"{len(ARMS)} arms x {counted(settings.seeds, 'seed')} x "
            f"{counted(settings.epochs, 'epoch')} on {device}, "
            f"growing {counted(settings.dendrites, 'dendrite')} per neuron.",
            flush=True,
        )
    with Progress(
        runs=len(ARMS) * settings.seeds, epochs=settings.epochs, quiet=args.quiet
    ) as progress:
        runs = run_study(data, RECIPES[args.data], settings, device=device, on_epoch=progress)
    summary = summarise(runs)
    title = f"{data.name}: mean of {settings.seeds} seed{'s' * (settings.seeds > 1)}"
    files = {
        "report.json": report_json(
            runs,
            summary,
            command=command,
            arguments=asdict(settings) | {"data": args.data, "device": args.device},
            data={"name": data.name} | sizes,
            device=device,
        ),
        "history.csv": history_csv(runs),
        "plot.png": plot_png(runs, title=f"{title}, faint lines are single runs"),
    }
    for name, content in files.items():
        write_atomically(out / name, content)
    print()
    print_summary(
        summary, sys.stdout, title=f"{title}, with 95 % intervals", notes=candidate_notes(runs)
    )
    print(f"\n{', '.join(files)} are in {out} ({time.perf_counter() - started:.0f} s in all)")
    return 0


def load(name: str, directory: str | None) -> Digits:
    """Return the data set called `name`.

    Raises:
        DemoError: MNIST is asked for without a folder, or the folder lacks it.
    """
    from pbfx.demo.data import load_digits, load_mnist
    from pbfx.demo.errors import DemoError

    if name == "digits":
        return load_digits()
    if directory is None:
        raise DemoError("--data mnist needs --data-dir DIR, the folder with MNIST's idx files.")
    return load_mnist(directory)


def choose_device(name: str) -> torch.device:
    """Return the device called `name`, if this torch has it.

    Raises:
        DemoError: there is no such device.
    """
    import torch

    from pbfx.demo.errors import DemoError

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DemoError(f"--device {name}: torch knows no such device; try cpu or cuda.") from error
    try:
        int(torch.zeros((), device=device))
    # What torch raises depends on the device type and on how torch was built.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise DemoError(f"--device {name} cannot be used: {first}. Try --device cpu.") from error
    return device


def whole(least: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers from `least` up."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"a whole number from {least} up, got {text!r}")
        return value

    return parse


def positive(text: str) -> float:
    """Parse a finite number above zero for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above zero, got {text!r}")
    return value
