"""How the *fused* strategy computes a convolution over two dimensions, by its route.

    pointwise   one tap, NHWC: a linear op over positions, `fused_neuron`
    walked      `fused_conv_neuron` over the input in NHWC
    patches     `patches`, and over them `fused_conv_neuron` with one tap

An input in NCHW is copied to NHWC where it is walked, as the *packed* strategy does for a library;
the output is written in the layout that is asked for.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pbfx_kernels.fused_configs import Blocks
from pbfx_kernels.fused_conv_neuron import (
    POINTWISE,
    Input,
    conv_dendrites_gradient,
    fused_conv_neuron,
)
from pbfx_kernels.fused_neuron import can_describe, fused_neuron, interleave
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import ceiling
from pbfx_kernels.layout import channels_last
from pbfx_kernels.patches import patches
from pbfx_kernels.strategy import Route

# Bytes of patches at a time.
PATCHES_BYTES = 256 * 2**20
# Bytes that rows of patches are a multiple of: what a product of 16 inputs in 16 bits reads.
_PATCH_BYTES = 32


def laid_out(
    route: Route,
    weight: Tensor | None,
    dendrite_weight: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Lay the weights of a convolution side by side, as `fused_convolution` reads them.

    Args:
        route: of the site.
        weight: W, `(N, channels / groups, kH, kW)`; None where the soma is computed elsewhere.
        dendrite_weight: V, `(D, *W)`.
        dtype: of the result, by default that of W, or else of V.

    Returns:
        As of `interleave`.
    """
    kind = dtype or (dendrite_weight if weight is None else weight).dtype
    aligned = _PATCH_BYTES // kind.itemsize if route is Route.PATCHES else 1
    return interleave(weight, dendrite_weight, aligned, kind)


def fused_convolution(
    route: Route,
    x: Tensor,
    weights: Tensor,
    kernel: tuple[int, int],
    soma: Tensor | None,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    out: Tensor,
    kept: Tensor | None,
    blocks: Blocks | None = None,
) -> None:
    """Write the neuron's output, and the activations if `kept` is given.

    Args:
        route: of `strategy.route`.
        x: `(B, channels, H, W)`, not empty; float16, bfloat16, or float32 for TF32 products.
        weights: W and V, `laid_out` for the route, the dtype of `x`; V alone where the output of
            the soma is given.
        kernel: taps, `(kH, kW)`.
        soma: b, `(N,)`, any float dtype, or None; or the soma's output, shape and dtype of `out`,
            any strides.
        bias: c, `(D, N)`, any float dtype, or None.
        to_soma: T, `(D, N)`, D from 1 to 7, any float dtype.
        to_dendrite: U, `(D, D, N)`, likewise.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma.
        out: `(B, N, H', W')`, contiguous or in channels_last; written.
        kept: `(D, *out)`, each slice with the strides of `out`; written.
        blocks: the configuration, by default that of the kernel.
    """
    links = bias, to_soma, to_dendrite, activation
    given = soma is not None and soma.dim() == 4
    if soma is not None and given:
        soma = soma.contiguous(memory_format=_format(out))
    if route is Route.POINTWISE and out.stride(1) == 1 and not given:
        rows = _nhwc(x).reshape(-1, x.shape[1])
        assert can_describe(rows), "a route for channels that fill 16 bytes"
        flat_out = out.permute(0, 2, 3, 1).reshape(-1, out.shape[1])
        flat_kept = None if kept is None else kept.permute(0, 1, 3, 4, 2).flatten(1, 3)
        fused_neuron(rows, weights, soma, *links, flat_out, flat_kept, blocks)
        return
    for part, read, sizes in _parts(route, x, weights, kernel, geometry, out):
        fused_conv_neuron(
            read,
            weights,
            soma[part] if soma is not None and given else soma,
            *links,
            sizes,
            out[part],
            None if kept is None else kept[:, part],
            blocks,
        )


def fused_convolution_gradient(
    route: Route,
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    kernel: tuple[int, int],
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    blocks: Blocks | None = None,
) -> Tensor:
    """Sum `dT_d = Σ_p g ⊙ a_d`, recomputing the activations.

    Args:
        route: as in `fused_convolution`, and likewise the others.
        grad: g, `(B, N, H', W')`, dtype of `x`, any strides.
        x: the soma's input.
        weights: V, `laid_out` for the route, the dtype of `x`.
        kernel: taps.
        bias: c, `(D, N)`, or None.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma.
        blocks: the configuration, by default that of the kernel.

    Returns:
        `(D, N)`, float32, the same bits in every run.
    """
    grad = grad.contiguous(memory_format=_format(grad))
    links = bias, to_dendrite, activation
    sums = [
        conv_dendrites_gradient(read, weights, grad[part], *links, sizes, blocks)
        for part, read, sizes in _parts(route, x, weights, kernel, geometry, grad)
    ]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def _parts(
    route: Route,
    x: Tensor,
    weights: Tensor,
    kernel: tuple[int, int],
    geometry: Geometry,
    out: Tensor,
) -> Iterator[tuple[slice, Input, tuple[int, int, int]]]:
    """Yield images of `out`, what their positions are computed from, and how they are counted."""
    images, neurons, height, width = out.shape
    if route is Route.POINTWISE:
        # Images as rows: boxes of rows and columns would cut what is written in NCHW into pieces.
        row = _nhwc(x).flatten(1, 2)[:, None]
        yield slice(None), Input(row, POINTWISE, kernel), (images, 1, height * width)
        return
    if route is not Route.PATCHES:
        yield slice(None), Input(_nhwc(x), geometry, kernel), (images, height, width)
        return
    size = out.numel() // neurons * weights.shape[1] * x.element_size()
    each = ceiling(images, min(images, ceiling(size, PATCHES_BYTES)))
    for start in range(0, images, each):
        part = slice(start, start + each)
        rows = patches(x[part], kernel, geometry, (height, width), weights.shape[1])
        # A row for all images where one stride walks them.
        flat = rows.flatten(0, 2)[None] if out.stride(1) == 1 else rows.flatten(1, 2)
        yield part, Input(flat[:, None], POINTWISE, (1, 1)), (flat.shape[0], 1, flat.shape[1])


def _nhwc(x: Tensor) -> Tensor:
    image = channels_last(x).permute(0, 2, 3, 1)
    return image.clone(memory_format=torch.contiguous_format) if image.data_ptr() % 16 else image


def _format(out: Tensor) -> torch.memory_format:
    return torch.channels_last if out.stride(1) == 1 else torch.contiguous_format
