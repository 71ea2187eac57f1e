"""A step of the dendrite phase against the plain model's: eager, and as a CUDA graph.

A *pass* is zero_grad, forward, loss and backward, in which candidates learn; a *step* adds the
user's optimizer. The plain model trains as usual; in the dendrite phase it is frozen, and
candidates learn from its errors. A graph holds one pass or step with a batch that stays where it
is, and replays it: what is left is what the kernels cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import step
from benchmarks.benchmark import Benchmark, Case
from benchmarks.compiling import compiler
from benchmarks.gate import require
from benchmarks.models import MODELS, Batch, Model, fresh
from benchmarks.options import count, natural, positive
from benchmarks.providers import (
    CONFIG,
    PROVIDERS,
    Provider,
    candidates_provider,
    dendrite_state,
)
from benchmarks.table import milliseconds, multiple
from benchmarks.timing import Quantiles, interleave, ratios
from pbfx.candidates import Candidates

NAMES = ("mnist", "mlp", "wide")
PARTS = ("pass", "step")
COLUMNS = (
    *("model", "width", "batch_size", "dendrites", "candidates", "compiled", "execution"),
    *("provider", "part", "ms_p20", "ms_p50", "ms_p80", "x_plain_p20", "x_plain_p50"),
    *("x_plain_p80", "x_floor", "rounds"),
)
PLAIN = PROVIDERS[0]
# Before a capture, on the stream of the capture: kernels are loaded, and buffers exist.
_WARM = CONFIG.priming_batches + CONFIG.measure_every


@dataclasses.dataclass
class Trainer:
    """A model and what a training loop does with it."""

    model: nn.Module
    call: Callable[..., Tensor]
    optimizer: Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: list[Batch]
    device: torch.device
    bfloat16: bool
    _turn: int = 0
    _graph: torch.cuda.CUDAGraph | None = None

    def run(self, part: str) -> None:
        """Do one pass or step with the next batch."""
        self._turn += 1
        x, y = self.batches[self._turn % len(self.batches)]
        self.optimizer.zero_grad()
        # Autocast is entered per step, as in a user's loop, but the runner's lies around it, and
        # only the outermost one would forget the weights that the last step has changed.
        torch.clear_autocast_cache()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = self.loss(self.call(x), y)
        loss.backward()
        if part == "step":
            self.optimizer.step()

    def captured(self, part: str) -> Callable[[], None]:
        """Return the replay of a graph of one pass or step."""
        self.batches = self.batches[:1]
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(_WARM):
                self.run(part)
        torch.cuda.current_stream(self.device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.run(part)
        # Bound to this trainer: the graph reads and writes what it owns.
        return self._replay

    def _replay(self) -> None:
        assert self._graph is not None
        self._graph.replay()


def run(args: argparse.Namespace) -> Iterator[Case]:
    """Check all models, then time them one by one.

    Raises:
        GateError: if the dendrite phase changes an output, or a candidate does not learn.
    """
    device = torch.device(args.device)
    providers = (PLAIN, candidates_provider(args.candidates))
    settings = [_setting(args, device, name) for name in args.models]
    require([fault for setting in settings for fault in step.check(setting, list(providers))])
    with torch.autocast(device.type, enabled=False), compiler(args.compile) as compile_:
        for setting in settings:
            yield _measure(args, setting, providers, compile_)


def _setting(args: argparse.Namespace, device: torch.device, name: str) -> step.Setting:
    plain = fresh(name, args.width, device, args.seed)
    state = dendrite_state(plain, args.dendrites, args.seed)
    model: Model = MODELS[name]
    batches = model.batches(args.batch_size, device, args.seed)
    return step.Setting(name, model, plain, state, args.dendrites, batches, args.dtype, device)


def _measure(
    args: argparse.Namespace,
    setting: step.Setting,
    providers: tuple[Provider, ...],
    compile_: Callable[..., Callable] | None,
) -> Case:
    executions = ("eager", "graph") if setting.device.type == "cuda" else ("eager",)
    rows, cells = [], []
    for execution in executions:
        calls: dict[str, Callable[[], object]] = {}
        models: dict[str, nn.Module] = {}
        for provider in providers:
            for part in PARTS:
                trainer = _trainer(setting, provider, compile_)
                key = f"{provider.name}/{part}"
                models[key] = trainer.model
                if execution == "graph":
                    calls[key] = trainer.captured(part)
                else:
                    calls[key] = functools.partial(trainer.run, part)
                    for _ in range(provider.warmup):
                        trainer.run(part)
        _require_learning(calls, models, providers[1])
        cycles = {f"{p.name}/{part}": p.cycle for p in providers for part in PARTS}
        times = interleave(
            calls, setting.device, args.seconds / len(executions), cycles, lambda _: None
        )
        for provider in providers:
            for part in PARTS:
                mine, plain = times[f"{provider.name}/{part}"], times[f"plain/{part}"]
                floor = provider.train_floor(setting.dendrites)
                own, share = Quantiles.of(mine), ratios(mine, plain)
                spread = f"{multiple(share.p20)}-{multiple(share.p80)}"
                cells.append(
                    (
                        f"{execution} {part}, {provider.name}",
                        milliseconds(own.p50),
                        f"{multiple(share.p50)}x",
                        spread,
                        multiple(floor),
                    )
                )
                rows.append(
                    {
                        "model": setting.name,
                        "width": args.width,
                        "batch_size": args.batch_size,
                        "dendrites": setting.dendrites,
                        "candidates": args.candidates,
                        "compiled": args.compile,
                        "execution": execution,
                        "provider": provider.name,
                        "part": part,
                        "ms_p20": own.p20 * 1e3,
                        "ms_p50": own.p50 * 1e3,
                        "ms_p80": own.p80 * 1e3,
                        "x_plain_p20": share.p20,
                        "x_plain_p50": share.p50,
                        "x_plain_p80": share.p80,
                        "x_floor": floor,
                        "rounds": len(mine),
                    }
                )
    title = (
        f"{setting.name}, width {args.width:g}, batch {args.batch_size}, D = {setting.dendrites}, "
        f"{args.candidates} per pool{', compiled' if args.compile else ''}"
    )
    return Case(title, ("x plain", "ms", "", "p20-p80", "floor"), cells, [], rows)


def _trainer(
    setting: step.Setting, provider: Provider, compile_: Callable[..., Callable] | None
) -> Trainer:
    model, optimizer = setting.build(provider)
    model.train()
    return Trainer(
        model,
        compile_(model) if compile_ else model,
        optimizer,
        setting.model.loss,
        setting.batches,
        setting.device,
        setting.dtype == "bfloat16",
    )


def _require_learning(
    calls: dict[str, Callable[[], object]], models: dict[str, nn.Module], provider: Provider
) -> None:
    """Stop the benchmark if a cycle of what is to be timed leaves a pool as it was."""
    faults = []
    for part in PARTS:
        key = f"{provider.name}/{part}"
        pools = {n: m for n, m in models[key].named_modules() if isinstance(m, Candidates)}
        before = {name: pool.weight.detach().clone() for name, pool in pools.items()}
        for _ in range(provider.cycle):
            calls[key]()
        faults += [
            f"  {key}: the candidates at {name} do not learn"
            for name, pool in pools.items()
            if torch.equal(pool.weight, before[name])
        ]
    require(faults)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["mnist", "mlp"])
    parser.add_argument("--dendrites", type=natural, default=0, metavar="D", help="(default 0)")
    parser.add_argument("--candidates", type=count, default=1, metavar="C", help="(default 1)")
    parser.add_argument("--width", type=positive, default=1.0, help="scales hidden layers")
    parser.add_argument("--batch-size", type=count, default=64, help="(default 64)")
    parser.add_argument("--seconds", type=positive, default=4.0, help="per model (default 4)")


BENCHMARK = Benchmark(
    "dendrite-step",
    "a step of the dendrite phase, eager and as a CUDA graph",
    COLUMNS,
    add_arguments,
    run,
)
