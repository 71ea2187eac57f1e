"""Positions and neurons: every site's tensors as one grid, whatever their shape and strides.

    element (p, n) of a tensor lies at (p // S) * outer + (p % S) * inner + n * neuron

S is the number of positions per image for a convolution in NCHW, and 1 wherever the positions of
all tensors can be walked with a single stride: linear ops, NHWC, unbatched inputs. Kernels see
nothing else of a site's geometry.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pbfx_kernels import walking
from pbfx_kernels.walking import REMEMBERED, Sizes, walk
from pbfx_kernels.walking import regular as regular


@dataclass(frozen=True, slots=True)
class Grid:
    """How some tensors of equal shape `(*soma)` are walked together.

    Attributes:
        positions: P.
        neurons: N.
        inner: S, positions that share one `outer` step; 1 if all positions have one stride.
        strides: `(outer, inner, neuron)` per tensor, in elements.
    """

    positions: int
    neurons: int
    inner: int
    strides: tuple[tuple[int, int, int], ...]

    @property
    def channels_last(self) -> bool:
        """Whether the first tensor's neurons are neighbours in memory."""
        return self.strides[0][2] == 1

    @property
    def mixed(self) -> bool:
        """Whether the neurons are neighbours in some tensors and not in others."""
        return len({neuron == 1 for _, _, neuron in self.strides}) > 1


def grid_of(channel_axis: int, *tensors: Tensor) -> Grid:
    """Find the strides with which `tensors` are walked.

    Args:
        channel_axis: axis of the neurons, negative (`Geometry.channel_axis`).
        tensors: of one shape, not empty, each `regular`.

    Returns:
        The grid, with strides in the order of `tensors`.
    """
    return grid_of_strides(channel_axis, tensors[0].shape, *(t.stride() for t in tensors))


@functools.lru_cache(REMEMBERED)
def grid_of_strides(channel_axis: int, shape: Sizes, *strides: Sizes) -> Grid:
    """Find the strides with which tensors are walked; see `grid_of`.

    Args:
        channel_axis: as there.
        shape: of the tensors.
        strides: of each tensor.
    """
    walked = walk(shape, channel_axis, *strides)
    positions, neurons = walked.outer * walked.inner, shape[channel_axis]
    if walked.outer == 1:
        single = tuple((inner, 0, neuron) for _, neuron, inner in walked.strides)
        return Grid(positions, neurons, 1, single)
    found = tuple((outer, inner, neuron) for outer, neuron, inner in walked.strides)
    return Grid(positions, neurons, walked.inner, found)


def is_regular(tensor: Tensor, channel_axis: int) -> bool:
    """Return whether the axes before the channels merge into one, and likewise those after them."""
    return walking.is_regular(tensor.shape, tensor.stride(), channel_axis)


def writable(like: Tensor, channel_axis: int) -> Tensor:
    """Return memory laid out as `like` where a kernel can walk that, else contiguous."""
    out = torch.empty_like(like)
    if is_regular(out, channel_axis):
        return out
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def stack_like(out: Tensor, count: int) -> Tensor:
    """Return memory for `(count, *out.shape)`, each slice laid out as `out`, which is dense."""
    return out.new_empty_strided((count, *out.shape), (out.numel(), *out.stride()))


def channels_last(x: Tensor) -> Tensor:
    """Return `(B, C, H, W)` with the channels as neighbours: `x` itself where they are.

    For what runs inside ops whose kernels run: it launches one, and has no gradient.

    Args:
        x: any strides, any dtype of the kernels.
    """
    form = torch.channels_last
    counted = x.numel() > 0 and math.prod(x.shape[1:]) < 2**31
    if not (x.is_cuda and counted and x.is_contiguous()) or x.is_contiguous(memory_format=form):
        return x.contiguous(memory_format=form)
    from pbfx_kernels.nhwc import transposed

    return transposed(x)


def strides_of(soma: Tensor) -> tuple[int, ...]:
    """Return the strides of `empty_like(soma)`: channels-last stays so, gaps and overlaps close."""
    return torch.empty_like(soma, device="meta").stride()


def stack_strides(soma: Tensor) -> tuple[int, ...]:
    """Return the strides of `(D, *soma)` whose every slice is laid out as `empty_like(soma)`."""
    return (soma.numel(), *strides_of(soma))


def laid_out(result: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Copy a result where it does not have the strides that the fake promised."""
    if result.stride() == strides:
        return result
    if not result.numel():
        return result.new_empty_strided(result.shape, strides)
    if all(
        size == 1 or found == promised
        for size, found, promised in zip(result.shape, result.stride(), strides, strict=True)
    ):
        # The same elements in the same places.
        return result.as_strided(result.shape, strides)
    return result.new_empty_strided(result.shape, strides).copy_(result)
