"""Training steps of whole models with dendrites, eager and compiled, as multiples of the plain one.

A step is zero_grad, forward, loss, backward and optimizer step. It is timed twice: as a loop runs
it, where small batches wait for Python, and on a GPU as the replay of a CUDA graph of all of it,
which is what the device does. Compiled providers are compared with the compiled plain model.

Each provider is checked before it is timed, with the batch, outputs and gradients: against itself
run eagerly in float32, and in float32 pbfx against the packed rival. Where dendrites join after a
norm (ResNets) those two compute different networks of the same cost, and are not compared.

A provider that fails or computes something wrong is left out, named, and costs nobody else a row.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import pbfx
from benchmarks.benchmark import Benchmark, Case
from benchmarks.compiling import strict
from benchmarks.environment import precision
from benchmarks.errors import GateError
from benchmarks.gate import gradient_errors, gradient_fault, output_error, output_fault
from benchmarks.models import MODELS, Batch, fresh
from benchmarks.options import count, natural, positive
from benchmarks.packed import copy_weights, packed_of
from benchmarks.providers import CONFIG, dendrite_state, sgd
from benchmarks.table import milliseconds, multiple
from benchmarks.timing import Quantiles, interleave, ratios
from benchmarks.training import Look, Training

# A small batch, which waits for launches, and a large one, which does not.
BATCH_SIZES = {
    "mnist": (32, 1024),
    "resnet18": (32, 256),
    "resnet50": (32, 128),
    "vit": (16, 128),
    "bert": (16, 256),
    "gpt2": (4, 32),
}
NAMES = tuple(BATCH_SIZES)
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COLUMNS = (
    *("model", "width", "batch_size", "dendrites", "provider", "mode"),
    *("ms_p20", "ms_p50", "ms_p80", "x_plain_p50", "x_packed"),
    *("device_ms_p20", "device_ms_p50", "device_ms_p80", "x_plain_device", "x_packed_device"),
    *("x_floor", "rounds", "peak_mib", "compile_s"),
)
PLAIN, PBFX, PACKED, INDUCTOR = "plain", "pbfx", "packed", "inductor"
# Outputs have been through all layers of a model: this much more than the table of one op.
_DEPTH = 5.0
# And in 16 bits through up to fifty norms; a gradient that is off by half is wrong in any case.
_MOST = 0.5
_BATCHES, _JUDGED = 4, 3


@dataclasses.dataclass
class Setting:
    """A plain model and its data, and what has been made of them so far.

    Attributes:
        args: the options.
        name: of the model.
        batch_size: of the data.
        device: where all of it lies.
        plain: the model.
        batches: to rotate over.
        faults: of all settings, a line each.
        compiled_plain: the plain model compiled, once for every D.
    """

    args: argparse.Namespace
    name: str
    batch_size: int
    device: torch.device
    plain: nn.Module
    batches: list[Batch]
    faults: list[str]
    compiled_plain: Training | None = None

    def training(self, model: nn.Module, backend: str | None = None) -> Training:
        """Put `model` into a training loop, compiled if there is a backend."""
        model.train()
        call: Callable[..., Tensor] = model
        if backend is not None:
            mode = None if self.args.mode == "default" else self.args.mode
            backend, _, strategy = backend.partition("/")
            # Torch takes one of the two.
            how: dict[str, Any] = {"mode": mode}
            if strategy:
                how = {"options": {"strategy": strategy, "mode": mode}}
            compile_: Any = torch.compile
            call = compile_(model, backend=backend, fullgraph=True, dynamic=False, **how)
        loss = MODELS[self.name].loss
        return Training(model, call, sgd(model), loss, self.batches, self.device)

    def reject(self, label: str, dendrites: int, fault: str) -> None:
        """Remember that a provider is wrong, and say so."""
        where = f"{self.name}, batch {self.batch_size}, D = {dendrites}"
        self.faults.append(f"  {where}, {label}: {fault}")
        print(f"{where}, {label}: left out, {fault}", flush=True)


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What an eager model makes of the first batch in float32, and what the run's dtype costs it.

    Attributes:
        exact: in float32.
        output: how far it is off in the dtype of the run, at worst in a few batches.
        gradients: likewise, by names of parameters.
    """

    exact: Look
    output: float
    gradients: dict[str, float]

    @classmethod
    def of(cls, training: Training) -> Yardstick:
        """Run a few batches both ways; the model keeps its weights."""
        looks: list[Look] = []
        output, gradients = 0.0, dict[str, float]()
        for batch in range(min(_JUDGED, len(training.batches))):
            with precision("float32", training.device):
                exact = training.look(batch)
            eager = training.look(batch)
            output = max(output, output_error(eager.output, exact.output))
            for name, error in gradient_errors(eager.gradients, exact.gradients).items():
                gradients[name] = max(gradients.get(name, 0.0), error)
            looks = looks or [exact]
        return cls(looks[0], output, gradients)

    def fault(self, found: Look, dtype: str) -> str | None:
        """Return what is wrong with what the same model made of it another way, or None."""
        return output_fault(
            found.output, self.exact.output, dtype, _DEPTH, self.output, _MOST
        ) or gradient_fault(found.gradients, self.exact.gradients, dtype, self.gradients, _MOST)


