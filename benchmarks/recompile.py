"""What a restructure costs a compiled model: the call after it, compilations, and steps before it.

    eager                   what the tracker and `pbfx.grow` do by themselves, nothing compiled
    grown before            the grown model, compiled as a whole for the first time: what all are
                            judged by
    fresh compile           the first training step of the compiled model
    restructure             pbfx.grow, one more dendrite at every site
    first call after it     the training step that follows, which compiles what has changed

*pbfx, ops* is cut at sites like *pbfx, sites*, but each site stays the op, of which a compiler has
nothing to generate; its kernels are compiled when they are first launched, and counted with it.
*packed + Inductor* stands for the rival: it cannot grow, so its first call is that of a new model.
Caches on disk are there, as they are for a user, and empty when a way begins: what the first call
after a restructure finds in them this process has compiled for the model before it grew.

Each way is a table and rows of its own, written as soon as it is measured. With `--resume` the rows
in the file are taken for measured if they say the same model, mode, device and revision: a run that
was cut off goes on, and ways can be measured by one process each, "grown" first.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

import pbfx
from benchmarks import restructure
from benchmarks.benchmark import Benchmark, Case
from benchmarks.compiling import counting
from benchmarks.environment import environment
from benchmarks.errors import UsageError
from benchmarks.gate import output_fault, require
from benchmarks.models import MODELS, Batch, fresh
from benchmarks.options import count, natural, positive
from benchmarks.packed import packed_of
from benchmarks.providers import CONFIG, sgd
from benchmarks.records import as_text, read, results_path
from benchmarks.table import milliseconds
from benchmarks.timing import Quantiles, wall
from pbfx.backend import compile_graph
from pbfx.backend.regions import forget_regions
from pbfx.backend.settings import MODES

NAMES = ("mnist", "resnet50", "bert")
COLUMNS = (
    *("model", "width", "batch_size", "parameters", "sites", "provider", "mode", "dendrites"),
    *("event", "repeats", "ms_p20", "ms_p50", "ms_p80", "x_fresh", "compilations"),
)
PACKED, GROWN = "packed + inductor", "pbfx, grown before"
RESTRUCTURE, FIRST, FRESH = "restructure", "first call after it", "fresh compile"
BEFORE, AFTER = "steady step before", "steady step after"
# In words for the command line; the backend's are named with it in the table.
WAYS = ("eager", "grown", "inductor", "pbfx", "regional", "sites", "ops", "reserve", "packed")
# Of eager restructures, which vary more than compilations do.
_ROUNDS = 3
# A deep model adds up the roundings of its layers.
_DEPTH = 20.0


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compile: the name in the table, a backend, and what the model is made with."""

    name: str
    backend: Callable[..., Callable]
    config: pbfx.Config = CONFIG


@dataclasses.dataclass(frozen=True)
class Setting:
    """A plain model, one batch, and how many dendrites it has before it grows."""

    name: str
    plain: nn.Module
    batch: Batch
    loss: Callable[[Tensor, Tensor], Tensor]
    dendrites: int
    device: torch.device

    def grown(self, config: pbfx.Config, dendrites: int) -> nn.Module:
        model = pbfx.transform(copy.deepcopy(self.plain), config)
        return (pbfx.grow(model, dendrites) if dendrites else model).train()

    def step(self, call: Callable[..., Tensor], optimizer: SGD) -> None:
        x, y = self.batch
        optimizer.zero_grad()
        self.loss(call(x), y).backward()
        optimizer.step()


def ways(mode: str, compiler: str, reserve: int) -> list[Way]:
    """Return the ways to compile in this mode."""

    def backend(**options: object) -> Callable[..., Callable]:
        return functools.partial(
            compile_graph, options={"compiler": compiler, "mode": mode, **options}
        )

    found = [
        # What plain `torch.compile(model)` does with our op.
        Way("inductor", backend(strategy="kernel")),
        Way("pbfx", backend()),
        Way("pbfx, regional", backend(regional=True)),
        Way("pbfx, sites", backend(regional="sites")),
        Way("pbfx, ops", backend(regional="sites", strategy="kernel")),
        Way("pbfx, reserve", backend(), dataclasses.replace(CONFIG, reserve=reserve)),
    ]
    # CUDA graphs go with whole models only.
    apart = ("pbfx, regional", "pbfx, sites", "pbfx, ops")
    return [way for way in found if way.name not in apart or mode != "reduce-overhead"]


