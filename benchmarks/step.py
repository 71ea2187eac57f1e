"""A whole training step, and inference, of small models: multiples of the plain model.

A training step is zero_grad, forward, loss, backward and optimizer step. Every provider is checked
before any is timed, and a compiled one again as it is compiled.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import incumbent
from benchmarks.benchmark import Benchmark, Case
from benchmarks.compiling import compiler
from benchmarks.gate import (
    gradient_errors,
    gradient_fault,
    output_fault,
    require,
    same_bits,
)
from benchmarks.memory import peak_mib
from benchmarks.models import MODELS, Batch, Model, fresh
from benchmarks.options import count, natural, positive
from benchmarks.providers import (
    CANDIDATES,
    LOOP,
    LOOP_FROZEN,
    PROVIDERS,
    Built,
    Provider,
    dendrite_state,
)
from benchmarks.table import milliseconds, multiple
from benchmarks.timing import Quantiles, interleave, ratios

NAMES = ("mnist", "mlp")
MODES = ("train", "infer")
# Batches from which the gate learns how far rounding leads astray.
_JUDGED = 6
COLUMNS = (
    *("model", "width", "batch_size", "dendrites", "compiled", "provider", "mode"),
    *("ms_p20", "ms_p50", "ms_p80", "x_plain_p20", "x_plain_p50", "x_plain_p80"),
    *("x_floor", "rounds", "peak_mib"),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A plain model, its data, and the dendrites that every provider gets."""

    name: str
    model: Model
    plain: nn.Module
    state: Mapping[str, Tensor]
    dendrites: int
    batches: list[Batch]
    dtype: str
    device: torch.device

    def build(self, provider: Provider) -> Built:
        """Build `provider` over a copy of the plain model."""
        return provider.build(copy.deepcopy(self.plain), self.state, self.dendrites)


@dataclasses.dataclass
class Runner:
    """A provider, built: what is called, and what is stepped."""

    provider: Provider
    call: Callable[..., Tensor]
    model: nn.Module
    optimizer: Optimizer
    peak_mib: float | None = None
    _turn: int = 0

    def train(self, setting: Setting) -> None:
        """Do one training step."""
        x, y = self._next(setting)
        self.optimizer.zero_grad()
        setting.model.loss(self.call(x), y).backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self, setting: Setting) -> None:
        """Do one forward pass."""
        self.call(self._next(setting)[0])

    def _next(self, setting: Setting) -> Batch:
        self._turn += 1
        return setting.batches[self._turn % len(setting.batches)]


def run(args: argparse.Namespace) -> Iterator[Case]:
    """Check all cases, then time them one by one.

    Raises:
        GateError: if any provider computes something else than the loop or the plain model.
    """
    device = torch.device(args.device)
    providers = list(PROVIDERS)
    reason = incumbent.missing()
    if reason:
        print(reason)
    else:
        providers.append(incumbent.PROVIDER)
    cases = [(name, dendrites) for name in args.models for dendrites in args.dendrites]
    settings: list[Setting] = []
    faults: list[str] = []
    for name, dendrites in cases:
        settings.append(_setting(args, device, name, dendrites))
        faults += check(settings[-1], providers)
    require(faults)
    for setting in settings:
        yield _measure(args, setting, providers)


def check(setting: Setting, providers: list[Provider]) -> list[str]:
    """Return what `providers` compute wrongly, a line each; see `judge`."""
    return judge(setting, built(setting, providers))


def built(
    setting: Setting, providers: list[Provider], compile_: Callable[..., Callable] | None = None
) -> Iterator[Runner]:
    """Build the providers, those first that others are compared with."""
    for provider in sorted(providers, key=_references_first):
        try:
            model, optimizer = setting.build(provider)
        except incumbent.Unavailable as error:
            print(f"{provider.name}: skipped, {error}")
            continue
        yield Runner(provider, compile_(model) if compile_ else model, model, optimizer)


