"""The *packed* strategy: one library GEMM or convolution for all dendrites, one epilogue kernel.

    z = x [V_1; ...; V_D]ᵀ        out, a = epilogue(soma, z)

It works for every geometry and dtype that torch computes, and nothing beats a library at a large
GEMM. Its cost over the fused strategies is that `z`, D times the size of the output, is written and
read again. Very large sites are computed some images or rows at a time, so that the memory for `z`
is bounded. Chunks so small that `z` stays in the L2 cache were tried and are slower: libraries lose
more on the smaller products than the cache gives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import ceiling
from pbfx_kernels.layout import channels_last
from pbfx_kernels.reference import flatten_stack

# Bytes of `z` at a time: enough for a library to run at full speed.
CHUNK_BYTES = 256 * 2**20
# Elements of two bytes in 16.
_ALIGNED = 8
# Elements of x below which a launch costs more than an unaligned product.
_WORTH_COPYING = 2**18


def packed_dendrites(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    out: Tensor,
    kept: Tensor | None,
) -> None:
    """Write the neuron's output, and the activations if `kept` is given.

    Args:
        soma: `(*soma)`, not empty; its dtype is that of the computation, not float64.
        x: the soma's input; cast to the dtype of `soma`.
        weight: V, `(D, N, K)` or `(D, N, channels / groups, *kernel)`, D at least 1; likewise.
        bias: c, `(D, N)`, or None.
        to_soma: T, `(D, N)`.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma, not transposed.
        out: `(*soma)`, `layout.is_regular`; written.
        kept: `(D, *soma)`, each slice with the strides of `out`; written.
    """
    from pbfx_kernels.epilogue import dendrites_epilogue

    x, stacked = prepared(x.to(soma.dtype), weight.to(soma.dtype), geometry)
    for part in chunks(soma, weight.shape[0], geometry):
        dendrites_epilogue(
            soma[part],
            library(x[part], stacked, geometry),
            bias,
            to_soma,
            to_dendrite,
            activation,
            geometry,
            out[part],
            None if kept is None else kept[:, *part],
        )


def prepared(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Give a library operands that its fast kernels take, where copying them is cheap.

    Two-byte GEMMs need rows that start at multiples of 16 bytes, and two-byte convolutions are
    fast in NHWC only. Both copies cost a pass over `x`, the slow kernels several times the product.

    Args:
        x: the soma's input.
        weight: V, dtype of `x`.
        geometry: the form of the soma.

    Returns:
        x: with zeros appended to K, or in NHWC.
        stacked: of `stacked_weight`; with as many zeros, and rows of zeros at the end.
    """
    stacked = stacked_weight(weight, geometry.groups)
    if x.element_size() != 2:
        return x, stacked
    if geometry.spatial == 0:
        short, rows = -x.shape[-1] % _ALIGNED, -stacked.shape[0] % _ALIGNED
        if (short or rows) and x.numel() >= _WORTH_COPYING:
            return F.pad(x, (0, short)), F.pad(stacked, (0, short, 0, rows))
    elif prefers_nhwc(x.shape, x.element_size(), geometry):
        return channels_last(x), stacked
    return x, stacked


def prefers_nhwc(x: Sequence[int], element_size: int, geometry: Geometry) -> bool:
    """Return whether a library's convolutions of an input of shape `x` are much faster in NHWC."""
    images = geometry.spatial == 2 and geometry.groups == 1 and len(x) == 4
    return element_size == 2 and images and x[1] >= 8


def stacked_weight(weight: Tensor, groups: int) -> Tensor:
    """Make one weight of D: `(D, N, ...)` to `(D * N, ...)`, a view where there is one group."""
    return flatten_stack(weight, 1 - weight.dim(), groups)


def library(x: Tensor, stacked: Tensor, geometry: Geometry) -> Tensor:
    """Evaluate all dendrites' preactivations without bias: `(..., D * N)`, or channels on axis 1.

    Args:
        x: the soma's input, the batch optional.
        stacked: of `stacked_weight`, dtype of `x`.
        geometry: the form of the soma, not transposed.
    """
    if geometry.spatial == 0:
        return F.linear(x, stacked)
    batched = x.dim() == geometry.spatial + 2
    z = torch.convolution(
        x if batched else x[None],
        stacked,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0,) * geometry.spatial,
        geometry.groups,
    )
    return z if batched else z[0]


def chunks(soma: Tensor, dendrites: int, geometry: Geometry) -> list[tuple[slice, ...]]:
    """Cut the first axis so that a chunk's preactivations are `CHUNK_BYTES` or less, if it can.

    Returns:
        Indices of `soma`, and of the soma's input; one empty index where one chunk holds all.
    """
    batched = soma.dim() > geometry.spatial + 1
    size = soma.numel() * soma.element_size() * dendrites
    if not batched or size <= CHUNK_BYTES:
        return [()]
    rows = soma.shape[0]
    # Of equal size, so that the last one does not cost a launch for a few rows.
    each = ceiling(rows, min(rows, ceiling(size, CHUNK_BYTES)))
    return [(slice(start, min(start + each, rows)),) for start in range(0, rows, each)]


def packed_to_soma_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
) -> Tensor:
    """Sum `dT_d = Σ_p g ⊙ a_d`, recomputing the activations chunk by chunk.

    Args:
        grad: g, `(*soma)`, not empty; its dtype is that of the computation, not float64.
        x: as in `packed_dendrites`, and likewise the others.
        weight: V.
        bias: c, `(D, N)`, or None.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma, not transposed.

    Returns:
        `(D, N)`, float32, the same bits in every run.
    """
    from pbfx_kernels.to_soma_gradient import to_soma_gradient_of

    x, stacked = prepared(x.to(grad.dtype), weight.to(grad.dtype), geometry)
    sums = [
        to_soma_gradient_of(
            grad[part], library(x[part], stacked, geometry), bias, to_dendrite, activation, geometry
        )
        for part in chunks(grad, weight.shape[0], geometry)
    ]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
