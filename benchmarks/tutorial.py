"""The PyTorch MNIST example with dendrites, in one process of its own, timed call by call.

    python -m benchmarks.tutorial CONTENDER OPTIONS.json RESULT.json

It is the script that `benchmarks.comparison` runs once per contender: the example's net, optimizer,
schedule and batches, and what each package wants around them. The scores that it hands in rise from
epoch to epoch whatever was learnt, so that all grow at the same epochs; the real validation pass
runs all the same. The working folder receives the files of the run.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import StepLR

import pbfx
from benchmarks.models import MnistNet
from pbfx.demo.data import Split, load_mnist

BATCH = 64
LR, GAMMA = 1.0, 0.7
# Contender: from the options to the adapter that runs it.
PLAIN, NATIVE, PERFORATED, COMPAT, INCUMBENT = (
    *("plain", "pbfx", "pbfx perforated", "pbfx.compat", "perforatedai"),
)


class Run(Protocol):
    """A model in training under one package."""

    model: nn.Module
    optimizer: optim.Optimizer

    def score(self, value: float) -> None:
        """Hand in the validation score of an epoch."""
        ...

    def dendrites(self) -> int:
        """Return how many dendrites each neuron has."""
        ...


class PlainRun:
    """The example as it is."""

    def __init__(self, net: nn.Module) -> None:
        self.model = net
        self.optimizer = optim.Adadelta(net.parameters(), lr=LR)
        self._scheduler = StepLR(self.optimizer, step_size=1, gamma=GAMMA)

    def score(self, value: float) -> None:
        self._scheduler.step()

    def dendrites(self) -> int:
        return 0


class NativeRun:
    """pbfx as its README says, with the files of a run, growing every `phase` epochs."""

    def __init__(self, net: nn.Module, options: dict[str, Any], learning: Any) -> None:
        # One epoch per dendrite phase: it is not what is compared, and its own contender.
        policy = pbfx.Interval(options["phase"], 1)
        self.model = pbfx.transform(net, pbfx.Config(learning=learning, activation="sigmoid"))
        self.optimizer = optim.Adadelta(self.model.parameters(), lr=LR)
        scheduler = StepLR(self.optimizer, step_size=1, gamma=GAMMA)
        self._tracker = pbfx.Tracker(
            self.model,
            self.optimizer,
            scheduler,
            policy=policy,
            max_dendrites=options["dendrites"] + 1,
            directory="pbfx",
        )

    def score(self, value: float) -> None:
        self._tracker.step(value)

    def dendrites(self) -> int:
        return self._tracker.dendrites

    @property
    def phase(self) -> str:
        return str(self._tracker.phase)


class DialectRun:
    """A script in the dialect of perforatedai 3.x, on the modules found under `package`."""

    def __init__(self, net: nn.Module, options: dict[str, Any], package: str) -> None:
        theirs = importlib.import_module(f"{package}.globals_perforatedai")
        tools = importlib.import_module(f"{package}.utils_perforatedai")
        settings = theirs.pc
        settings.set_testing_dendrite_capacity(False)
        settings.set_switch_mode(settings.DOING_FIXED_SWITCH)
        settings.set_fixed_switch_num(options["phase"])
        # Without these it stops to ask, or opens a terminal UI.
        settings.set_unwrapped_modules_confirmed(True)
        settings.set_weight_decay_accepted(True)
        settings.set_configuration_confirmed(True)
        settings.set_silent(True)
        # Its search for the best rate throws epochs away, and the others do not search.
        settings.set_find_best_lr(False)
        self._theirs = theirs
        self.model = tools.perforate_model(net, save_name="PAI", maximizing_score=True)
        theirs.pai_tracker.set_optimizer(optim.Adadelta)
        theirs.pai_tracker.set_scheduler(StepLR)
        self._set_up()

    def _set_up(self) -> None:
        self.optimizer, _ = self._theirs.pai_tracker.setup_optimizer(
            self.model,
            {"params": self.model.parameters(), "lr": LR},
            {"step_size": 1, "gamma": GAMMA},
        )

    def score(self, value: float) -> None:
        tracker = self._theirs.pai_tracker
        self.model, restructured, _ = tracker.add_validation_score(value, self.model)
        if restructured:
            self._set_up()

    def dendrites(self) -> int:
        keys = self.model.state_dict()
        stacked = [t.shape[0] for name, t in keys.items() if name.endswith("dendrites.to_soma")]
        layers = {k.split(".layers.")[1].split(".")[0] for k in keys if ".layers." in k}
        return max(stacked, default=len(layers))


def start(contender: str, net: nn.Module, options: dict[str, Any]) -> Run:
    """Return the run of `contender`."""
    makers: dict[str, Callable[[], Run]] = {
        PLAIN: lambda: PlainRun(net),
        NATIVE: lambda: NativeRun(net, options, "gradient"),
        PERFORATED: lambda: NativeRun(net, options, "perforated"),
        COMPAT: lambda: DialectRun(net, options, "pbfx.compat"),
        INCUMBENT: lambda: DialectRun(net, options, "perforatedai"),
    }
    return makers[contender]()


def measure(contender: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train, and return times per epoch, parameters, and the files that were left."""
    torch.set_num_threads(options["threads"])
    torch.manual_seed(options["seed"])
    digits = load_mnist(options["data_dir"])
    train, validation = (
        Split(split.images[:count], split.labels[:count])
        for split, count in (
            (digits.train, options["train"]),
            (digits.validation, options["validation"]),
        )
    )
    net = MnistNet(options["width"])
    written = _written()
    run = start(contender, net, options)
    parameters = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
    epochs, epoch = [], 0
    while run.dendrites() <= options["dendrites"]:
        row: dict[str, Any] = {"dendrites": run.dendrites()}
        if getattr(run, "phase", "neuron") != "neuron":
            row["dendrites"] = None
        with _timed(row, "train"):
            _train(run, train)
        with _timed(row, "validate"):
            _validate(run.model, validation)
        before = run.dendrites()
        epoch += 1
        with _timed(row, "call"):
            run.score(float(epoch))
        row["grew"] = run.dendrites() > before
        epochs.append(row)
        if contender == PLAIN and epoch == 2 * options["phase"]:
            break
        if epoch > 100:
            raise RuntimeError(f"{contender}: {run.dendrites()} dendrites after {epoch} epochs")
    files = [path for path in Path().rglob("*") if path.is_file()]
    return {
        "parameters": parameters,
        "epochs": epochs,
        "files": len(files),
        "left_mb": sum(path.stat().st_size for path in files) / 1e6,
        "written_mb": (_written() - written) / 1e6,
    }


def _train(run: Run, split: Split) -> None:
    run.model.train()
    for images, labels in _batches(split, BATCH):
        run.optimizer.zero_grad()
        F.nll_loss(run.model(images), labels).backward()
        run.optimizer.step()


@torch.no_grad()
def _validate(model: nn.Module, split: Split) -> float:
    model.eval()
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in _batches(split, 1000))
    return right / len(split)


def _batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(split.images.split(size), split.labels.split(size), strict=True)


@contextlib.contextmanager
def _timed(row: dict[str, Any], name: str) -> Iterator[None]:
    """Note the seconds of the body, by the wall clock and of this process's processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    row[name], row[f"{name}_cpu"] = time.perf_counter() - wall, time.process_time() - cpu


def _written() -> int:
    """Return how many bytes this process has handed to `write`, files being rewritten included."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def main() -> None:
    contender, options, result = sys.argv[1:]
    found = measure(contender, json.loads(Path(options).read_text(encoding="utf-8")))
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
