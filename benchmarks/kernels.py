"""One layer with dendrites at a time: the kernels against eager torch and its compiler.

Times are of work on the device alone: on a GPU, calls are captured in a CUDA graph and its replays
timed, so that launches from Python weigh on nobody. Inputs rotate past the L2 cache. The roofline
is measured in the same run: a large copy and a large matrix product.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import full_neurons, incumbent, neurons
from benchmarks.benchmark import Benchmark, Case
from benchmarks.gate import gradient_fault, output_fault, require
from benchmarks.neurons import LAYERS, Layer, Neuron, Tensors
from benchmarks.options import natural, positive
from benchmarks.table import milliseconds, multiple
from benchmarks.timing import Quantiles, interleave, ratios, sample, synchronize
from pbfx_kernels.strategy import can_fuse, choose, problem_of

MODES = ("forward", "step", "full")
COLUMNS = (
    *("layer", "positions", "neurons", "inputs", "dendrites", "mode", "provider", "strategy"),
    *("us_p20", "us_p50", "us_p80", "x_plain", "x_best_rival", "tflops", "roofline_us"),
    *("roofline_share", "copy_gbs", "product_tflops", "rounds", "peak_mib"),
)
_TYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
_RIVALS = ("eager loop", "eager packed", "inductor", "packed + inductor", "inductor max")
# The loop in which dendrites learn too.
_FULL = "eager loop, full"
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
    device = torch.device(args.device)
    layers = [layer for layer in LAYERS if any(word in layer.name for word in args.layers)]
    with torch.autocast(device.type, enabled=False):
        roofline = measure_roofline(device, _TYPES[args.dtype])
        for layer, dendrites in itertools.product(layers, args.dendrites):
            dtype = _TYPES[args.dtype]
            copies = math.ceil(_ROTATED_BYTES / (dtype.itemsize * math.prod(layer.x)))
            copies = min(_MOST_COPIES, copies) if device.type == "cuda" else 1
            tensors = neurons.draw(layer, dendrites, dtype, device, args.seed, copies)
            for mode in args.modes:
                torch.compiler.reset()
                yield _measure(args, tensors, dendrites, mode, roofline)


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Time a large copy and a large product."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    product = min(sample(lambda: a @ a, 5, device) for _ in range(4))
    source = torch.randn(side * side * 8, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy = min(sample(lambda: target.copy_(source), 5, device) for _ in range(4))
    return Roofline(2 * source.nbytes / copy, 2 * side**3 / product)


def _providers(args: argparse.Namespace, tensors: Tensors, mode: str) -> dict[str, Neuron]:
    layer = tensors.layer
    if mode == "full":
        return full_neurons.providers(layer, args.compile)
    found: dict[str, Neuron] = {"plain": neurons.plain(layer), "pbfx": neurons.chosen(layer)}
    if mode == "forward":
        for strategy in neurons.strategies(tensors):
            found[f"pbfx {strategy.value}"] = neurons.forced(layer, strategy)
    if (
        can_fuse(tensors.inputs[0], tensors.weight, tensors.dendrites[0])
        and not layer.geometry.spatial
    ):
        found["pbfx fused"] = neurons.fused()
    found["eager loop"] = neurons.loop(layer)
    found["eager packed"] = neurons.packed(layer)
    if args.compile:
        compile_ = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        found["inductor"] = compile_(neurons.loop(layer))
        found["packed + inductor"] = compile_(neurons.packed(layer))
        if args.max_autotune:
            mode_ = "max-autotune-no-cudagraphs"
            found["inductor max"] = compile_(neurons.loop(layer), mode=mode_)
    if incumbent.missing() is None and args.incumbent:
        try:
            found[incumbent.NAME] = incumbent.neuron(tensors)
        except incumbent.Unavailable as error:
            print(f"{incumbent.NAME}: skipped, {error}")
        else:
            # It learns another way; the loop that learns like it is what its gradients are held to.
            found[_FULL] = neurons.Full(neurons.loop(layer, frozen=False))
    return found


def _arguments(tensors: Tensors, turn: int) -> tuple[Tensor, ...]:
    x = tensors.inputs[turn % len(tensors.inputs)]
    return x, tensors.weight, tensors.bias, *tensors.dendrites


def _call(neuron: Neuron, tensors: Tensors, mode: str) -> Callable[[int], object]:
    def forward(turn: int) -> Tensor:
        with torch.no_grad():
            return neuron(*_arguments(tensors, turn))

    leaves = tensors.dendrites
    if mode == "full" or (isinstance(neuron, neurons.Full) and mode == "step"):
        leaves = tuple(t.detach().requires_grad_() for t in leaves)

    def step(turn: int) -> dict[str, Tensor]:
        arguments = (*_arguments(tensors, turn)[:3], *leaves)
        learning = {n: t for n, t in zip(_NAMES, arguments, strict=True) if t.requires_grad}
        out = neuron(*arguments)
        grads = torch.autograd.grad(out, tuple(learning.values()), tensors.grad, allow_unused=True)
        found = zip(learning, grads, strict=True)
        return {name: grad for name, grad in found if grad is not None}

    return forward if mode == "forward" else step


def check(tensors: Tensors, providers: dict[str, Neuron], mode: str, dtype: str) -> list[str]:
    """Return what is wrong, a line each: outputs against float64, gradients against the loop's."""
    layer = tensors.layer
    x, *rest = (t.detach().double() for t in _arguments(tensors, 0))
    wanted = neurons.loop(layer)(x[:_CHECKED], *rest)
    wanted_plain = layer.soma(x[:_CHECKED], *rest[:2])
    del x, rest
    faults, grads = [], {}
    for name in sorted(providers, key=lambda name: name not in ("eager loop", _FULL)):
        if mode == "forward":
            out = _call(providers[name], tensors, mode)(0)
            assert isinstance(out, Tensor)
            reference = wanted_plain if name == "plain" else wanted
            fault = output_fault(out[:_CHECKED], reference, dtype)
        else:
            found = _call(providers[name], tensors, mode)(0)
            assert isinstance(found, dict)
            if name == "plain" and mode == "full":
                # Alone in that its input hears nothing from dendrites.
                del found["x"]
            grads[name] = found
            fault = gradient_fault(found, _reference(grads, name), dtype)
        if fault:
            faults.append(f"  {layer.name}, {mode}, {name}: {fault}")
    return faults


