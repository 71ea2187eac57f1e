"""The fused neuron kernel in every configuration that might be the best, shape by shape.

What wins here is what `pbfx_kernels.fused_configs.neuron_blocks` should choose. Weights are laid
side by side once, before the clock starts: `python -m benchmarks kernels` counts that too.
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
from pbfx_kernels.fused_configs import Blocks, neuron_blocks
from pbfx_kernels.strategy import Strategy, can_fuse

COLUMNS = (
    *("layer", "positions", "neurons", "inputs", "dendrites", "provider", "chosen"),
    *("us_p20", "us_p50", "us_p80", "x_plain", "rounds"),
)
_COPIES, _CHECKED = 4, 512
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
    layers = [
        layer
        for layer in LAYERS
        if not layer.geometry.spatial and any(word in layer.name for word in args.layers)
    ]
    with torch.autocast(device.type, enabled=False):
        for layer, dendrites in itertools.product(layers, args.dendrites):
            copies = min(_COPIES, math.ceil(2**27 / math.prod(layer.x)))
            tensors = neurons.draw(layer, dendrites, torch.bfloat16, device, args.seed, copies)
            if can_fuse(tensors.inputs[0], tensors.weight, tensors.dendrites[0]):
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
    for blocks in _configurations(layer, dendrites):
        calls[_name(blocks)] = _fused(tensors, blocks)
    require(_faults(tensors, calls))
    repeated = {
        name: repeated_call(call, len(tensors.inputs), device, True) for name, call in calls.items()
    }
    times = interleave(repeated, device, args.seconds, dict.fromkeys(calls, 1), lambda _: None)
    each = {name: [t / len(tensors.inputs) for t in own] for name, own in times.items()}
    return _case(layer, dendrites, each)


def _configurations(layer: Layer, dendrites: int) -> Iterator[Blocks]:
    """Yield what is chosen, and then whatever else the grid has."""
    chosen = neuron_blocks(layer.x[0], layer.weight[0], layer.weight[1], dendrites)
    roles = 2 if dendrites == 1 else 4
    grid = [Blocks(p, columns // roles, *rest) for p, columns, *rest in _GRID]
    yield from dict.fromkeys((chosen, *grid))


def _fused(tensors: Tensors, blocks: Blocks) -> Callable[[int], Tensor]:
    from pbfx_kernels.fused_neuron import fused_neuron
    from pbfx_kernels.fused_neuron import interleave as side_by_side

    v, c, to_soma, to_dendrite = (t.detach() for t in tensors.dendrites)
    weights = side_by_side(tensors.weight.detach(), v)
    bias, out = tensors.bias.detach(), torch.empty_like(tensors.grad)

    def call(turn: int) -> Tensor:
        x = tensors.inputs[turn % len(tensors.inputs)].detach()
        fused_neuron(x, weights, bias, c, to_soma, to_dendrite, "tanh", out, None, blocks)
        return out

    return call


def _faults(tensors: Tensors, calls: dict[str, Callable]) -> list[str]:
    layer = tensors.layer
    x, *rest = tensors.inputs[0], tensors.weight, tensors.bias, *tensors.dendrites
    x, *rest = (t.detach().double() for t in (x[-_CHECKED:], *rest))
    wanted = {"plain": layer.soma(x, *rest[:2]), "": neurons.loop(layer)(x, *rest)}
    faults = []
    for name, call in calls.items():
        reference = wanted.get(name, wanted[""])
        fault = output_fault(call(0)[-_CHECKED:], reference, "bfloat16")
        if fault:
            faults.append(f"  {layer.name}, {name}: {fault}")
    return faults


def _case(layer: Layer, dendrites: int, times: dict[str, list[float]]) -> Case:
    cells, rows = [], []
    chosen = _name(neuron_blocks(layer.x[0], layer.weight[0], layer.weight[1], dendrites))
    best = min((n for n in times if n.startswith("(")), key=lambda n: Quantiles.of(times[n]).p50)
    for name, values in times.items():
        own, plain = Quantiles.of(values), ratios(values, times["plain"])
        mark = "chosen" * (name == chosen) + " best" * (name == best)
        cells.append((name, milliseconds(own.p50), f"{multiple(plain.p50)}x", mark.strip()))
        rows.append(
            {
                "layer": layer.name,
                "positions": layer.x[0],
                "neurons": layer.weight[0],
                "inputs": layer.weight[1],
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
    "tune", "configurations of the fused neuron kernel", COLUMNS, add_arguments, run
)
