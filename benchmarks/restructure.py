"""What a change of structure costs: the transform, growing, the phases, and recompilation.

All times are from call to finished work, the device's share included, and are also given in
training steps of the plain model, measured in the same run: that is what a user waits for instead.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import SGD

import pbfx
from benchmarks.benchmark import Benchmark, Case
from benchmarks.compiling import counting
from benchmarks.gate import require, same_bits
from benchmarks.models import MODELS, Batch, fresh
from benchmarks.options import count, positive
from benchmarks.providers import sgd
from benchmarks.table import milliseconds
from benchmarks.timing import Quantiles, wall

NAMES = ("mnist", "resnet18", "resnet50", "bert")
COLUMNS = (
    *("model", "width", "batch_size", "parameters", "sites", "compiled", "event", "repeats"),
    *("ms_p20", "ms_p50", "ms_p80", "plain_steps", "share", "compilations"),
)
PLAIN = "plain training step"
IMPROVED, UNIMPROVED = "tracker.step, improved", "tracker.step, nothing new"
SNAPSHOT = "best-weights snapshot"
# The graphs of the second two are there already, and so are weights and an optimizer's state.
PHASES = (
    "enter the dendrite phase",
    "leave it, D = 0 to 1",
    "enter the dendrite phase again",
    "leave it, D = 1 to 2",
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A plain model and its data."""

    name: str
    plain: nn.Module
    batches: list[Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    device: torch.device

    def train(self, call: Callable[..., Tensor], optimizer: SGD) -> None:
        """Do one training step."""
        x, y = self.batches[0]
        optimizer.zero_grad()
        self.loss(call(x), y).backward()
        optimizer.step()

    def tracked(self, neuron_epochs: int) -> tuple[pbfx.PerforatedModule, SGD, pbfx.Tracker]:
        """Return a transformed copy with an optimizer that has state, and a tracker."""
        model = pbfx.transform(copy.deepcopy(self.plain))
        optimizer = sgd(model)
        policy = pbfx.Interval(neuron_epochs=neuron_epochs, dendrite_epochs=1)
        return model, optimizer, pbfx.Tracker(model, optimizer, policy=policy, max_dendrites=2)


@dataclasses.dataclass
class Measured:
    """Seconds of every repetition of an event, and the graphs that it compiled."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    compilations: int | None = None


def run(args: argparse.Namespace) -> Iterator[Case]:
    """Check that restructuring leaves outputs alone, then time it, model by model.

    Raises:
        GateError: if transform, grow or a phase changes an output.
    """
    device = torch.device(args.device)
    settings = [
        Setting(
            name,
            fresh(name, args.width, device, args.seed),
            MODELS[name].batches(args.batch_size, device, args.seed)[:1],
            MODELS[name].loss,
            device,
        )
        for name in args.models
    ]
    require([fault for setting in settings for fault in check(setting)])
    for setting in settings:
        events: dict[str, Measured] = {}
        for _ in range(args.repeats):
            for event, seconds in events_of(setting):
                events.setdefault(event, Measured()).seconds.append(seconds)
        if args.compile:
            events |= _compiled(setting, args.backend)
        yield _case(args, setting, events)


@torch.no_grad()
def check(setting: Setting) -> list[str]:
    """Return which restructurings change the output of a model that has learnt nothing yet."""
    x = setting.batches[0][0]
    wanted = setting.plain.eval()(x)
    model, _, tracker = setting.tracked(1)
    grown = pbfx.grow(pbfx.transform(copy.deepcopy(setting.plain)))
    outputs = {"transform": model.eval()(x), "grow": grown.eval()(x)}
    tracker.step(0.0)
    outputs["entering the dendrite phase"] = model.eval()(x)
    return [
        f"  {setting.name}: {verb} changes the output"
        for verb, out in outputs.items()
        if not same_bits(out, wanted)
    ]


def events_of(setting: Setting) -> Iterator[tuple[str, float]]:
    """Time every event once, each on a fresh model."""
    device = setting.device
    plain = copy.deepcopy(setting.plain).train()
    optimizer = sgd(plain)
    # The first step of a fresh model allocates.
    setting.train(plain, optimizer)
    yield PLAIN, wall(lambda: setting.train(plain, optimizer), device)

    yield "transform", wall(lambda: pbfx.transform(plain), device)
    model = pbfx.transform(copy.deepcopy(setting.plain))
    yield "grow, D = 0 to 1", wall(lambda: pbfx.grow(model), device)

    model, optimizer, tracker = setting.tracked(10**9)
    setting.train(model.train(), optimizer)
    # The first score ever is an improvement too, and pays for what later ones find ready.
    tracker.step(0.0)
    yield IMPROVED, wall(lambda: tracker.step(1.0), device)
    yield UNIMPROVED, wall(lambda: tracker.step(0.5), device)

    model, optimizer, tracker = setting.tracked(1)
    for event in PHASES:
        setting.train(model.train(), optimizer)
        yield event, wall(lambda: tracker.step(0.0), device)
    assert tracker.dendrites == 2
    assert tracker.phase is pbfx.Phase.NEURON


def _compiled(setting: Setting, backend: str) -> dict[str, Measured]:
    """Follow one compiled model through a growth: first calls, and graphs compiled."""
    events: dict[str, Measured] = {}
    with counting(backend) as (compile_, compiled):
        model, optimizer, tracker = setting.tracked(1)
        call = compile_(model.train())

        def time(event: str) -> None:
            before = compiled()
            seconds = wall(lambda: setting.train(call, optimizer), setting.device)
            events[event] = Measured([seconds], compiled() - before)

        time("first step, transformed")
        time("second step")
        assert tracker.step(0.0).phase is pbfx.Phase.DENDRITE
        time("first step, dendrite phase")
        time("second step, dendrite phase")
        assert tracker.step(0.0).dendrites == 1
        time("first step after growth")
        time("second step after growth")
    return events


def _case(args: argparse.Namespace, setting: Setting, events: dict[str, Measured]) -> Case:
    sites = len(pbfx.transform(setting.plain).perforation.sites)
    parameters = sum(p.numel() for p in setting.plain.parameters())
    step = Quantiles.of(events[PLAIN].seconds).p50
    improved, same = (events[event].seconds for event in (IMPROVED, UNIMPROVED))
    snapshots = [a - b for a, b in zip(improved, same, strict=True)]
    share = Quantiles.of([s / a for s, a in zip(snapshots, improved, strict=True)]).p50
    events = {**events, SNAPSHOT: Measured(snapshots)}
    cells, rows = [], []
    for event, measured in events.items():
        taken = Quantiles.of(measured.seconds)
        compilations = "-" if measured.compilations is None else str(measured.compilations)
        spread = f"{milliseconds(taken.p20)}-{milliseconds(taken.p80)}"
        cells.append(
            (event, milliseconds(taken.p50), spread, f"{taken.p50 / step:.2f}", compilations)
        )
        rows.append(
            {
                "model": setting.name,
                "width": args.width,
                "batch_size": args.batch_size,
                "parameters": parameters,
                "sites": sites,
                "compiled": args.backend if measured.compilations is not None else "",
                "event": event,
                "repeats": len(measured.seconds),
                "ms_p20": taken.p20 * 1e3,
                "ms_p50": taken.p50 * 1e3,
                "ms_p80": taken.p80 * 1e3,
                "plain_steps": taken.p50 / step,
                "share": share if event == SNAPSHOT else None,
                "compilations": measured.compilations,
            }
        )
    title = (
        f"{setting.name}, width {args.width:g}, batch {args.batch_size}: "
        f"{parameters:,} parameters, {sites} sites"
    )
    headings = ("event", "ms", "p20-p80", "plain steps", "compilations")
    notes = [f"the snapshot is {share:.0%} of an improved tracker.step that restructures nothing"]
    return Case(title, headings, cells, notes, rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--width", type=positive, default=1.0, help="scales all layers")
    parser.add_argument("--batch-size", type=count, default=8, help="(default 8)")
    parser.add_argument("--repeats", type=count, default=5, help="(default 5)")
    parser.add_argument(
        "--backend", choices=("inductor", "eager"), default="inductor", help="for --compile"
    )


BENCHMARK = Benchmark(
    "restructure", "cost of transform, growth, phases, recompiling", COLUMNS, add_arguments, run
)