def run(args: argparse.Namespace) -> Iterator[Case]:
    """Grow each model while it is compiled, and time what the next calls cost.

    Raises:
        GateError: if the compiled model's output after a growth is not the eager one's.
    """
    device = torch.device(args.device)
    known = _rows_of(args)
    _warm_up(args, device)
    for name in args.models:
        model = MODELS[name]
        plain = fresh(name, args.width, device, args.seed)
        batch = model.batches(args.batch_size, device, args.seed)[0]
        setting = Setting(name, plain, batch, model.loss, args.dendrites, device)
        for mode in args.modes:
            yield from _cases(args, setting, mode, known)


@contextmanager
def _compiling(
    backend: Callable[..., Callable],
) -> Iterator[tuple[Callable[..., Callable], Callable[[], int]]]:
    """Give the body what `counting` does, and caches on disk that are empty."""
    import torch._inductor.config
    from torch._inductor.utils import fresh_inductor_cache

    forget_regions()
    with (
        fresh_inductor_cache(),
        counting(backend) as found,
        torch._inductor.config.patch(force_disable_caches=False),
    ):
        yield found


def _warm_up(args: argparse.Namespace, device: torch.device) -> None:
    """Compile something small: the first compilation of a process also starts the compilers."""
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads

    backend = functools.partial(compile_graph, options={"compiler": args.compiler})
    with _compiling(backend) as (compile_, _):
        compile_(nn.Linear(4, 4, device=device))(torch.ones(2, 4, device=device)).sum().backward()
    if args.compiler == "inductor" and get_compile_threads() > 1:
        # Until its workers are there, this process compiles kernels itself.
        AsyncCompile.wait_pool_ready()


def _eager(args: argparse.Namespace, setting: Setting) -> dict[str, _Event]:
    """Time the restructures by themselves; the first round is for the allocator."""
    alone = restructure.Setting(
        setting.name, setting.plain, [setting.batch], setting.loss, setting.device
    )
    events: dict[str, _Event] = {}
    for again in range(_ROUNDS + 1):
        for event, seconds in restructure.events_of(alone):
            if again:
                events.setdefault(event, _Event([])).seconds.append(seconds)
    return events


def _follow(args: argparse.Namespace, setting: Setting, way: Way) -> dict[str, _Event]:
    """Compile, grow, and compile again; return what was timed."""
    device = setting.device
    events: dict[str, _Event] = {}
    with _compiling(way.backend) as (compile_, compiled):
        model = setting.grown(way.config, setting.dendrites)
        optimizer, call = sgd(model), compile_(model)
        seconds = wall(lambda: setting.step(call, optimizer), device)
        events[FRESH] = _Event([seconds], compiled())
        events[BEFORE] = _steady(args, setting, call, optimizer)
        events[RESTRUCTURE] = _Event([wall(lambda: pbfx.grow(model), device)])
        optimizer, before = sgd(model), compiled()
        seconds = wall(lambda: setting.step(call, optimizer), device)
        events[FIRST] = _Event([seconds], compiled() - before)
        events[AFTER] = _steady(args, setting, call, optimizer)
        model.eval()
        with torch.no_grad():
            found, wanted = call(setting.batch[0]), model(setting.batch[0])
        fault = output_fault(found, wanted, args.dtype, _DEPTH)
        require([f"  {setting.name}, {way.name}: {fault}"] if fault else [])
    return events


def _fresh(
    args: argparse.Namespace, setting: Setting, mode: str, build: Callable[[], nn.Module]
) -> dict[str, _Event]:
    """Time a model with as many dendrites as the others have after they have grown."""
    backend = functools.partial(compile_graph, options={"compiler": args.compiler, "mode": mode})
    with _compiling(backend) as (compile_, compiled):
        model = build()
        optimizer, call = sgd(model), compile_(model)
        seconds = wall(lambda: setting.step(call, optimizer), setting.device)
        events = {FRESH: _Event([seconds], compiled())}
        events[AFTER] = _steady(args, setting, call, optimizer)
    return events


@dataclasses.dataclass
class _Event:
    """Seconds of every repetition, and the graphs that it compiled."""

    seconds: list[float]
    compilations: int | None = None


def _steady(
    args: argparse.Namespace, setting: Setting, call: Callable[..., Tensor], optimizer: SGD
) -> _Event:
    # The first calls compile, and record CUDA graphs.
    for _ in range(3):
        setting.step(call, optimizer)
    return _Event(
        [wall(lambda: setting.step(call, optimizer), setting.device) for _ in range(args.repeats)]
    )


