"""What both *depthwise* kernels are told of a site: planes, their form, and how they are cut up."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pbfx_kernels.depthwise_configs import UNROLLED_TAPS, WARPS, Strips, depthwise_strips
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import ceiling, fast_activations

# Elements of an image, with what lies in between, that 32 bits can count; padding goes below zero.
_SHORT = 2**30


@dataclass(frozen=True, slots=True)
class Planes:
    """A convolution over two dimensions, as which one over a single dimension is seen too.

    Attributes:
        form: stride, padding, dilation and taps, each down and along.
        channels_last: whether the channels are neighbours in memory; else columns are.
        added: the axis that a tensor over a single dimension lacks, or None over two.
        up: rows and columns from one of the input to the next; above one in the transpose of a
            convolution with strides.
    """

    form: tuple[int, ...]
    channels_last: bool
    added: int | None
    up: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, x: Tensor, geometry: Geometry, taps: tuple[int, ...]) -> "Planes":
        """Describe a site by its input, `(B, N, *spatial)`, the batch optional."""
        axis = geometry.channel_axis
        channels_last = x.stride(axis) == 1 and x.shape[axis] > 1
        each = geometry.stride, geometry.padding, geometry.dilation, taps
        if geometry.spatial == 2:
            return cls(tuple(n for pair in each for n in pair), channels_last, None)
        pairs = zip((n for (n,) in each), (1, 0, 1, 1), strict=True)
        if channels_last:
            # Patches lie along the only dimension.
            return cls(tuple(n for pair in pairs for n in pair), channels_last, -1)
        return cls(tuple(n for n, one in pairs for n in (one, n)), channels_last, -2)

    def view(self, tensor: Tensor) -> Tensor:
        """Return `tensor` as `(B, N, H, W)`."""
        if self.added is not None:
            tensor = tensor.unsqueeze(self.added)
        return tensor if tensor.dim() == 4 else tensor[None]

    def transposed(self) -> "Planes":
        """Describe the convolution of the error that gives the input's gradient, taps reversed."""
        stride, padding, dilation, taps = (self.form[i : i + 2] for i in range(0, 8, 2))
        reach = ((t - 1) * d for t, d in zip(taps, dilation, strict=True))
        padding = tuple(r - p for r, p in zip(reach, padding, strict=True))
        form = (1, 1, *padding, *dilation, *taps)
        return dataclasses.replace(self, form=form, up=(stride[0], stride[1]))

    def strips(self, out: Tensor, roles: int) -> Strips:
        """Choose the configuration of a kernel; `out` as of `view`."""
        form = self.form, self.up
        return depthwise_strips(tuple(out.shape), roles, *form, self.channels_last)

    def cut(self, out: Tensor, x: Tensor, strips: Strips) -> "Cut":
        """Cut an output into patches; tensors as of `view`."""
        images, neurons, height, width = out.shape
        down, across = ceiling(height, strips.rows), width // strips.columns
        count = images * down * across
        return Cut(
            (ceiling(count, strips.strips), ceiling(neurons, strips.neurons)),
            (count, down, across, height, neurons, *x.shape[2:]),
        )

    def constants(self, strips: Strips, x: Tensor, *others: Tensor) -> dict[str, Any]:
        """Return what both kernels are compiled for; tensors, the input first, as of `view`."""
        tall, wide = self.form[-2:]
        unrolled = wide <= strips.unrolled and tall <= UNROLLED_TAPS
        strips_in = dataclasses.replace(strips, columns=strips.columns // self.up[1])
        return {
            "FAST": fast_activations(x),
            "EVEN_N": x.shape[1] % strips.neurons == 0,
            "LONG": _is_long(x, *others),
            "FORM": "patch" if unrolled else "strip" if tall <= UNROLLED_TAPS else "loop",
            "WIDE": is_wide(strips_in, x),
            "ROWS": strips.rows,
            "COLUMNS": strips.columns,
            "LEVELS": strips.columns.bit_length() - 1,
            "BLOCK_S": strips.strips,
            "BLOCK_N": strips.neurons,
            "num_warps": WARPS,
        }


class Cut(NamedTuple):
    """An output in patches.

    Attributes:
        tiles: of patches, and of neurons.
        sizes: what kernels are told: patches, those below one another and side by side in an image,
            rows of the output, neurons, and height and width of the input.
    """

    tiles: tuple[int, int]
    sizes: tuple[int, ...]


def is_patched(taps: tuple[int, ...]) -> bool:
    """Return whether all taps of a kernel are unrolled, as its gradients ask for."""
    return max(taps) <= 3


def transposes(geometry: Geometry, shape: tuple[int, ...], taps: tuple[int, ...]) -> bool:
    """Return whether `depthwise_input_gradient` knows a convolution.

    Args:
        geometry: N groups.
        shape: of the input, `(B, N, *spatial)`, the batch optional.
        taps: of the kernel.
    """
    along = zip(shape[-geometry.spatial :], geometry.stride, strict=True)
    even = all(step in (1, 2, 4) and size % step == 0 for size, step in along)
    return is_patched(taps) and even


def by_tap(weight: Tensor) -> Tensor:
    """Return `(roles, taps, N)` of `(roles, N, 1, *kernel)`, float32, contiguous."""
    turned = weight.flatten(2).transpose(1, 2)
    return torch.empty(turned.shape, dtype=torch.float32, device=weight.device).copy_(turned)


def pointed(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return `tensor` without gaps, or `other` for None: a pointer has to be one, read or not."""
    return other if tensor is None else tensor.contiguous()


def is_wide(strips: Strips, *tensors: Tensor) -> bool:
    """Return whether the columns of a patch of `(B, N, H, W)` can be loaded as vectors."""
    columns = strips.columns
    return (columns, strips.neurons) in ((2, 1), (4, 1), (8, 1)) and all(
        t.stride(3) == 1 and not any(n % columns for n in (t.shape[3], *t.stride()[:3]))
        for t in tensors
    )


def _is_long(*tensors: Tensor) -> bool:
    """Return whether an image of one of these tensors, `(B, N, H, W)`, needs 64 bits to walk."""
    return any(
        sum(size * step for size, step in zip(t.shape[1:], t.stride()[1:], strict=True)) >= _SHORT
        for t in tensors
    )
