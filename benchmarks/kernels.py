"""One layer with dendrites at a time: the kernels against eager torch and its compiler.

Times are of work on the device alone: on a GPU, calls are captured in a CUDA graph and its replays
timed, so that launches from Python weigh on nobody. Inputs rotate past the L2 cache. The roofline
is measured in the same run: a large copy and a large matrix product.

Modes: the forward in inference, the step of the neuron phase (forward and backward), and the step
of the dendrite phase with one candidate, in which the layer itself is frozen, and the step of
dendrites that learn by plain backpropagation.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import candidate_neurons, full_neurons, incumbent, kernels_summary, neurons
from benchmarks.benchmark import Benchmark, Case
from benchmarks.candidate_neurons import Pool
from benchmarks.gate import gradient_fault, output_fault, require
from benchmarks.layer_providers import (
    CANDIDATE,
    COMPILED,
    FORWARD,
    FULL,
    GRADIENT,
    LOOP,
    MODES,
    PBFX,
    PLAIN,
    RIVALS,
    STEP,
    choice,
    forms,
    providers,
    start,
)
from benchmarks.neurons import LAYERS, Layer, Neuron, Tensors
from benchmarks.options import natural, positive
from benchmarks.table import milliseconds, multiple
from benchmarks.timing import Quantiles, interleave, ratios, sample, synchronize

COLUMNS = (
    *("layer", "positions", "neurons", "inputs", "dendrites", "mode", "provider", "strategy"),
    *("us_p20", "us_p50", "us_p80", "x_plain", "x_best_rival", "tflops", "roofline_us"),
    *("roofline_share", "copy_gbs", "product_tflops", "rounds", "peak_mib"),
)
_TYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
_NAMES = ("x", "weight", "bias", "dendrites", "dendrites_bias", "to_soma", "to_dendrite")
# An H200 has 60 MB of L2.
_ROTATED_BYTES = 192 * 2**20
_MOST_COPIES = 8
# Rows, or images, that the gate computes in float64.
_CHECKED = 16


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What this device reached in this run: bytes and floating-point operations per second."""

    bandwidth: float
    rate: float

    def seconds(self, layer: Layer, dendrites: int, size: int) -> float:
        """Return the least time for a forward."""
        moved = layer.elements(dendrites) * size / self.bandwidth
        return max(moved, layer.flops(dendrites) / self.rate)


