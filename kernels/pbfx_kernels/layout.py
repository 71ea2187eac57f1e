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

from pbfx_kernels.walking import Sizes, merged_stride

# Of shapes and strides; a training loop meets a handful.
REMEMBERED = 4096


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
    axis = len(shape) + channel_axis
    positions, inner = math.prod(shape) // shape[axis], math.prod(shape[axis + 1 :])
    singles = [_merged(shape, each, axis, 0, len(shape)) for each in strides]
    found = []
    for each, single in zip(strides, singles, strict=True):
        outer = _merged(shape, each, axis, 0, axis)
        within = _merged(shape, each, axis, axis, len(shape))
        assert outer is not None, "not regular"
        assert within is not None, "not regular"
        if None not in singles:
            outer, within = single, 0
        found.append((outer, within, each[axis]))
    return Grid(positions, shape[axis], 1 if None not in singles else inner, tuple(found))


def is_regular(tensor: Tensor, channel_axis: int) -> bool:
    """Return whether the axes before the channels merge into one, and likewise those after them."""
    return _regular(tensor.shape, tensor.stride(), tensor.dim() + channel_axis)


@functools.lru_cache(REMEMBERED)
def _regular(shape: Sizes, strides: Sizes, axis: int) -> bool:
    halves = (
        _merged(shape, strides, axis, 0, axis),
        _merged(shape, strides, axis, axis, len(shape)),
    )
    return None not in halves


def regular(tensor: Tensor, channel_axis: int) -> Tensor:
    """Return `tensor`, or a contiguous copy where it cannot be walked as a grid."""
    return tensor if is_regular(tensor, channel_axis) else tensor.contiguous()


def _merged(shape: Sizes, strides: Sizes, axis: int, start: int, stop: int) -> int | None:
    """Merge the axes from `start` to `stop`, without the neurons' own."""
    kept = [i for i in range(start, stop) if i != axis]
    return merged_stride(tuple(shape[i] for i in kept), tuple(strides[i] for i in kept))


def writable(like: Tensor, channel_axis: int) -> Tensor:
    """Return memory laid out as `like` where a kernel can walk that, else contiguous."""
    out = torch.empty_like(like)
    if is_regular(out, channel_axis):
        return out
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def stack_like(out: Tensor, count: int) -> Tensor:
    """Return memory for `(count, *out.shape)`, each slice laid out as `out`, which is dense."""
    return out.new_empty_strided((count, *out.shape), (out.numel(), *out.stride()))
