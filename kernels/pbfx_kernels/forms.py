"""What a graph compiler puts in the place of `pbfx::dendrites`: a pure choice, and plain torch.

    fused    `pbfx::perforated_linear` and the like: soma and dendrites from one read of the input
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
from pbfx_kernels.problem import Problem
from pbfx_kernels.reference import accumulation_dtype, product
from pbfx_kernels.strategy import (
    IMAGE_CHANNELS,
    can_split,
    fallback_reason,
    fuses,
    is_depthwise,
    streams,
)

# Multiply-adds per dendrite above which a linear op is all products, and the extra passes of a
# compiler's epilogue cost more than they save.
_LARGE_PRODUCT = 2 * 10**10
# Inputs of linear ops whose preactivations would be most of the traffic; see `strategy`.
_FEW_INPUTS = 256
# Bytes of preactivations that are worth an op in a training step: below, a library's kernels and
# ours take the device as long. MNIST's net at batch 32, sites of 4 and 7 MiB: 290 and 286 µs. Of
# convolutions less: conv1 at batch 64, 8 MiB, takes 108 µs for the 128 of *packed*.
_OP_BYTES, _CONV_OP_BYTES = 16 * 2**20, 15 * 2**19
# Bytes of output below which whatever follows costs a launch and no bandwidth.
_SMALL_OUTPUT = 4 * 2**20
# Taps of a convolution of images from which a library has nothing that is as good as one kernel.
_MANY_TAPS = 25
# Neurons up to which D convolutions are faster than one with D times the outputs.
_LOOPED_NEURONS, _LOOPED_CHANNELS = 64, 32
# Channels of windows in NCHW up to which one kernel is level with a library in TF32.
_MOST_TF32_CHANNELS = 64
# Positions that are worth a sum of their own, and sums enough to be a loop's work: a compiler cuts
# longer ones once more if there are fewer than some 64 for each multiprocessor.
_LEAST_POSITIONS, _ENOUGH_SUMS = 32, 2**15


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
    written = problem.positions * problem.neurons * problem.dtype.itemsize
    # Inference gains twice as much: it keeps nothing in the place of the preactivations.
    least = _CONV_OP_BYTES if problem.geometry.spatial else _OP_BYTES
    worth_it = not training or problem.dendrites * written >= least
    if with_soma and worth_it and fuses(problem) and not _stacks_well(problem, training):
        return Form.FUSED
    weights = (problem.dendrites + 1) * problem.neurons * problem.inputs * problem.dtype.itemsize
    if with_soma and not training and weights >= _OP_BYTES and streams(problem):
        return Form.FUSED
    if fallback_reason(problem) is not None or problem.dendrites == 0:
        # Our kernels would not run: the compiler's are better than the reference.
        return Form.PACKED
    if is_depthwise(problem):
        return _depthwise_form(problem, training, with_soma)
    geometry = problem.geometry
    if geometry.spatial:
        images = (
            problem.channels <= IMAGE_CHANNELS and problem.taps >= _MANY_TAPS and can_split(problem)
        )
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
    thin = problem.inputs <= _FEW_INPUTS and written > _SMALL_OUTPUT
    if thin and not training and (not absorbs or problem.inputs <= _FEW_INPUTS // 4):
        return Form.KERNEL
    return Form.PACKED


def _stacks_well(problem: Problem, training: bool) -> bool:
    """Return whether a library's convolution over stacked weights, with a compiler's epilogue, is
    ahead of one kernel: in TF32, where windows are read in NHWC, or have many channels, or would be
    computed again in a backward.

    281 µs for *fused*'s 308 at 3x3 over 64 channels in NHWC, level in NCHW; 1804 for the 2284 of a
    step of MNIST's conv2 at batch 1024.
    """
    if not problem.geometry.spatial or problem.dtype.itemsize == 2 or problem.taps == 1:
        return False
    if problem.channels <= IMAGE_CHANNELS:
        return False
    return training or problem.channels_last or problem.channels > _MOST_TF32_CHANNELS


def _depthwise_form(problem: Problem, training: bool, with_soma: bool) -> Form:
    """Choose for neurons that read a channel of their own: a library is slow at several to one.

    A convolution with three outputs for each channel takes 3 to 14 times what three of them do.
    """
    if with_soma:
        return Form.FUSED
    return Form.KERNEL if problem.dendrites > 1 and not training else Form.LOOPED


def parts_of_sum(shape: Sequence[Any], channel_axis: int) -> int | None:
    """Return how a compiler had better sum `dT`: within parts of an image first, then over them.

    The sum within parts shares the loop of what else reads the error there, `(part, neuron)` by
    positions; a sum over everything is a pass of its own over error and preactivations, and as many
    small kernels after it as there are dendrites.

    Args:
        shape: of the soma's output, sizes that are dynamic included.
        channel_axis: of the neurons, negative.

    Returns:
        How many parts there are in an image of a convolution (1), or along the last axis of the
        positions of a linear op; None for one sum.
    """
    neurons = len(shape) + channel_axis
    if channel_axis < -1:
        extents = shape[neurons + 1 :]
        known = neurons > 0 and all(isinstance(size, int) for size in extents)
        # Of a few positions the partial sums are as many as what is summed.
        return 1 if known and math.prod(extents) >= _LEAST_POSITIONS else None
    rows = shape[-2] if len(shape) > 1 else None
    if not isinstance(rows, int):
        return None
    sums = math.prod(size for size in (*shape[:-2], shape[-1]) if isinstance(size, int))
    parts = [n for n in range(1, rows // _LEAST_POSITIONS + 1) if rows % n == 0]
    enough = [n for n in parts if n * sums >= _ENOUGH_SUMS]
    return (enough[:1] or parts[-1:] or [None])[0]


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
    shape: Sequence[Any] | None = None,
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
        shape: of `soma`, if a backward follows that a compiler is to fuse; see `parts_of_sum`.

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
        z = [widened(product(x, weight[d], None, geometry), products) for d in range(count)]
    else:
        stacked = product(x, _stacked(weight, geometry, count, neurons), None, geometry)
        z = _apart(widened(stacked, products), geometry, count, neurons)
    lined_up = (neurons, *(1,) * geometry.spatial)
    links = _links(to_soma.to(wide), soma, geometry, count, neurons, shape)
    # Index by index, not unbound: a backward then keeps one tensor of each and not all its parts,
    # which a compiler's partitioner saves apart where they are less than a quarter.
    if bias is not None:
        bias = bias.detach().to(wide).reshape((count, *lined_up))
    cascade = to_dendrite.detach().to(wide).reshape((count, count, *lined_up))
    activations: list[Any] = []
    negated = None
    for d in range(count):
        z_d = z[d] if bias is None else z[d] + bias[d]
        for e, (a_e, link) in enumerate(zip(activations, [cascade[d]] * d, strict=True)):
            z_d = z_d + link[e] * a_e
        a_d = activate(activation, z_d)
        added = links[d] * a_d
        # Kept negated, for the sake of signed zeros: see `reference.dendrites`.
        negated = 0.0 - added if negated is None else negated - added
        activations.append(a_d)
    out = widened(soma, dtype) - negated
    return out if dtype is wide else out.to(dtype), activations


def _links(
    to_soma: Any,
    soma: Any,
    geometry: Geometry,
    count: int,
    neurons: int,
    shape: Sequence[Any] | None,
) -> Sequence[Any]:
    """Return T_d, D tensors that broadcast over `soma`, of which autograd sums as is best."""
    lined_up = (neurons, *(1,) * geometry.spatial)
    parts = None if shape is None else parts_of_sum(shape, geometry.channel_axis)
    if shape is None or parts is None:
        return to_soma.reshape((count, *lined_up)).unbind()
    if geometry.spatial:
        # Links for each image: (B, N, 1, ...).
        each = to_soma.reshape((count, 1, *lined_up))
        return each.expand(count, soma.size(0), *lined_up).unbind()
    # And for each part of its rows: (..., parts, 1, N), of which every row of a part reads one.
    before = [soma.size(axis) for axis in range(len(shape) - 2)]
    each = to_soma.reshape((count, *(1,) * len(before), 1, 1, neurons))
    # A backward of `unbind` is one stack, and of an index a sum of padded tensors.
    each = each.expand(count, *before, parts, 1, neurons).unbind()
    rows = shape[-2] // parts
    return [each[d].expand(*before, parts, rows, neurons).flatten(-3, -2) for d in range(count)]


def _stacked(weight: Any, geometry: Geometry, count: int, neurons: int) -> Any:
    """Return one weight of D."""
    groups = geometry.groups
    if count == 1:
        return weight[0]
    if geometry.transposed:
        return weight.movedim(0, 1).flatten(1, 2)
    if groups == 1:
        return weight.flatten(0, 1)
    # The channels of a group lie together, so the order is (group, d, neuron of group).
    return weight.unflatten(1, (groups, neurons // groups)).movedim(1, 0).flatten(0, 2)


def _apart(z: Any, geometry: Geometry, count: int, neurons: int) -> Sequence[Any]:
    """Take the product over stacked weights apart into those of the D dendrites."""
    groups, axis = geometry.groups, geometry.channel_axis
    if count == 1:
        return [z]
    if groups == 1:
        return [z.narrow(axis, d * neurons, neurons) for d in range(count)]
    z = z.unflatten(axis, (groups, count, neurons // groups))
    return [z.select(axis - 1, d).flatten(axis - 1, axis) for d in range(count)]


def stacked_activations(activations: list[Any], dtype: torch.dtype) -> Tensor:
    """Return the activations as the op gives them: `(D, *soma)`, without gradient."""
    return torch.stack([a.detach().to(dtype) for a in activations])
