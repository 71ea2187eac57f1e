"""How the *fused* strategy computes a convolution over two dimensions, by its route.

    pointwise   one tap, NHWC: a linear op over positions, `fused_neuron`
    walked      `fused_conv_neuron` over the input in NHWC
    patches     `patches`, and over them `fused_conv_neuron` with one tap

An input in NCHW is copied to NHWC where it is walked, as the *packed* strategy does for a library;
the output is written in the layout that is asked for.
"""

import torch
from torch import Tensor

from pbfx_kernels.fused_configs import Blocks
from pbfx_kernels.fused_conv_neuron import POINTWISE, Input, fused_conv_neuron
from pbfx_kernels.fused_neuron import can_describe, fused_neuron, interleave
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import ceiling
from pbfx_kernels.patches import patches
from pbfx_kernels.strategy import Route

# Bytes of patches at a time.
PATCHES_BYTES = 256 * 2**20
# Bytes that rows of patches are a multiple of: what a product of 16 inputs in 16 bits reads.
_PATCH_BYTES = 32


def laid_out(route: Route, weight: Tensor, dendrite_weight: Tensor) -> Tensor:
    """Lay the weights of a convolution side by side, as `fused_convolution` reads them.

    Args:
        route: of the site.
        weight: W, `(N, channels / groups, kH, kW)`.
        dendrite_weight: V, `(D, *W)`.

    Returns:
        As of `interleave`.
    """
    aligned = _PATCH_BYTES // weight.element_size() if route is Route.PATCHES else 1
    return interleave(weight, dendrite_weight, aligned)


def fused_convolution(
    route: Route,
    x: Tensor,
    weights: Tensor,
    kernel: tuple[int, int],
    soma_bias: Tensor | None,
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
        weights: W and V, `laid_out` for the route, the dtype of `x`.
        kernel: taps, `(kH, kW)`.
        soma_bias: b, `(N,)`, any float dtype, or None.
        bias: c, `(D, N)`, likewise.
        to_soma: T, `(D, N)`, D from 1 to 7, any float dtype.
        to_dendrite: U, `(D, D, N)`, likewise.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma.
        out: `(B, N, H', W')`, contiguous or in channels_last; written.
        kept: `(D, *out)`, each slice with the strides of `out`; written.
        blocks: the configuration, by default that of the kernel.
    """
    links = soma_bias, bias, to_soma, to_dendrite, activation
    if route is Route.PATCHES:
        _over_patches(x, weights, kernel, *links, geometry, out, kept, blocks)
        return
    image = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    if image.data_ptr() % 16:
        image = image.clone(memory_format=torch.contiguous_format)
    if route is Route.POINTWISE and out.stride(1) == 1:
        rows = image.reshape(-1, image.shape[3])
        assert can_describe(rows), "a route for channels that fill 16 bytes"
        flat_out = out.permute(0, 2, 3, 1).reshape(-1, out.shape[1])
        flat_kept = None if kept is None else kept.permute(0, 1, 3, 4, 2).flatten(1, 3)
        fused_neuron(rows, weights, *links, flat_out, flat_kept, blocks)
        return
    sizes = out.shape[0], out.shape[2], out.shape[3]
    fused_conv_neuron(Input(image, geometry, kernel), weights, *links, sizes, out, kept, blocks)


def _over_patches(
    x: Tensor,
    weights: Tensor,
    kernel: tuple[int, int],
    soma_bias: Tensor | None,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    out: Tensor,
    kept: Tensor | None,
    blocks: Blocks | None,
) -> None:
    links = soma_bias, bias, to_soma, to_dendrite, activation
    images, neurons, height, width = out.shape
    size = out.numel() // neurons * weights.shape[1] * x.element_size()
    each = ceiling(images, min(images, ceiling(size, PATCHES_BYTES)))
    for start in range(0, images, each):
        part = slice(start, start + each)
        rows = patches(x[part], kernel, geometry, (height, width), weights.shape[1])
        # A row for all images where one stride walks them.
        flat = rows.flatten(0, 2)[None] if out.stride(1) == 1 else rows.flatten(1, 2)
        fused_conv_neuron(
            Input(flat[:, None], POINTWISE, (1, 1)),
            weights,
            *links,
            (flat.shape[0], 1, flat.shape[1]),
            out[part],
            None if kept is None else kept[:, part],
            blocks,
        )