def run(args: argparse.Namespace) -> Iterator[Case]:
    """Check and time layer by layer.

    Raises:
        GateError: if any provider's output or gradient is wrong.
    """
    device, end = torch.device(args.device), time.monotonic() + args.budget
    dtype = _TYPES[args.dtype]
    layers = [layer for layer in LAYERS if any(word in layer.name for word in args.layers)]
    left_out = 0
    with torch.autocast(device.type, enabled=False):
        roofline = measure_roofline(device, dtype)
        for layer, dendrites in itertools.product(layers, args.dendrites):
            copies = math.ceil(_ROTATED_BYTES / (dtype.itemsize * math.prod(layer.x)))
            copies = min(_MOST_COPIES, copies) if device.type == "cuda" else 1
            tensors = neurons.draw(layer, dendrites, dtype, device, args.seed, copies)
            for mode in args.modes:
                if time.monotonic() > end:
                    left_out += 1
                    continue
                torch.compiler.reset()
                yield _measure(args, tensors, mode, roofline)
    if left_out:
        print(f"\n{left_out} cases left out: the budget of {args.budget:g} s is spent")


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Time a large copy and a large product."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    product = min(sample(lambda: a @ a, 5, device) for _ in range(4))
    source = torch.randn(side * side * 8, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy = min(sample(lambda: target.copy_(source), 5, device) for _ in range(4))
    return Roofline(2 * source.nbytes / copy, 2 * side**3 / product)


def _arguments(tensors: Tensors, turn: int) -> tuple[Tensor, ...]:
    x = tensors.inputs[turn % len(tensors.inputs)]
    return x, tensors.weight, tensors.bias, *tensors.dendrites


def _call(
    neuron: Neuron, tensors: Tensors, mode: str, pool: Pool | None = None
) -> Callable[[int], object]:
    """Return what is timed: a call with one of the inputs, and in training its backward."""

    def forward(turn: int) -> Tensor:
        with torch.no_grad():
            return neuron(*_arguments(tensors, turn))

    leaves = tensors.dendrites
    if mode == GRADIENT or (isinstance(neuron, neurons.Full) and mode == STEP):
        leaves = tuple(t.detach().requires_grad_() for t in leaves)
    frozen = tuple(t.detach() for t in (tensors.weight, tensors.bias, *tensors.dendrites))

    def gradients(names: tuple[str, ...], arguments: tuple[Tensor, ...]) -> dict[str, Tensor]:
        learning = {n: t for n, t in zip(names, arguments, strict=True) if t.requires_grad}
        out = neuron(*arguments)
        grads = torch.autograd.grad(out, tuple(learning.values()), tensors.grad, allow_unused=True)
        found = zip(learning, grads, strict=True)
        return {name: grad for name, grad in found if grad is not None}

    def step(turn: int) -> dict[str, Tensor]:
        return gradients(_NAMES, (*_arguments(tensors, turn)[:3], *leaves))

    def candidate(turn: int) -> dict[str, Tensor]:
        assert pool is not None, "who teaches no candidate trains"
        x = tensors.inputs[turn % len(tensors.inputs)]
        return gradients((*_NAMES, *candidate_neurons.NAMES), (x, *frozen, *pool.tensors))

    if mode == FORWARD:
        return forward
    return step if pool is None else candidate


def check(
    tensors: Tensors, found: dict[str, Neuron], mode: str, dtype: str, pool: Pool | None = None
) -> list[str]:
    """Return what is wrong, a line each: outputs against float64, gradients against the loop's."""
    layer = tensors.layer
    x, *rest = (t.detach().double() for t in _arguments(tensors, 0))
    wanted = neurons.loop(layer)(x[:_CHECKED], *rest)
    wanted_plain = layer.soma(x[:_CHECKED], *rest[:2])
    del x, rest
    faults, grads = [], {}
    for name in sorted(found, key=lambda name: name not in (LOOP, FULL)):
        result = _call(found[name], tensors, mode, _learned_by(name, pool))(0)
        if mode == FORWARD:
            assert isinstance(result, Tensor)
            reference = wanted_plain if name == PLAIN else wanted
            fault = output_fault(result[:_CHECKED], reference, dtype)
        elif mode == CANDIDATE and name == PLAIN:
            # It trains as the neuron phase's does, where it is checked.
            continue
        else:
            assert isinstance(result, dict)
            if name == PLAIN and mode == GRADIENT:
                # Alone in that its input hears nothing from dendrites.
                del result["x"]
            grads[name] = result
            fault = _gradient_fault(result, _reference(grads, name), dtype)
        if fault:
            faults.append(f"  {layer.name}, {mode}, {name}: {fault}")
    return faults


def _learned_by(name: str, pool: Pool | None) -> Pool | None:
    """Return the candidate that a provider teaches; the plain layer trains instead."""
    return None if name == PLAIN else pool


def _gradient_fault(
    found: dict[str, Tensor], reference: dict[str, Tensor], dtype: str
) -> str | None:
    """Judge what the error passes through, a candidate, and sums each by their own size."""
    for own in (("candidate",), ("moments",), ("",)):
        parts = [
            {k: v for k, v in grads.items() if _part(k) == own[0]} for grads in (found, reference)
        ]
        if fault := gradient_fault(parts[0], parts[1], dtype):
            return fault
    return None


def _part(name: str) -> str:
    return next((part for part in ("candidate", "moments") if name.startswith(part)), "")


def _reference(grads: dict[str, dict[str, Tensor]], name: str) -> dict[str, Tensor]:
    """Return the gradients of the loop that learns as `name` does; plain has none for the links."""
    if name in (FULL, incumbent.NAME):
        return grads[FULL]
    reference = grads[LOOP]
    return {key: grad for key, grad in reference.items() if key in grads[name] or name != PLAIN}


def _measure(args: argparse.Namespace, tensors: Tensors, mode: str, roofline: Roofline) -> Case:
    device = tensors.weight.device
    pool = candidate_neurons.draw(tensors, args.seed) if mode == CANDIDATE else None

    def call(name: str, neuron: Neuron) -> Callable[[int], object]:
        return _call(neuron, tensors, mode, _learned_by(name, pool))

    with forms() as compiled:
        found = start(providers(args, tensors, mode), call, args.compile_seconds)
    require(check(tensors, found, mode, args.dtype, pool))
    count = len(tensors.inputs)
    full = mode == GRADIENT
    ran = {PBFX: full_neurons.strategy(tensors) if full else choice(call(PBFX, found[PBFX]))}
    if COMPILED in found:
        ran[COMPILED] = " + ".join(dict.fromkeys(compiled)) or "none"
    peaks, calls = {}, {}
    for name, neuron in found.items():
        once = call(name, neuron)
        once(0)
        peaks[name] = _peak(once, device)
        captured = not isinstance(neuron, neurons.Full) or neuron.captured
        calls[name] = repeated_call(once, count, device, captured)
    times = interleave(calls, device, args.seconds, dict.fromkeys(calls, 1), prepare=lambda _: None)
    each = {name: [t / count for t in values] for name, values in times.items()}
    return _case(tensors, mode, roofline, ran, each, peaks)


def _peak(once: Callable[[int], object], device: torch.device) -> float | None:
    """Return the MiB that a call holds at most, beyond its arguments."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    once(0)
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def repeated_call(
    once: Callable[[int], object], count: int, device: torch.device, captured: bool
) -> Callable[[], object]:
    """Return a call that goes through all inputs once; on a GPU, by replaying a graph if it can."""

    def through() -> None:
        for turn in range(count):
            once(turn)

    if device.type != "cuda" or not captured:
        return through
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        through()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        through()
    return graph.replay


def _case(
    tensors: Tensors,
    mode: str,
    roofline: Roofline,
    ran: dict[str, str],
    times: dict[str, list[float]],
    peaks: dict[str, float | None],
) -> Case:
    layer, dendrites = tensors.layer, len(tensors.dendrites[2])
    floor = roofline.seconds(layer, dendrites, tensors.weight.element_size())
    middle = {name: Quantiles.of(values).p50 for name, values in times.items()}
    rival = min((name for name in times if name in RIVALS), key=lambda name: middle[name])
    cells, rows = [], []
    for name, values in times.items():
        own, plain = Quantiles.of(values), ratios(values, times[PLAIN])
        against = ratios(values, times[rival])
        forward = mode == FORWARD and name != PLAIN
        share = floor / own.p50 if forward else None
        rate = layer.flops(dendrites) / own.p50 / 1e12 if forward else None
        peak = peaks[name]
        cells.append(
            (
                name,
                milliseconds(own.p50),
                f"{multiple(plain.p50)}x",
                multiple(against.p50),
                "-" if share is None else f"{share:.0%}",
                "-" if peak is None else f"{peak:.0f}",
            )
        )
        rows.append(
            {
                "layer": layer.name,
                "positions": math.prod(layer.out) // layer.weight[0],
                "neurons": layer.weight[0],
                "inputs": math.prod(layer.weight[1:]),
                "dendrites": dendrites,
                "mode": mode,
                "provider": name,
                "strategy": ran.get(name),
                "us_p20": own.p20 * 1e6,
                "us_p50": own.p50 * 1e6,
                "us_p80": own.p80 * 1e6,
                "x_plain": plain.p50,
                "x_best_rival": against.p50,
                "tflops": rate,
                "roofline_us": floor * 1e6 if forward else None,
                "roofline_share": share,
                "copy_gbs": roofline.bandwidth / 1e9,
                "product_tflops": roofline.rate / 1e12,
                "rounds": len(values),
                "peak_mib": peak,
            }
        )
    what = "; ".join(f"{name} runs {strategy}" for name, strategy in ran.items())
    title = f"{layer.name}, D = {dendrites}, {mode}: {what}; best rival {rival}"
    headings = ("", "ms", "x plain", "x rival", "roofline", "MiB")
    return Case(title, headings, cells, [], rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--layers", nargs="+", default=[""], metavar="WORDS",
        help="those whose name contains one of these, such as 'linear 1x' or NHWC (default all)",
    )  # fmt: skip
    parser.add_argument("--dendrites", nargs="+", type=natural, default=[1, 3], metavar="D")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES[:2]),
        help="forward; step, of the neuron phase; candidate, of the dendrite phase; "
        "full, of dendrites that learn by plain backpropagation",
    )  # fmt: skip
    parser.add_argument(
        "--tune-gemm", nargs="+", default=[], metavar="WORDS",
        help="with --compile: Inductor with products chosen by timing, for layers so named",
    )  # fmt: skip
    parser.add_argument(
        "--max-autotune", nargs="+", default=[], metavar="WORDS",
        help="with --compile: Inductor's whole search, likewise; minutes for a layer",
    )  # fmt: skip
    parser.add_argument(
        "--compile-seconds", type=positive, default=120.0, metavar="SECONDS",
        help="after which a rival that is still compiling is left out (default 120)",
    )  # fmt: skip
    parser.add_argument(
        "--incumbent", action=argparse.BooleanOptionalAction, default=True,
        help="perforatedai too, where it is installed (default yes); on a GPU its launches count",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=positive, default=0.3, help="of timing per case (default 0.3)"
    )
    parser.add_argument(
        "--budget", type=positive, default=math.inf, metavar="SECONDS",
        help="after which no further case is begun (default: none)",
    )  # fmt: skip


BENCHMARK = Benchmark(
    "kernels",
    "one layer with dendrites: kernels, eager, Inductor",
    COLUMNS,
    add_arguments,
    run,
    kernels_summary.summarize,
)