def judge(setting: Setting, runners: Iterable[Runner], exact_bits: bool = True) -> list[str]:
    """Return what `runners` compute wrongly, a line each. They come in the order of `built`.

    Outputs are compared with the loop's, at D = 0 with the plain model's, bit for bit if
    `exact_bits`;
    gradients with those in float64 of the loop that learns the same way, as far as that loop itself
    keeps to them in this dtype. All run in eval mode: dropout draws differ.
    """
    outputs: dict[str, Tensor] = {}
    exact = _exact_gradients(setting, 0)
    lost: dict[str, dict[str, float]] = {}
    faults = []
    for runner in runners:
        provider, name = runner.provider, runner.provider.name
        runner.model.eval()
        out = outputs[name] = _evaluate(setting, runner)
        # The first of the loops is the reference.
        to_plain = name == "plain" or not setting.dendrites
        reference = outputs["plain"] if to_plain else outputs[LOOP_FROZEN]
        fault = output_fault(out, reference, setting.dtype)
        bitwise = exact_bits and not setting.dendrites and name != incumbent.NAME
        if bitwise and not same_bits(out, reference):
            fault = "output at D = 0 is not the plain model's, bit for bit"
        if fault is None and provider.gradients is not None:
            found = provider.gradients(runner.model)
            if name in (LOOP, LOOP_FROZEN):
                lost[name] = gradient_errors(found, exact[name])
                _add_batches(setting, provider, lost[name])
            like = provider.rival or name
            # A loop that failed itself is a fault already, and no yardstick.
            fault = gradient_fault(found, exact[like], setting.dtype, lost.get(like))
        if fault:
            faults.append(f"  {setting.name}, D = {setting.dendrites}, {name}: {fault}")
    return faults


def _exact_gradients(setting: Setting, batch: int) -> dict[str, dict[str, Tensor]]:
    """Return what each loop's gradients are in float64; candidates leave none in the network."""
    return {CANDIDATES: {}} | {
        provider.name: _loop_gradients(setting, provider, batch, torch.float64)
        for provider in PROVIDERS
        if provider.name in (LOOP, LOOP_FROZEN)
    }


