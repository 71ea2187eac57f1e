"""Training steps of whole models with dendrites, eager and compiled, as multiples of the plain one.

A step is zero_grad, forward, loss, backward and optimizer step; compiled providers are compared
with the compiled plain model. Where dendrites join after a norm (ResNets), pbfx and the packed
rival compute different networks of the same cost, so each provider is checked against itself: what
is timed compiled is compared with the same model run eagerly. Elsewhere pbfx is compared with the
rival too.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pbfx
from benchmarks.benchmark import Benchmark, Case
from benchmarks.compiling import counting
from benchmarks.gate import output_fault, require
from benchmarks.memory import peak_mib
from benchmarks.models import MODELS, Batch, fresh
from benchmarks.options import count, natural, positive
from benchmarks.packed import copy_weights, packed_of
from benchmarks.providers import CONFIG, dendrite_state, sgd
from benchmarks.table import milliseconds, multiple
from benchmarks.timing import Quantiles, interleave, ratios

NAMES = ("mnist", "resnet18", "resnet50", "vit", "bert", "gpt2")
COLUMNS = (
    *("model", "width", "batch_size", "dendrites", "provider", "ms_p20", "ms_p50", "ms_p80"),
    *("x_plain_p50", "x_floor", "x_packed", "rounds", "peak_mib"),
)
# Compiled ones after their eager form, which they are checked against.
PLAIN, PBFX, PACKED = "plain", "pbfx", "packed"
# Outputs have been through all layers of a model: this much more than the table of one op.
_DEPTH = 5.0


@dataclasses.dataclass
class Runner:
    """One model under one way of running it."""

    model: nn.Module
    call: Callable[..., Tensor]
    optimizer: Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: list[Batch]
    turn: int = 0

    def step(self) -> None:
        """Do one training step."""
        self.turn += 1
        x, y = self.batches[self.turn % len(self.batches)]
        self.optimizer.zero_grad()
        self.loss(self.call(x), y).backward()
        self.optimizer.step()

    @torch.no_grad()
    def output(self) -> Tensor:
        """Return what the model says to the first batch, in eval mode."""
        self.model.eval()
        out = self.call(self.batches[0][0]).detach()
        self.model.train()
        return out


def run(args: argparse.Namespace) -> Iterator[Case]:
    """Check and time model by model.

    Raises:
        GateError: if a compiled provider says something else than itself run eagerly.
    """
    device = torch.device(args.device)
    for name in args.models:
        for dendrites in args.dendrites:
            yield _measure(args, device, name, dendrites)


def _measure(args: argparse.Namespace, device: torch.device, name: str, dendrites: int) -> Case:
    plain = fresh(name, args.width, device, args.seed)
    state = dendrite_state(plain, dendrites, args.seed)
    batches = MODELS[name].batches(args.batch_size, device, args.seed)[:4]

    def runner(model: nn.Module, compile_: Callable[..., Callable] | None = None) -> Runner:
        model.train()
        call = model if compile_ is None else compile_(model)
        return Runner(model, call, sgd(model), MODELS[name].loss, batches)

    builders = {
        PLAIN: lambda: copy.deepcopy(plain),
        PBFX: lambda: _pbfx(plain, state),
        PACKED: lambda: _packed(plain, state, dendrites),
    }
    if not dendrites:
        del builders[PACKED]
    # Made outside: what compiles without a cache is made once, and stays to be timed.
    with counting("inductor") as (inductor, _):
        runners = {label: runner(build()) for label, build in builders.items()}
        if args.compile:
            for label, build in builders.items():
                runners[f"{label}, inductor"] = runner(build(), inductor)
            if args.backend:
                compile_ = _backend(args.backend)
                runners[f"{PBFX}, {args.backend}"] = runner(builders[PBFX](), compile_)
        require(_faults(name, runners, args.dtype))
        peaks = {label: _warm(each, device) for label, each in runners.items()}
        calls = {label: each.step for label, each in runners.items()}
        times = interleave(calls, device, args.seconds, dict.fromkeys(calls, 1), lambda _: None)
    return _case(args, name, dendrites, times, peaks)


def _backend(backend: str) -> Callable[..., Callable]:
    return lambda model: torch.compile(model, backend=backend, fullgraph=True)


def _pbfx(plain: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model = pbfx.transform(copy.deepcopy(plain), CONFIG)
    model.load_state_dict(state)
    return model


def _packed(plain: nn.Module, state: dict[str, Tensor], dendrites: int) -> nn.Module:
    model = packed_of(copy.deepcopy(plain), dendrites)
    copy_weights(model, state)
    return model


def _faults(name: str, runners: dict[str, Runner], dtype: str) -> list[str]:
    outputs = {label: each.output() for label, each in runners.items()}
    normed = any(isinstance(m, nn.BatchNorm2d) for m in runners[PLAIN].model.modules())
    faults = []
    for label, out in outputs.items():
        way = label.partition(",")[0]
        wanted = [way] if normed or way != PBFX or PACKED not in outputs else [way, PACKED]
        for reference in wanted:
            fault = output_fault(out, outputs[reference], dtype, _DEPTH)
            if fault:
                faults.append(f"  {name}, {label} against {reference}: {fault}")
    return faults


def _warm(runner: Runner, device: torch.device) -> float | None:
    """Run until nothing is made any more; return the MiB of a step, on a GPU."""
    for _ in range(3):
        runner.step()
    return peak_mib(runner.step, runner.model, runner.optimizer, device)


def _case(
    args: argparse.Namespace,
    name: str,
    dendrites: int,
    times: dict[str, list[float]],
    peaks: dict[str, float | None],
) -> Case:
    cells, rows = [], []
    for label, values in times.items():
        way, _, form = label.partition(", ")
        # Compiled against compiled, whoever compiled it.
        base = f"{PLAIN}, inductor" if form else PLAIN
        rival = f"{PACKED}, inductor" if form else PACKED
        own, share = Quantiles.of(values), ratios(values, times[base])
        against = ratios(values, times[rival]).p50 if rival in times else None
        floor = 1.0 if way == PLAIN else (dendrites + 3) / 3
        peak = peaks[label]
        cells.append(
            (
                label,
                milliseconds(own.p50),
                f"{multiple(share.p50)}x",
                multiple(floor),
                "-" if against is None else multiple(against),
                "-" if peak is None else f"{peak:.0f}",
            )
        )
        rows.append(
            {
                "model": name,
                "width": args.width,
                "batch_size": args.batch_size,
                "dendrites": dendrites,
                "provider": label,
                "ms_p20": own.p20 * 1e3,
                "ms_p50": own.p50 * 1e3,
                "ms_p80": own.p80 * 1e3,
                "x_plain_p50": share.p50,
                "x_floor": floor,
                "x_packed": against,
                "rounds": len(values),
                "peak_mib": peak,
            }
        )
    title = f"{name}, width {args.width:g}, batch {args.batch_size}, D = {dendrites}: training step"
    headings = ("", "ms", "x plain", "floor", "x packed", "MiB")
    return Case(title, headings, cells, [], rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--dendrites", nargs="+", type=natural, default=[0, 1, 3], metavar="D")
    parser.add_argument("--width", type=positive, default=1.0, help="scales hidden layers")
    parser.add_argument("--batch-size", type=count, default=32, help="(default 32)")
    parser.add_argument(
        "--backend", help="with --compile: pbfx under this backend too, such as pbfx"
    )
    parser.add_argument(
        "--seconds", type=positive, default=2.0, help="of timing per case (default 2)"
    )


BENCHMARK = Benchmark(
    "models", "training steps of whole models, eager and compiled", COLUMNS, add_arguments, run
)
