"""The fused neuron kernels in every configuration that might be the best, shape by shape.

What wins here is what `neuron_blocks` and, for convolutions, `conv_neuron_blocks` of
`pbfx_kernels.fused_configs` should choose. Weights are laid side by side once, before the clock
starts: `python -m benchmarks kernels` counts that too.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import neurons
from benchmarks.benchmark import Benchmark, Case
from benchmarks.errors import UsageError
from benchmarks.gate import output_fault, require
from benchmarks.kernels import repeated_call
from benchmarks.neurons import LAYERS, Layer, Tensors
from benchmarks.options import natural, positive
from benchmarks.table import milliseconds, multiple
from benchmarks.timing import Quantiles, interleave, ratios
from pbfx_kernels.fused_configs import Blocks, conv_neuron_blocks, neuron_blocks
from pbfx_kernels.launching import power_of_two
from pbfx_kernels.strategy import Route, Strategy, can_fuse, route_of

COLUMNS = (
    *("layer", "positions", "neurons", "inputs", "dendrites", "provider", "chosen"),
    *("us_p20", "us_p50", "us_p80", "x_plain", "rounds"),
)
# Rows, or images, that the gate computes in float64.
_COPIES, _CHECKED, _CHECKED_IMAGES = 4, 512, 4
# (positions, columns of the product, inputs, warps, stages, programs per multiprocessor)
_GRID = (
    *((128, 256, 64, 8, 4, 1), (128, 256, 64, 8, 3, 1), (128, 128, 64, 4, 3, 2)),
    *((128, 128, 64, 4, 2, 2), (64, 256, 64, 4, 4, 1), (64, 128, 64, 4, 4, 2)),
    *((64, 64, 64, 4, 4, 3), (128, 64, 64, 4, 4, 2)),
)


def run(args: argparse.Namespace) -> Iterator[Case]:
    """Check and time shape by shape.

    Raises:
        UsageError: if the kernel does not run on this device.
        GateError: if a configuration computes something else than float64.
    """
    device = torch.device(args.device)
    layers = [layer for layer in LAYERS if any(word in layer.name for word in args.layers)]
    with torch.autocast(device.type, enabled=False):
        for layer, dendrites in itertools.product(layers, args.dendrites):
            copies = min(_COPIES, math.ceil(2**27 / math.prod(layer.x)))
            tensors = neurons.draw(layer, dendrites, torch.bfloat16, device, args.seed, copies)
            given = tensors.inputs[0], tensors.weight, tensors.dendrites[0]
            if can_fuse(*given, layer.geometry):
                yield _measure(args, tensors, dendrites)
            elif device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
                raise UsageError("the fused kernel runs on Hopper GPUs: --device cuda")


@torch.no_grad()
def _measure(args: argparse.Namespace, tensors: Tensors, dendrites: int) -> Case:
    layer, device = tensors.layer, tensors.weight.device
    calls: dict[str, Callable[[int], object]] = {}

    def provider(neuron: Callable[..., Tensor]) -> Callable[[int], Tensor]:
        def call(turn: int) -> Tensor:
            x = tensors.inputs[turn % len(tensors.inputs)]
            with torch.no_grad():
                return neuron(x, tensors.weight, tensors.bias, *tensors.dendrites)

        return call

    calls["plain"] = provider(neurons.plain(layer))
    calls["packed"] = provider(neurons.forced(layer, Strategy.PACKED))
    for blocks in _configurations(tensors, dendrites):
        calls[_name(blocks)] = _fused(tensors, blocks)
    require(_faults(tensors, calls))
    repeated = {
        name: repeated_call(call, len(tensors.inputs), device, True) for name, call in calls.items()
    }
    times = interleave(repeated, device, args.seconds, dict.fromkeys(calls, 1), lambda _: None)
    each = {name: [t / len(tensors.inputs) for t in own] for name, own in times.items()}
    return _case(tensors, dendrites, each)


def _configurations(tensors: Tensors, dendrites: int) -> Iterator[Blocks]:
    """Yield what is chosen, and then whatever else the grid has."""
    chosen = _chosen(tensors, dendrites)
    roles = max(2, power_of_two(dendrites + 1))
    grid = [
        Blocks(p, columns // roles, min(depth, chosen.inputs), *rest)
        for p, columns, depth, *rest in _GRID
    ]
    yield from dict.fromkeys((chosen, *grid))


def _chosen(tensors: Tensors, dendrites: int) -> Blocks:
    layer, size = tensors.layer, tensors.weight.element_size()
    neurons, channels = layer.weight[:2]
    form = layer.geometry
    route = _route(tensors) if form.spatial else Route.POINTWISE
    if route is Route.POINTWISE and tensors.grad.stride(form.channel_axis) == 1:
        return neuron_blocks(_positions(layer), neurons, channels, dendrites, size)
    read = math.prod(layer.weight[1:]) if route is Route.PATCHES else channels
    whole = form.groups == 1 and form.stride[1] == 1
    group = neurons // form.groups
    return conv_neuron_blocks(_positions(layer), group, read, dendrites, size, whole)


def _route(tensors: Tensors) -> Route:
    found = route_of(
        tensors.inputs[0], tensors.weight, tensors.dendrites[0], tensors.layer.geometry
    )
    assert found is not None, "the caller asks `can_fuse`"
    return found


def _positions(layer: Layer) -> int:
    return math.prod(layer.out) // layer.weight[0]


def _fused(tensors: Tensors, blocks: Blocks) -> Callable[[int], Tensor]:
    from pbfx_kernels.fused_convolution import fused_convolution, laid_out
    from pbfx_kernels.fused_neuron import fused_neuron
    from pbfx_kernels.fused_neuron import interleave as side_by_side

    layer, weight = tensors.layer, tensors.weight.detach()
    v, *rest = (t.detach() for t in tensors.dendrites)
    links, out = (tensors.bias.detach(), *rest, "tanh"), torch.empty_like(tensors.grad)
    if layer.geometry.spatial:
        route, (*_, high, wide) = _route(tensors), layer.weight
        weights, form = laid_out(route, weight, v), layer.geometry
    else:
        weights = side_by_side(weight, v)

    def call(turn: int) -> Tensor:
        x = tensors.inputs[turn % len(tensors.inputs)].detach()
        if layer.geometry.spatial:
            fused_convolution(route, x, weights, (high, wide), *links, form, out, None, blocks)
        else:
            fused_neuron(x, weights, *links, out, None, blocks)
        return out

    return call


def _faults(tensors: Tensors, calls: dict[str, Callable]) -> list[str]:
    layer = tensors.layer
    x, *rest = tensors.inputs[0], tensors.weight, tensors.bias, *tensors.dendrites
    last = slice(-(_CHECKED_IMAGES if layer.geometry.spatial else _CHECKED), None)
    x, *rest = (t.detach().double() for t in (x[last], *rest))
    wanted = {"plain": layer.soma(x, *rest[:2]), "": neurons.loop(layer)(x, *rest)}
    faults = []
    for name, call in calls.items():
        reference = wanted.get(name, wanted[""])
        fault = output_fault(call(0)[last], reference, "bfloat16")
        if fault:
            faults.append(f"  {layer.name}, {name}: {fault}")
    return faults


def _case(tensors: Tensors, dendrites: int, times: dict[str, list[float]]) -> Case:
    cells, rows, layer = [], [], tensors.layer
    chosen = _name(_chosen(tensors, dendrites))
    best = min((n for n in times if n.startswith("(")), key=lambda n: Quantiles.of(times[n]).p50)
    for name, values in times.items():
        own, plain = Quantiles.of(values), ratios(values, times["plain"])
        mark = "chosen" * (name == chosen) + " best" * (name == best)
        cells.append((name, milliseconds(own.p50), f"{multiple(plain.p50)}x", mark.strip()))
        rows.append(
            {
                "layer": layer.name,
                "positions": _positions(layer),
                "neurons": layer.weight[0],
                "inputs": math.prod(layer.weight[1:]),
                "dendrites": dendrites,
                "provider": name,
                "chosen": name == chosen,
                "us_p20": own.p20 * 1e6,
                "us_p50": own.p50 * 1e6,
                "us_p80": own.p80 * 1e6,
                "x_plain": plain.p50,
                "rounds": len(values),
            }
        )
    title = f"{layer.name}, D = {dendrites}: (positions, neurons, inputs, warps, stages, resident)"
    return Case(title, ("", "ms", "x plain", ""), cells, [], rows)


def _name(blocks: Blocks) -> str:
    sizes = blocks.positions, blocks.neurons, blocks.inputs
    return str((*sizes, blocks.warps, blocks.stages, blocks.resident))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--layers", nargs="+", default=[""], metavar="WORDS", help="as of kernels")
    parser.add_argument("--dendrites", nargs="+", type=natural, default=[1, 3], metavar="D")
    parser.add_argument(
        "--seconds", type=positive, default=0.3, help="of timing per case (default 0.3)"
    )


BENCHMARK = Benchmark(
    "tune", "configurations of the fused neuron kernels", COLUMNS, add_arguments, run
)
