"""The *split* strategy for convolutions over two dimensions: an implicit GEMM for all dendrites.

    z_d = V_d * x      a_d = f(z_d + c_d + Σ_{e<d} U_{d,e} ⊙ a_e)      out = soma + Σ_d T_d ⊙ a_d

Shapes: P = B * H' * W' positions, N neurons, D dendrites, K = channels / groups * taps inputs. As
`fused_linear`, but the tile of `x` is gathered: column k is one channel at one kernel tap, row p
one output position, and what lies in the padding is zero. Taps or channels come first in k,
whichever walks the memory of `x` in order: channels for NHWC, taps for NCHW, where the tile is
loaded transposed so that neighbouring threads read neighbouring positions.

`dT_d = Σ_p g ⊙ a_d` comes from the same main loop, with the activations recomputed.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import math

import torch
import triton.language as tl
from torch import Tensor

from pbfx_kernels.fused_configs import Blocks, conv2d_blocks
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import ceiling, fast_activations, on_device
from pbfx_kernels.layout import grid_of, regular
from pbfx_kernels.relaunch import relaunched
from pbfx_kernels.shares import added
from pbfx_kernels.triton_math import finish, zeros


@relaunched
def _conv2d_dendrites_kernel(
    out,
    kept,
    soma,
    x,
    weight,
    bias,
    to_soma,
    to_dendrite,
    P,
    S,
    N,
    K,
    CHANNELS,
    HEIGHT,
    WIDTH,
    OUT_WIDTH,
    GROUP,
    kept_d,
    out_b,
    out_s,
    out_n,
    soma_b,
    soma_s,
    soma_n,
    x_b,
    x_c,
    x_h,
    x_w,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    D: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TAPS: tl.constexpr = TAPS_H * TAPS_W
    # A block of neurons lies within one group. Blocks of neurons run next to each other: they read
    # the same part of x.
    blocks_in_group = tl.cdiv(GROUP, BLOCK_N)
    blocks_n = blocks_in_group * (N // GROUP)
    pid = tl.program_id(0)
    block_p, block_n = pid // blocks_n, pid % blocks_n
    group = block_n // blocks_in_group
    in_group = block_n % blocks_in_group * BLOCK_N + tl.arange(0, BLOCK_N)
    n = group * GROUP + in_group
    mask_n = in_group < GROUP
    p = block_p.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = p < P
    # Rows past the end read the first one; their sums are not stored.
    at = tl.where(mask_p, p, 0)
    image, place = at // S, (at % S).to(tl.int32)
    top = place // OUT_WIDTH * STRIDE_H - PAD_H
    left = place % OUT_WIDTH * STRIDE_W - PAD_W
    x += image * x_b + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w
    x += (group * CHANNELS).to(tl.int64) * x_c
    weight += tl.where(mask_n, n, 0).to(tl.int64)[None, :] * K
    next_d = tl.cast(N, tl.int64) * K
    z = zeros(D, BLOCK_P, BLOCK_N)
    for k_0 in range(0, K, BLOCK_K):
        k = k_0 + tl.arange(0, BLOCK_K)
        if CHANNELS_INNER:
            tap, channel = k // CHANNELS, k % CHANNELS
        else:
            tap, channel = k % TAPS, k // TAPS
        down, along = tap // TAPS_W * DILATION_H, tap % TAPS_W * DILATION_W
        step = channel.to(tl.int64) * x_c + down.to(tl.int64) * x_h + along.to(tl.int64) * x_w
        if CHANNELS_INNER:
            row, column = top[:, None] + down[None, :], left[:, None] + along[None, :]
            inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
            inside &= k[None, :] < K
            x_tile = tl.load(x[:, None] + step[None, :], mask=inside, other=0.0)
        else:
            row, column = top[None, :] + down[:, None], left[None, :] + along[:, None]
            inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
            inside &= k[:, None] < K
            x_tile = tl.trans(tl.load(x[None, :] + step[:, None], mask=inside, other=0.0))
        added = ()
        for d in tl.static_range(D):
            v_tile = tl.load(weight + d * next_d + k[:, None], mask=k[:, None] < K, other=0.0)
            added = added + (tl.dot(x_tile, v_tile, z[d], input_precision=PRECISION),)
        z = added
    wide_n = n.to(tl.int64)[None, :]
    outer, inner = (p // S)[:, None], (p % S)[:, None]
    finish(
        z,
        out,
        kept,
        soma,
        bias,
        to_soma,
        to_dendrite,
        outer * out_b + inner * out_s + wide_n * out_n,
        outer * soma_b + inner * soma_s + wide_n * soma_n,
        kept_d,
        block_p,
        n,
        mask_n,
        mask_p[:, None] & mask_n[None, :],
        N,
        D,
        MODE,
        HAS_BIAS,
        ACTIVATION,
        FAST,
    )


def fused_conv2d(
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
    blocks: Blocks | None = None,
) -> None:
    """Write the neuron's output, and the activations if `kept` is given.

    Args:
        soma: `(B, N, H', W')`, the batch optional, any strides, not empty; float16, bfloat16, or
            float32 for TF32 products.
        x: `(B, channels, H, W)`, any strides; cast to the dtype of `soma`.
        weight: V, `(D, N, channels / groups, kH, kW)`, 1 <= D <= `fused_configs.MOST_DENDRITES`;
            likewise.
        bias: c, `(D, N)`, any float dtype, or None.
        to_soma: T, `(D, N)`, likewise.
        to_dendrite: U, `(D, D, N)`, likewise.
        activation: f, one of `ACTIVATIONS`.
        geometry: over two dimensions, not transposed.
        out: shape of `soma`, `layout.is_regular`; written.
        kept: `(D, *soma)`, each slice with the strides of `out`; written.
        blocks: the configuration, by default `conv2d_blocks`'.
    """
    links = weight, bias, to_soma, to_dendrite, activation, geometry
    _launch(soma, x, *links, out, kept, "add" if kept is None else "keep", blocks)


def fused_conv2d_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    blocks: Blocks | None = None,
) -> Tensor:
    """Sum `dT_d = Σ_p g ⊙ a_d`, recomputing the activations.

    Args:
        grad: g, `(B, N, H', W')`, any strides, not empty; its dtype is that of the computation.
        x: as in `fused_conv2d`, and likewise the others.
        weight: V.
        bias: c, `(D, N)`, or None.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.
        geometry: over two dimensions, not transposed.
        blocks: the configuration, by default `conv2d_blocks`'.

    Returns:
        `(D, N)`, float32, the same bits in every run.
    """
    dendrites, neurons = weight.shape[:2]
    blocks = blocks or _blocks(grad, weight, geometry)
    shares = ceiling(grad.numel() // neurons, blocks.positions)
    partial = grad.new_empty((shares, dendrites, neurons), dtype=torch.float32)
    # Links to the soma are not read in this mode.
    links = weight, bias, to_dendrite, to_dendrite, activation, geometry
    _launch(grad, x, *links, partial, None, "gradient", blocks)
    return added(partial)


def _blocks(soma: Tensor, weight: Tensor, geometry: Geometry) -> Blocks:
    dendrites, neurons, *rest = weight.shape
    return conv2d_blocks(
        soma.numel() // neurons,
        neurons // geometry.groups,
        math.prod(rest),
        dendrites,
        soma.element_size(),
    )


def _launch(
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
    mode: str,
    blocks: Blocks | None,
) -> None:
    x = x.to(soma.dtype)
    if x.dim() == 3:
        x = x[None]
    dendrites, neurons, channels, *taps = weight.shape
    channels_inner = channels > 1 and x.stride(1) == 1
    if channels_inner:
        weight = weight.permute(0, 1, 3, 4, 2)
    weight = weight.to(soma.dtype).contiguous()
    soma = regular(soma, -3)
    grid = grid_of(-3, soma if mode == "gradient" else out, soma)
    # Output positions of an image: the kernel needs them for the gather, whatever the layout.
    places = math.prod(soma.shape[-2:])
    # Where one stride walks all positions, it also walks those of an image and the images.
    strides = [
        (places * outer, outer, neuron) if grid.inner == 1 else (outer, inner, neuron)
        for outer, inner, neuron in grid.strides
    ]
    group = neurons // geometry.groups
    blocks = blocks or _blocks(soma, weight, geometry)
    programs = ceiling(grid.positions, blocks.positions) * ceiling(group, blocks.neurons)
    with on_device(soma):
        _conv2d_dendrites_kernel[(programs * geometry.groups,)](
            out,
            # A pointer has to be one, whether it is read or not.
            out if kept is None else kept,
            soma,
            x,
            weight,
            soma if bias is None else bias.contiguous(),
            to_soma.contiguous(),
            to_dendrite.contiguous(),
            grid.positions,
            places,
            neurons,
            channels * math.prod(taps),
            channels,
            x.shape[2],
            x.shape[3],
            soma.shape[-1],
            group,
            0 if kept is None else kept.stride(0),
            *strides[0],
            *strides[1],
            *x.stride(),
            *geometry.stride,
            *geometry.padding,
            *geometry.dilation,
            *taps,
            CHANNELS_INNER=channels_inner,
            D=dendrites,
            MODE=mode,
            ACTIVATION=activation,
            FAST=fast_activations(soma),
            HAS_BIAS=bias is not None,
            PRECISION="tf32",
            BLOCK_P=blocks.positions,
            BLOCK_N=blocks.neurons,
            BLOCK_K=blocks.inputs,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