def _cases(
    args: argparse.Namespace, setting: Setting, mode: str, known: list[dict[str, str]]
) -> Iterator[Case]:
    """Yield a case for each way, the one that all are judged by first."""
    grown = setting.dendrites + 1
    follow = {way.name: way for way in ways(mode, args.compiler, grown)}
    build = {
        GROWN: lambda: setting.grown(CONFIG, grown),
        PACKED: lambda: packed_of(copy.deepcopy(setting.plain), grown).train(),
    }
    parameters = sum(p.numel() for p in setting.plain.parameters())
    sites = len(pbfx.explain(pbfx.transform(setting.plain)).sites)
    shared = {
        "model": setting.name,
        "width": args.width,
        "batch_size": args.batch_size,
        "parameters": parameters,
        "sites": sites,
        "mode": mode,
        "dendrites": setting.dendrites,
    }
    mine = [row for row in known if all(row[key] == as_text(shared)[key] for key in shared)]
    done = {row["provider"] for row in mine}
    whole = next(
        (
            float(row["ms_p50"]) / 1e3
            for row in mine
            if (row["provider"], row["event"]) == (GROWN, FRESH)
        ),
        None,
    )
    words = {"eager": "eager", "grown": GROWN, "packed": PACKED}
    for word in WAYS:
        name = words.get(word, f"pbfx, {word}" if f"pbfx, {word}" in follow else word)
        if word not in args.ways or name in done:
            continue
        if name == "eager":
            events = _eager(args, setting)
        elif name in build:
            events = _fresh(args, setting, mode, build[name])
        elif name in follow:
            events = _follow(args, setting, follow[name])
        else:
            continue
        if name == GROWN:
            whole = events[FRESH].seconds[0]
        yield _case(shared | {"provider": name}, events, whole)


def _case(shared: dict[str, Any], events: dict[str, _Event], whole: float | None) -> Case:
    cells, rows = [], []
    for event, measured in events.items():
        taken = Quantiles.of(measured.seconds)
        compilations = "-" if measured.compilations is None else str(measured.compilations)
        share = None if whole is None else taken.p50 / whole
        shown = "-" if share is None else f"{share:.2f}"
        cells.append((event, milliseconds(taken.p50), shown, compilations))
        rows.append(
            shared
            | {
                "event": event,
                "repeats": len(measured.seconds),
                "ms_p20": taken.p20 * 1e3,
                "ms_p50": taken.p50 * 1e3,
                "ms_p80": taken.p80 * 1e3,
                "x_fresh": share,
                "compilations": measured.compilations,
            }
        )
    title = (
        f"{shared['provider']}: {shared['model']}, width {shared['width']:g}, batch "
        f"{shared['batch_size']}, mode {shared['mode']}: D = {shared['dendrites']} to "
        f"{shared['dendrites'] + 1} at {shared['sites']} sites"
    )
    notes = ["x fresh: of the fresh compile of the grown model as a whole"]
    return Case(title, ("event", "ms", "x fresh", "compilations"), cells, notes, rows)


def _rows_of(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return the rows that a run with `--resume` need not measure again.

    Raises:
        UsageError: if the options name no file to resume from.
    """
    if not args.resume:
        return []
    path = results_path("recompile", args)
    if path is None:
        raise UsageError("--resume goes on with a file of rows: name it with --out, or --save")
    device = torch.device(args.device)
    here = as_text(environment("recompile", device, args.dtype, args.seed, args.revision))
    fixed = [name for name in here if name != "utc"]
    return [row for row in read(path) if all(row[name] == here[name] for name in fixed)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--width", type=positive, default=1.0, help="scales all layers")
    parser.add_argument("--batch-size", type=count, default=8, help="(default 8)")
    parser.add_argument("--dendrites", type=natural, default=2, help="before it grows (default 2)")
    parser.add_argument("--repeats", type=count, default=10, help="of steady steps (default 10)")
    parser.add_argument(
        "--resume", action="store_true", help="skip the ways whose rows the file has already"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["default"])
    parser.add_argument(
        "--compiler", choices=("inductor", "aot_eager", "eager"), default="inductor"
    )


BENCHMARK = Benchmark(
    "recompile", "what a growth costs a compiled model", COLUMNS, add_arguments, run
)