def run(args: argparse.Namespace) -> Iterator[Case]:
    """Check and time model by model; eager and compiled providers are cases of their own.

    Raises:
        GateError: at the end, if a provider was wrong or failed. It was not timed.
    """
    device = torch.device(args.device)
    faults: list[str] = []
    for name in args.models:
        for batch_size in args.batch_size or BATCH_SIZES[name]:
            plain = fresh(name, args.width, device, args.seed)
            batches = MODELS[name].batches(batch_size, device, args.seed)[:_BATCHES]
            setting = Setting(args, name, batch_size, device, plain, batches, faults)
            with strict(cached=True):
                for dendrites in args.dendrites:
                    yield from _cases(setting, dendrites)
    if faults:
        raise GateError("wrong or failed, and not timed:\n" + "\n".join(faults))


def _cases(setting: Setting, dendrites: int) -> Iterator[Case]:
    state = dendrite_state(setting.plain, dendrites, setting.args.seed)
    builders = {
        PLAIN: lambda: copy.deepcopy(setting.plain),
        PBFX: lambda: _pbfx(setting.plain, state),
        PACKED: lambda: _packed(setting.plain, state, dendrites),
    }
    if not dendrites:
        del builders[PACKED]
    yardsticks: dict[str, Yardstick] = {}
    eager = _eager(setting, dendrites, builders, yardsticks)
    if setting.args.eager:
        yield from _timed(setting, dendrites, eager)
    del eager
    if setting.args.compile:
        yield from _timed(setting, dendrites, _compiled(setting, dendrites, builders, yardsticks))


def _eager(
    setting: Setting,
    dendrites: int,
    builders: Mapping[str, Callable[[], nn.Module]],
    yardsticks: dict[str, Yardstick],
) -> dict[str, Training]:
    """Build and check what runs eagerly, and fill in the yardsticks."""
    found: dict[str, Training] = {}
    for label, build in builders.items():

        def look(build: Callable[[], nn.Module] = build) -> tuple[Training, Yardstick, Look]:
            each = setting.training(build())
            return each, Yardstick.of(each), each.look()

        made = _attempt(setting, label, dendrites, look)
        if made is None:
            continue
        each, yardsticks[label], seen = made
        fault = yardsticks[label].fault(seen, setting.args.dtype)
        if fault:
            setting.reject(label, dendrites, fault)
            del yardsticks[label]
        else:
            found[label] = each
    if PBFX in found and PACKED in found and not _normed(setting.plain):
        ours, theirs = (yardsticks[label].exact.output for label in (PBFX, PACKED))
        fault = output_fault(ours, theirs, "float32", _DEPTH)
        if fault:
            # Who of the two is wrong is not known.
            setting.reject(f"{PBFX} against {PACKED}", dendrites, fault)
            for label in (PBFX, PACKED):
                del found[label], yardsticks[label]
    return found