def _loop_gradients(
    setting: Setting, provider: Provider, batch: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the gradients of a loop, run eagerly; in float64 autocast has no say."""
    assert provider.gradients is not None, "a loop says what its gradients are"
    model = setting.build(provider)[0].to(dtype).eval()
    x, y = setting.batches[batch]
    device = setting.device.type
    here = torch.is_autocast_enabled(device) and dtype is not torch.float64
    with torch.autocast(device, enabled=here):
        setting.model.loss(model(x.to(dtype)), y).backward()
    return provider.gradients(model)


def _add_batches(setting: Setting, provider: Provider, lost: dict[str, float]) -> None:
    """Raise what a loop loses to the worst of a few batches: where one has luck, another has not.

    A unit that falls on the other side of a relu's zero changes a gradient by a piece, and how many
    do is chance.
    """
    for batch in range(1, min(_JUDGED, len(setting.batches))):
        exact = _loop_gradients(setting, provider, batch, torch.float64)
        eager = _loop_gradients(setting, provider, batch, torch.float32)
        for name, error in gradient_errors(eager, exact).items():
            lost[name] = max(lost[name], error)


def _references_first(provider: Provider) -> int:
    order = ("plain", LOOP_FROZEN, LOOP)
    return order.index(provider.name) if provider.name in order else len(order)


def _evaluate(setting: Setting, runner: Runner) -> Tensor:
    """Return the output for the first batch, and leave the gradients of its loss in the model."""
    x, y = setting.batches[0]
    out = runner.call(x)
    setting.model.loss(out, y).backward()
    return out.detach()


def _setting(args: argparse.Namespace, device: torch.device, name: str, dendrites: int) -> Setting:
    plain = fresh(name, args.width, device, args.seed)
    state = dendrite_state(plain, dendrites, args.seed)
    batches = MODELS[name].batches(args.batch_size, device, args.seed)
    return Setting(name, MODELS[name], plain, state, dendrites, batches, args.dtype, device)


def _measure(args: argparse.Namespace, setting: Setting, providers: list[Provider]) -> Case:
    with compiler(args.compile) as compile_:
        found = {r.provider.name: r for r in built(setting, providers, compile_)}
        if compile_ is not None:
            # Inductor may round in another order: compiled outputs are compared by tolerance.
            require(judge(setting, found.values(), exact_bits=False))
        runners = {p.name: found[p.name] for p in providers if p.name in found}
        for runner in runners.values():
            _warm(setting, runner)
        times = {mode: _time(setting, runners, mode, args.seconds / 2) for mode in MODES}
    return _case(args, setting, runners, times)


def _warm(setting: Setting, runner: Runner) -> None:
    """Run until the provider is what it stays; on a GPU note its peak memory."""
    runner.model.eval()
    for _ in range(2):
        runner.infer(setting)
    runner.model.train()
    for _ in range(runner.provider.warmup):
        runner.train(setting)
    runner.peak_mib = peak_mib(
        lambda: runner.train(setting), runner.model, runner.optimizer, setting.device
    )


def _time(
    setting: Setting, runners: dict[str, Runner], mode: str, seconds: float
) -> dict[str, list[float]]:
    def bind(runner: Runner) -> Callable[[], None]:
        work = runner.train if mode == "train" else runner.infer
        return lambda: work(setting)

    return interleave(
        {name: bind(runner) for name, runner in runners.items()},
        setting.device,
        seconds,
        {name: r.provider.cycle if mode == "train" else 1 for name, r in runners.items()},
        lambda name: runners[name].model.train(mode == "train"),
    )


def _case(
    args: argparse.Namespace,
    setting: Setting,
    runners: dict[str, Runner],
    times: dict[str, dict[str, list[float]]],
) -> Case:
    cells, rows = [], []
    for name, runner in runners.items():
        line = [name]
        for mode in MODES:
            own = Quantiles.of(times[mode][name])
            share = ratios(times[mode][name], times[mode]["plain"])
            floor = _floor(runner.provider, mode, setting.dendrites)
            spread = f"{multiple(share.p20)}-{multiple(share.p80)}"
            line += [f"{multiple(share.p50)}x", spread, multiple(floor)]
            rows.append(
                {
                    "model": setting.name,
                    "width": args.width,
                    "batch_size": args.batch_size,
                    "dendrites": setting.dendrites,
                    "compiled": args.compile,
                    "provider": name,
                    "mode": mode,
                    "ms_p20": own.p20 * 1e3,
                    "ms_p50": own.p50 * 1e3,
                    "ms_p80": own.p80 * 1e3,
                    "x_plain_p20": share.p20,
                    "x_plain_p50": share.p50,
                    "x_plain_p80": share.p80,
                    "x_floor": floor,
                    "rounds": len(times[mode][name]),
                    "peak_mib": runner.peak_mib if mode == "train" else None,
                }
            )
        line.append("-" if runner.peak_mib is None else f"{runner.peak_mib:.0f}")
        cells.append(tuple(line))
    plain = {mode: milliseconds(Quantiles.of(times[mode]["plain"]).p50) for mode in MODES}
    title = (
        f"{setting.name}, width {args.width:g}, batch {args.batch_size}, D = {setting.dendrites}"
        f"{', compiled' if args.compile else ''}: plain trains in {plain['train']} ms, "
        f"infers in {plain['infer']} ms"
    )
    headings = ("x plain", "train", "p20-p80", "floor", "infer", "p20-p80", "floor", "MiB")
    return Case(title, headings, cells, _verdicts(runners, times), rows)


def _floor(provider: Provider, mode: str, dendrites: int) -> float:
    if mode == "train" or provider.name == "plain":
        return provider.train_floor(dendrites)
    return dendrites + 1.0


def _verdicts(runners: dict[str, Runner], times: dict[str, dict[str, list[float]]]) -> list[str]:
    """Say of each provider with a rival who won, wins and losses in the same words."""
    lines = []
    for name, runner in runners.items():
        rivals = [r for r in (runner.provider.rival, incumbent.NAME) if r in runners]
        if runner.provider.rival is None:
            continue
        for rival in rivals:
            words = [
                f"{mode} {verdict(ratios(times[mode][name], times[mode][rival]))}" for mode in MODES
            ]
            lines.append(f"{name} against {rival}: {', '.join(words)}")
    return lines


def verdict(share: Quantiles) -> str:
    """Put `own time / rival's time` into words; a spread that holds 1 is no difference."""
    if share.p20 <= 1 <= share.p80:
        return f"level ({share.p50:.2f}x the time)"
    if share.p50 < 1:
        return f"{1 / share.p50:.2f}x faster"
    return f"{share.p50:.2f}x SLOWER"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument(
        "--dendrites", nargs="+", type=natural, default=[0, 1, 3], metavar="D",
        help="dendrites per neuron (default 0 1 3)",
    )  # fmt: skip
    parser.add_argument("--width", type=positive, default=1.0, help="scales hidden layers")
    parser.add_argument("--batch-size", type=count, default=64, help="(default 64)")
    parser.add_argument(
        "--seconds", type=positive, default=4.0, help="of timing per case (default 4)"
    )


BENCHMARK = Benchmark(
    "step", "training step and inference, as multiples of plain", COLUMNS, add_arguments, run
)
