"""How kernels walk the tensors of a site: as (outer, neuron, inner), whatever their strides.

    element (o, n, i) lies at o * outer stride + n * neuron stride + i * inner stride

NCHW is (B, N, HxW). Whatever lets all positions be walked with one stride, such as a linear op,
NHWC or a single image, is (1, N, P). Every function here is pure and remembered: launching a kernel
then costs a look-up.
"""

import functools
import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# Of shapes and strides; a training loop meets a handful.
REMEMBERED = 4096

Sizes = tuple[int, ...]


class Walk(NamedTuple):
    """How tensors of one shape are walked together.

    Attributes:
        outer: steps around the neurons.
        inner: steps inside them.
        strides: (outer, neuron, inner) per tensor, in elements.
    """

    outer: int
    inner: int
    strides: tuple[tuple[int, int, int], ...]


@functools.lru_cache(REMEMBERED)
def walk(shape: Sizes, channel_axis: int, *strides: Sizes) -> Walk:
    """Find the strides with which tensors of one shape are walked.

    Args:
        shape: `(*soma)`, without empty axes.
        channel_axis: axis of the neurons, negative (`Geometry.channel_axis`).
        strides: of each tensor, each `regular`.
    """
    axis = len(shape) + channel_axis
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    found = []
    for each in strides:
        before = merged_stride(shape[:axis], each[:axis])
        after = merged_stride(shape[axis + 1 :], each[axis + 1 :])
        assert before is not None, "not regular"
        assert after is not None, "not regular"
        found.append((before, each[axis], after))
    if inner == 1:
        return Walk(1, outer, tuple((0, neuron, before) for before, neuron, _ in found))
    if outer == 1 or all(before == inner * after for before, _, after in found):
        return Walk(1, outer * inner, tuple((0, neuron, after) for _, neuron, after in found))
    return Walk(outer, inner, tuple(found))


def merged_stride(shape: Sizes, strides: Sizes) -> int | None:
    """Return the stride that walks all these axes as if they were one, or None.

    Axes of size 1 do not matter; the stride is 0 if there is only one position.
    """
    real = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    for (_, wide), (size, narrow) in itertools.pairwise(real):
        if wide != size * narrow:
            return None
    return real[-1][1] if real else 0


def regular(tensor: Tensor, channel_axis: int, stacked: bool = False) -> Tensor:
    """Return `tensor`, or a contiguous copy where the axes beside the neurons' do not merge.

    Args:
        tensor: `(*soma)`, or if `stacked` a stack of such, whose leading axis has any stride.
        channel_axis: axis of the neurons, negative.
        stacked: whether there is a leading axis that is not walked.
    """
    skip = int(stacked)
    fits = is_regular(tensor.shape[skip:], tensor.stride()[skip:], channel_axis)
    return tensor if fits else tensor.contiguous()


@functools.lru_cache(REMEMBERED)
def is_regular(shape: Sizes, strides: Sizes, channel_axis: int) -> bool:
    """Return whether the axes before the neurons' merge into one, and likewise those after it."""
    axis = len(shape) + channel_axis
    halves = slice(0, axis), slice(axis + 1, None)
    return all(merged_stride(shape[half], strides[half]) is not None for half in halves)


@functools.lru_cache(REMEMBERED)
def interleaved_strides(shape: Sizes, strides: Sizes, channel_axis: int) -> Sizes:
    """Return strides for a stack whose memory is one dense `(B, C * N, *spatial)`.

    So it is the output, or the gradient of the output, of one convolution without a copy.

    Args:
        shape: `(C, *soma)`.
        strides: of a tensor whose slices say in which order the axes lie in memory.
        channel_axis: axis of the neurons, negative.
    """
    channels = len(shape) + channel_axis
    order = sorted(range(1, len(shape)), key=lambda axis: -strides[axis])
    order.insert(order.index(channels), 0)
    found, dense = [0] * len(shape), 1
    for axis in reversed(order):
        found[axis] = dense
        dense *= max(shape[axis], 1)
    return tuple(found)


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below `number`, which is positive."""
    return 1 << (number - 1).bit_length()


def ceiling(number: int, divisor: int) -> int:
    """Divide two whole numbers and round up."""
    return -(-number // divisor)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of `tensor` current where it is not: Triton launches on the current one."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()