def _compiled(
    setting: Setting,
    dendrites: int,
    builders: Mapping[str, Callable[[], nn.Module]],
    yardsticks: Mapping[str, Yardstick],
) -> dict[str, Training]:
    """Build and check what is compiled; who failed eagerly is not compiled."""
    wanted = [(PLAIN, INDUCTOR), (PACKED, INDUCTOR), *((PBFX, b) for b in setting.args.backend)]
    found: dict[str, Training] = {}
    for way, backend in wanted:
        if way not in yardsticks:
            continue
        label = f"{way}, {backend}"
        if way == PLAIN and setting.compiled_plain is not None:
            found[label] = setting.compiled_plain
            continue

        def look(
            way: str = way, backend: str = backend, label: str = label
        ) -> tuple[Training, Look]:
            each = setting.training(builders[way](), backend)
            start = time.perf_counter()
            seen = each.look()
            each.compile_seconds = time.perf_counter() - start
            # Said at once: it is most of the time that a large model takes.
            print(f"{label} is compiled: {each.compile_seconds:.1f} s", flush=True)
            return each, seen

        made = _attempt(setting, label, dendrites, look)
        if made is None:
            continue
        each, seen = made
        fault = yardsticks[way].fault(seen, setting.args.dtype)
        if fault:
            setting.reject(label, dendrites, fault)
            continue
        found[label] = each
        if way == PLAIN:
            setting.compiled_plain = each
    return found