def _reference(grads: dict[str, dict[str, Tensor]], name: str) -> dict[str, Tensor]:
    """Return the gradients of the loop that learns as `name` does; plain has none for the links."""
    if name in (_FULL, incumbent.NAME):
        return grads[_FULL]
    reference = grads["eager loop"]
    return {key: grad for key, grad in reference.items() if key in grads[name] or name != "plain"}


def _measure(
    args: argparse.Namespace, tensors: Tensors, dendrites: int, mode: str, roofline: Roofline
) -> Case:
    device = tensors.weight.device
    providers = _providers(args, tensors, mode)
    require(check(tensors, providers, mode, args.dtype))
    count = len(tensors.inputs)
    peaks, calls = {}, {}
    for name, neuron in providers.items():
        once = _call(neuron, tensors, mode)
        once(0)
        peaks[name] = _peak(once, device)
        captured = not isinstance(neuron, neurons.Full) or neuron.captured
        calls[name] = repeated_call(once, count, device, captured)
    times = interleave(calls, device, args.seconds, dict.fromkeys(calls, 1), prepare=lambda _: None)
    each = {name: [t / count for t in values] for name, values in times.items()}
    return _case(args, tensors, dendrites, mode, roofline, each, peaks)


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
    args: argparse.Namespace,
    tensors: Tensors,
    dendrites: int,
    mode: str,
    roofline: Roofline,
    times: dict[str, list[float]],
    peaks: dict[str, float | None],
) -> Case:
    layer = tensors.layer
    strategy = choose(problem_of(tensors.grad, tensors.dendrites[0], layer.geometry)).value
    strategy = full_neurons.strategy(tensors) if mode == "full" else strategy
    floor = roofline.seconds(layer, dendrites, tensors.weight.element_size())
    middle = {name: Quantiles.of(values).p50 for name, values in times.items()}
    rival = min((name for name in times if name in _RIVALS), key=lambda name: middle[name])
    cells, rows = [], []
    for name, values in times.items():
        own, plain = Quantiles.of(values), ratios(values, times["plain"])
        against = ratios(values, times[rival])
        forward = mode == "forward" and name != "plain"
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
                "strategy": strategy if name == "pbfx" else None,
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
    title = f"{layer.name}, D = {dendrites}, {mode}: pbfx runs {strategy}; best rival {rival}"
    headings = ("", "ms", "x plain", "x rival", "roofline", "MiB")
    return Case(title, headings, cells, [], rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--layers", nargs="+", default=[""], metavar="WORDS",
        help="those whose name contains one of these, such as 'linear 1x' or NHWC (default all)",
    )  # fmt: skip
    parser.add_argument("--dendrites", nargs="+", type=natural, default=[1, 3], metavar="D")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--max-autotune", action="store_true", help="with --compile: Inductor's slow search too"
    )
    parser.add_argument(
        "--incumbent", action=argparse.BooleanOptionalAction, default=True,
        help="perforatedai too, where it is installed (default yes); on a GPU its launches count",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=positive, default=0.3, help="of timing per case (default 0.3)"
    )


BENCHMARK = Benchmark(
    "kernels", "one layer with dendrites: kernels, eager, Inductor", COLUMNS, add_arguments, run
)
