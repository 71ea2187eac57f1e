"""The *depthwise* strategy: convolutions whose every neuron reads the one channel of its own.

    z_d = V_d * x      a_d = f(z_d + c_d + Σ_{e<d} U_{d,e} ⊙ a_e)      out = soma + Σ_d T_d ⊙ a_d

Shapes: N neurons and as many channels, D dendrites, over one or two dimensions. There is nothing to
multiply as matrices: each output is a few multiply-adds per role, so the floor is the traffic, one
read of the input and one write of the output. A library reads and writes it all once per role.

A thread computes a patch of outputs; see `depthwise_taps`. All roles, soma and dendrites, share
what is read; cascade, activation, links and the sum stay in registers. Accumulation is in float32
with no TF32 anywhere.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportIndexIssue=false

import math

import torch
import triton.language as tl
from torch import Tensor

from pbfx_kernels.depthwise_configs import Strips
from pbfx_kernels.depthwise_patches import load_patch, multiple, offsets, patch_at, store_patch
from pbfx_kernels.depthwise_planes import Planes, by_tap, is_wide, pointed
from pbfx_kernels.depthwise_roles import evaluate_patch
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import on_device
from pbfx_kernels.relaunch import relaunched
from pbfx_kernels.triton_math import negated_sum

# The cascade is unrolled for every output of a patch.
MOST_DENDRITES = 8


@relaunched
def _depthwise_kernel(
    out,
    kept,
    soma,
    x,
    weights,
    soma_bias,
    bias,
    to_soma,
    to_dendrite,
    S,
    DOWN,
    ACROSS,
    OUT_HEIGHT,
    N,
    HEIGHT,
    WIDTH,
    kept_d,
    out_b,
    out_n,
    out_h,
    out_w,
    soma_b,
    soma_n,
    soma_h,
    soma_w,
    x_b,
    x_n,
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
    UP_H: tl.constexpr,
    UP_W: tl.constexpr,
    D: tl.constexpr,
    OWN_SOMA: tl.constexpr,
    KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_SOMA_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    EVEN_N: tl.constexpr,
    LONG: tl.constexpr,
    FORM: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    ROLES: tl.constexpr = D + 1 if OWN_SOMA else D
    pid = tl.program_id(0)
    # Programs that run together share cache lines.
    if CHANNELS_INNER:
        blocks_n = tl.cdiv(N, BLOCK_N)
        block_s, block_n = pid // blocks_n, pid % blocks_n
    else:
        blocks_s = tl.cdiv(S, BLOCK_S)
        block_s, block_n = pid % blocks_s, pid // blocks_s
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # A mask that is true everywhere costs the compiler nothing.
    mask_n = tl.full((BLOCK_N,), True, tl.int1) if EVEN_N else n < N
    s = block_s * BLOCK_S + tl.arange(0, BLOCK_S)
    first = patch_at(s, S, DOWN, ACROSS, ROWS, COLUMNS)
    results = evaluate_patch(
        (),
        (),
        x,
        weights,
        soma_bias,
        bias,
        to_dendrite,
        first,
        n,
        mask_n,
        N,
        (HEIGHT, WIDTH),
        (x_b, x_n, x_h, x_w),
        (
            (STRIDE_H, STRIDE_W),
            (PAD_H, PAD_W),
            (DILATION_H, DILATION_W),
            (TAPS_H, TAPS_W),
            (UP_H, UP_W),
        ),
        D,
        OWN_SOMA,
        ACTIVATION,
        FAST,
        HAS_SOMA_BIAS,
        HAS_BIAS,
        LONG,
        FORM,
        WIDE,
        False,
        (ROWS, COLUMNS, LEVELS, BLOCK_S),
        BLOCK_N,
    )
    mask = (s < S)[:, None] & mask_n[None, :]
    # All loads come first: the compiler may not move a load past a store.
    totals = ()
    if OWN_SOMA:
        for place in tl.static_range(ROWS * COLUMNS):
            totals = totals + (results[place * ROLES],)
    else:
        totals = load_patch(
            soma + offsets(first, n, (soma_b, soma_n, soma_h, soma_w), LONG, WIDE_OUT, COLUMNS),
            first[1],
            mask,
            OUT_HEIGHT,
            (soma_b, soma_n, soma_h, soma_w),
            WIDE_OUT,
            (ROWS, COLUMNS, LEVELS, BLOCK_S),
        )
    sums = ()
    for place in tl.static_range(ROWS * COLUMNS):
        a = ()
        for d in tl.static_range(D):
            a = a + (results[place * ROLES + ROLES - D + d],)
        total = totals[place]
        if D > 0:
            total -= negated_sum(a, to_soma, n, mask_n, N, D, 1)
        sums = sums + (total,)
    at = offsets(first, n, (out_b, out_n, out_h, out_w), LONG, WIDE_OUT, COLUMNS)
    store_patch(
        out + at,
        sums,
        first[1],
        mask,
        OUT_HEIGHT,
        (out_b, out_n, out_h, out_w),
        WIDE_OUT,
        (ROWS, COLUMNS, LEVELS, BLOCK_S),
    )
    if KEEP:
        next_d = tl.cast(multiple(kept_d, WIDE_OUT, COLUMNS), tl.int64)
        for d in tl.static_range(D):
            a = ()
            for place in tl.static_range(ROWS * COLUMNS):
                a = a + (results[place * ROLES + ROLES - D + d],)
            store_patch(
                kept + at + d * next_d,
                a,
                first[1],
                mask,
                OUT_HEIGHT,
                (out_b, out_n, out_h, out_w),
                WIDE_OUT,
                (ROWS, COLUMNS, LEVELS, BLOCK_S),
            )


def fused_depthwise(
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
    strips: Strips | None = None,
) -> None:
    """Write the neuron's output, and the activations if `kept` is given.

    Args:
        soma: `(B, N, *spatial)`, over one or two dimensions, the batch optional, any strides, not
            empty; float32, float16 or bfloat16.
        x: `(B, N, *spatial)`, any strides; cast to the dtype of `soma`.
        weight: V, `(D, N, 1, *kernel)`, 1 <= D <= `MOST_DENDRITES`; rounded to that dtype.
        bias: c, `(D, N)`, any float dtype, or None.
        to_soma: T, `(D, N)`, likewise.
        to_dendrite: U, `(D, D, N)`, likewise.
        activation: f, one of `ACTIVATIONS`.
        geometry: N groups, not transposed.
        out: shape of `soma`, any strides; written.
        kept: `(D, *soma)`, each slice with the strides of `out`; written.
        strips: the configuration, by default `depthwise_strips`'.
    """
    weights = by_tap(weight.to(soma.dtype))
    links = bias, to_soma, to_dendrite, activation
    x = x.to(soma.dtype)
    planes = Planes.of(x, geometry, tuple(weight.shape[3:]))
    launch_depthwise(soma, x, weights, None, *links, planes, out, kept, strips)


def depthwise_neuron(
    x: Tensor,
    weight: Tensor,
    soma_bias: Tensor | None,
    dendrite_weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    out: Tensor,
    kept: Tensor | None,
    strips: Strips | None = None,
) -> None:
    """Write the neuron's output, the soma's own convolution included, and the activations.

    Args:
        x: `(B, N, *spatial)`, over one or two dimensions, the batch optional, any strides, not
            empty; float32, float16 or bfloat16.
        weight: W, `(N, 1, *kernel)`, dtype of `x`.
        soma_bias: b, `(N,)`, any float dtype, or None.
        dendrite_weight: V, `(D, N, 1, *kernel)`; rounded to the dtype of `x`.
        bias: and the rest: as of `fused_depthwise`.
        to_soma: likewise.
        to_dendrite: likewise.
        activation: likewise.
        geometry: likewise.
        out: `(B, N, *spatial)`, any strides; written.
        kept: likewise.
        strips: likewise.
    """
    weights = by_tap(torch.cat((weight[None], dendrite_weight.to(x.dtype))))
    links = soma_bias, bias, to_soma, to_dendrite, activation
    planes = Planes.of(x, geometry, tuple(weight.shape[2:]))
    launch_depthwise(None, x, weights, *links, planes, out, kept, strips)


def launch_depthwise(
    soma: Tensor | None,
    x: Tensor,
    weights: Tensor,
    soma_bias: Tensor | None,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    planes: Planes,
    out: Tensor,
    kept: Tensor | None,
    strips: Strips | None,
) -> None:
    """Launch the kernel, for a neuron or a plain convolution: D = 0.

    Args:
        soma: as of `fused_depthwise`; None to compute it.
        x: likewise.
        weights: of all roles, as of `by_tap`.
        soma_bias: b, `(N,)`, or None.
        bias: and the rest: as of `fused_depthwise`.
        to_soma: likewise.
        to_dendrite: likewise.
        activation: likewise.
        planes: the form of the site.
        out: likewise.
        kept: likewise.
        strips: likewise.
    """
    x, out = planes.view(x), planes.view(out)
    seen = out if soma is None else planes.view(soma)
    strips = strips or planes.strips(out, len(weights))
    cut = planes.cut(out, x, strips)
    wide_out = is_wide(strips, out, seen)
    with on_device(x):
        _depthwise_kernel[(math.prod(cut.tiles),)](
            out,
            out if kept is None else kept,
            seen,
            x,
            weights,
            pointed(soma_bias, weights),
            pointed(bias, weights),
            to_soma.contiguous(),
            to_dendrite.contiguous(),
            *cut.sizes,
            0 if kept is None else kept.stride(0),
            *out.stride(),
            *seen.stride(),
            *x.stride(),
            *planes.form,
            *planes.up,
            D=len(to_soma),
            OWN_SOMA=soma is None,
            KEEP=kept is not None,
            ACTIVATION=activation,
            HAS_SOMA_BIAS=soma_bias is not None,
            HAS_BIAS=bias is not None,
            CHANNELS_INNER=strips.neurons > 1,
            WIDE_OUT=wide_out and (kept is None or kept.stride(0) % strips.columns == 0),
            **planes.constants(strips, x, seen, out),
        )