def _attempt(setting: Setting, label: str, dendrites: int, work: Callable[[], Any]) -> Any:
    """Return what `work` does, or None if it fails: the others go on."""
    try:
        return work()
    # Whatever a compiler, a rival or the device's memory raises.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        setting.reject(label, dendrites, f"{type(error).__name__}: {reason}")
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _pbfx(plain: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model = pbfx.transform(copy.deepcopy(plain), CONFIG)
    model.load_state_dict(state)
    return model


def _packed(plain: nn.Module, state: dict[str, Tensor], dendrites: int) -> nn.Module:
    model = packed_of(copy.deepcopy(plain), dendrites)
    copy_weights(model, state)
    return model


def _normed(model: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def _timed(setting: Setting, dendrites: int, found: dict[str, Training]) -> Iterator[Case]:
    """Time what is left side by side: there is no case without the plain model."""
    args, device = setting.args, setting.device
    peaks: dict[str, float | None] = {}
    for label, each in list(found.items()):

        def warm(each: Training = each) -> tuple[float | None]:
            each.warm()
            return (each.peak_mib(),)

        peak = _attempt(setting, label, dendrites, warm)
        if peak is None:
            del found[label]
        else:
            # In memory of CUDA graphs nothing is allocated from step to step.
            (peaks[label],) = peak if not _graphs_itself(args, label) else (None,)
    if not any(label.startswith(PLAIN) for label in found):
        return
    seconds = args.seconds / (2 if device.type == "cuda" else 1)

    def timed(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        if not calls:
            return {}
        return interleave(calls, device, seconds, dict.fromkeys(calls, 1), lambda _: None)

    times = timed({label: each.step for label, each in found.items()})
    replays: dict[str, Callable[[], object]] = {}
    if device.type == "cuda":
        pool = torch.cuda.graph_pool_handle()
        for label, each in found.items():
            if not _graphs_itself(args, label):
                capture = functools.partial(each.captured, pool)
                replay = _attempt(setting, f"{label}, as a graph", dendrites, capture)
                if replay is not None:
                    replays[label] = replay
    first = {label: each.compile_seconds for label, each in found.items()}
    yield _case(setting, dendrites, times, timed(replays), peaks, first)


def _graphs_itself(args: argparse.Namespace, label: str) -> bool:
    """Return whether the compiler puts steps into CUDA graphs, which cannot be captured again."""
    return ", " in label and args.mode in ("reduce-overhead", "max-autotune")


def _case(
    setting: Setting,
    dendrites: int,
    times: dict[str, list[float]],
    device_times: dict[str, list[float]],
    peaks: dict[str, float | None],
    compile_seconds: dict[str, float | None],
) -> Case:
    args = setting.args
    cells, rows = [], []
    for label, values in times.items():
        way, _, form = label.partition(", ")
        compiled = f", {INDUCTOR}" if form else ""
        # Compiled against compiled, whoever compiled it.
        bases = PLAIN + compiled, PACKED + compiled
        own, (share, against) = Quantiles.of(values), _shares(times, label, *bases)
        on_device = Quantiles.of(device_times[label]) if label in device_times else None
        device_share, device_against = _shares(device_times, label, *bases)
        floor = 1.0 if way == PLAIN else (dendrites + 3) / 3
        peak = peaks[label]
        cells.append(
            (
                label,
                milliseconds(own.p50),
                _shown(share),
                _shown(against),
                "-" if on_device is None else milliseconds(on_device.p50),
                _shown(device_share),
                _shown(device_against),
                multiple(floor),
                "-" if peak is None else f"{peak:.0f}",
            )
        )
        rows.append(
            {
                "model": setting.name,
                "width": args.width,
                "batch_size": setting.batch_size,
                "dendrites": dendrites,
                "provider": label,
                "mode": args.mode if form else None,
                "ms_p20": own.p20 * 1e3,
                "ms_p50": own.p50 * 1e3,
                "ms_p80": own.p80 * 1e3,
                "x_plain_p50": share,
                "x_packed": against,
                "device_ms_p20": None if on_device is None else on_device.p20 * 1e3,
                "device_ms_p50": None if on_device is None else on_device.p50 * 1e3,
                "device_ms_p80": None if on_device is None else on_device.p80 * 1e3,
                "x_plain_device": device_share,
                "x_packed_device": device_against,
                "x_floor": floor,
                "rounds": len(values),
                "peak_mib": peak,
                "compile_s": compile_seconds[label],
            }
        )
    title = (
        f"{setting.name}, width {args.width:g}, batch {setting.batch_size}, D = {dendrites}: "
        "training step, in a loop and on the device alone"
    )
    headings = ("", "ms", "x plain", "x packed", "device", "x plain", "x packed", "floor", "MiB")
    return Case(title, headings, cells, [], rows)


def _shares(times: dict[str, list[float]], label: str, *bases: str) -> list[float | None]:
    """Return the median of the time of `label` over that of each base; None if one is missing."""
    return [
        ratios(times[label], times[base]).p50 if label in times and base in times else None
        for base in bases
    ]


def _shown(share: float | None) -> str:
    return "-" if share is None else multiple(share)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--dendrites", nargs="+", type=natural, default=[0, 1, 3], metavar="D")
    parser.add_argument("--width", type=positive, default=1.0, help="scales hidden layers")
    parser.add_argument(
        "--batch-size", nargs="+", type=count, metavar="SIZE",
        help="(default: a small and a large one for each model)",
    )  # fmt: skip
    parser.add_argument(
        "--backend", nargs="+", default=[PBFX], metavar="NAME",
        help="with --compile: pbfx's; pbfx/packed and the like force a form (default pbfx)",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=MODES, default="default", help="with --compile: torch.compile's"
    )
    parser.add_argument(
        "--no-eager", dest="eager", action="store_false", help="time compiled providers only"
    )
    parser.add_argument(
        "--seconds", type=positive, default=2.0, help="of timing per case (default 2)"
    )


BENCHMARK = Benchmark(
    "models", "training steps of whole models, eager and compiled", COLUMNS, add_arguments, run
)
