"""What a graph compiler puts in the place of `pbfx::dendrites`: a pure choice, and plain torch.

    fused    `pbfx::perforated_linear`: soma and dendrites from one read of the input
    kernel   the op itself: a library product or one kernel, with an epilogue of ours
    packed   one library product over stacked weights; the rest is for the compiler to fuse
    looped   one library product per dendrite; likewise

A compiler cannot look into an op. In the last two forms it fuses the cascade with the activation,
the residual or the norm that follows, and in training with the sum for `dT`; our own kernels are
faster where the products are large, and where a single kernel avoids the preactivations altogether.
The thresholds are read off `benchmarks/results/kernels.csv`; docs/compile.md has the rules.

`dendrites_in_graph` is the reference once more, written so that it also takes `fx.Proxy`s: every
shape that it needs is an argument. It is perforated by detaching what dendrites read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from pbfx_kernels.activations import activate
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.reference import accumulation_dtype, product
from pbfx_kernels.strategy import Problem, can_split, fallback_reason, fuses

# Multiply-adds per dendrite above which a linear op is all products, and the extra passes of a
# compiler's epilogue cost more than they save.
_LARGE_PRODUCT = 2 * 10**10
# Inputs of linear ops whose preactivations would be most of the traffic; see `strategy`.
_FEW_INPUTS = 256
# Bytes of output below which whatever follows costs a launch and no bandwidth.
_SMALL_OUTPUT = 4 * 2**20
# Taps of a convolution of images from which a library has nothing that is as good as one kernel.
_MANY_TAPS = 25
# Neurons up to which D convolutions are faster than one with D times the outputs.
_LOOPED_NEURONS, _LOOPED_CHANNELS = 64, 32
# Positions of an image, or tokens of a sequence, that are worth a sum of their own.
_LEAST_POSITIONS = 32


class Form(Enum):
    """How the dendrites of a site stand in a compiled graph."""

    FUSED = "fused"
    KERNEL = "kernel"
    PACKED = "packed"
    LOOPED = "looped"


def choose_form(problem: Problem, training: bool, absorbs: bool, with_soma: bool = False) -> Form:
    """Choose the form of a site in a graph that a compiler will fuse.

    Args:
        problem: the site.
        training: whether a backward follows, whose sum for `dT` the compiler fuses too.
        absorbs: whether what reads the output can be fused with it.
        with_soma: whether the soma is a linear op of the graph that nothing else reads.
    """
    if with_soma and fuses(problem):
        return Form.FUSED
    if fallback_reason(problem) is not None or problem.dendrites == 0:
        # Our kernels would not run: the compiler's are better than the reference.
        return Form.PACKED
    geometry = problem.geometry
    if geometry.spatial:
        images = problem.channels <= 3 and problem.taps >= _MANY_TAPS and can_split(problem)
        if images and not training:
            return Form.KERNEL
        narrow = problem.neurons <= _LOOPED_NEURONS and problem.channels > _LOOPED_CHANNELS
        if narrow and problem.taps > 1 and geometry.groups == 1 and problem.dtype.itemsize == 2:
            return Form.LOOPED
        return Form.PACKED
    work = problem.positions * problem.neurons * problem.inputs
    if work >= _LARGE_PRODUCT:
        return Form.KERNEL
    # Nothing is fused with it, nothing has to be kept, and the preactivations are the traffic.
    written = problem.positions * problem.neurons * problem.dtype.itemsize
    thin = problem.inputs <= _FEW_INPUTS and written > _SMALL_OUTPUT
    if thin and not training and (not absorbs or problem.inputs <= _FEW_INPUTS // 4):
        return Form.KERNEL
    return Form.PACKED


def sums_by_image(shape: Sequence[Any], channel_axis: int) -> bool:
    """Return whether a compiler had better sum `dT` over each image first, and then over images.

    It then sums in the loop that computes the error further down, `(image, neuron)` by positions,
    instead of in a pass of its own over the error and the preactivations.

    Args:
        shape: of the soma's output, sizes that are dynamic included.
        channel_axis: of the neurons, negative.
    """
    neurons = len(shape) + channel_axis
    inner = [size for axis, size in enumerate(shape) if axis not in (0, neurons)]
    known = neurons > 0 and all(isinstance(size, int) for size in inner)
    # Of a few positions the partial sums are as many as what is summed.
    return known and math.prod(inner) >= _LEAST_POSITIONS


def dendrites_in_graph(
    form: Form,
    soma: Any,
    x: Any,
    weight: Any,
    bias: Any,
    to_soma: Any,
    to_dendrite: Any,
    activation: str,
    geometry: Geometry,
    count: int,
    neurons: int,
    dtype: torch.dtype,
    products: torch.dtype | None = None,
    axes: int | None = None,
) -> tuple[Any, list[Any]]:
    """Compute a site's output in plain torch; arguments may be tensors or `fx.Proxy`s.

    Args:
        form: PACKED or LOOPED.
        soma: `(*soma)`.
        x: the soma's input.
        weight: V, `(D, *W)`.
        bias: c, `(D, N)`, or None.
        to_soma: T, `(D, N)`; alone of all it gets a gradient, beside `soma`.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma.
        count: D, at least 1.
        neurons: N.
        dtype: of `soma`.
        products: dtype of the products, `dtype` if None. Everything after them is as ever.
        axes: of `soma`, where the gradient of `to_soma` is to be summed image by image first (see
            `sums_by_image`); None for one sum.

    Returns:
        out: `(*soma)`, `dtype`.
        activations: a_d, `(*soma)` each, float32, or float64 for float64.

    Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
    """
    wide, products = accumulation_dtype(dtype), products or dtype
    x, weight = x.detach().to(products), weight.detach().to(products)

    def widened(value: Any, given: torch.dtype) -> Any:
        # Every node that is not there is compiled the faster.
        return value if given is wide else value.to(wide)

    # The bias is for the epilogue: a backward keeps what a library wrote, and a sum with the bias
    # would be a pass over it.
    if form is Form.LOOPED:
        z = [product(x, weight[d], None, geometry) for d in range(count)]
    else:
        z = _packed(x, weight, geometry, count, neurons)
    lined_up = (neurons, *(1,) * geometry.spatial)
    if bias is not None:
        bias = bias.detach().to(wide).reshape((count, *lined_up))
    links = to_soma.to(wide).reshape((count, *lined_up))
    if axes is not None:
        # One link for each image, of which autograd makes two sums.
        between = (1,) * (axes - 1 - len(lined_up))
        images = soma.size(0), *between, *lined_up
        links = links.reshape((count, 1, *between, *lined_up)).expand(count, *images)
    # A backward of `unbind` is one stack, and of an index a sum of padded tensors.
    links = links.unbind()
    cascade = to_dendrite.detach().to(wide).reshape((count, count, *lined_up))
    activations: list[Any] = []
    negated = None
    for d in range(count):
        z_d = widened(z[d], products)
        if bias is not None:
            z_d = z_d + bias[d]
        for e, a_e in enumerate(activations):
            z_d = z_d + cascade[d, e] * a_e
        a_d = activate(activation, z_d)
        added = links[d] * a_d
        # Kept negated, for the sake of signed zeros: see `reference.dendrites`.
        negated = 0.0 - added if negated is None else negated - added
        activations.append(a_d)
    out = widened(soma, dtype) - negated
    return out if dtype is wide else out.to(dtype), activations


def _packed(x: Any, weight: Any, geometry: Geometry, count: int, neurons: int) -> Sequence[Any]:
    """Return the D preactivations, without bias, of one product over stacked weights."""
    groups, axis = geometry.groups, geometry.channel_axis
    if count == 1:
        return [product(x, weight[0], None, geometry)]
    if geometry.transposed:
        stacked = weight.movedim(0, 1).flatten(1, 2)
    elif groups == 1:
        stacked = weight.flatten(0, 1)
    else:
        # The channels of a group lie together, so the order is (group, d, neuron of group).
        stacked = weight.unflatten(1, (groups, neurons // groups)).movedim(1, 0).flatten(0, 2)
    z = product(x, stacked, None, geometry)
    if groups == 1:
        return [z.narrow(axis, d * neurons, neurons) for d in range(count)]
    z = z.unflatten(axis, (groups, count, neurons // groups))
    return [z.select(axis - 1, d).flatten(axis - 1, axis) for d in range(count)]


def stacked_activations(activations: list[Any], dtype: torch.dtype) -> Tensor:
    """Return the activations as the op gives them: `(D, *soma)`, without gradient."""
    return torch.stack([a.detach().to(dtype) for a in activations])
