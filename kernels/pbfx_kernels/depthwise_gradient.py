"""The gradient of a *depthwise* site's links, with its activations computed again.

    dT_d = Σ_p g ⊙ a_d

The patches are those of the forward, see `depthwise_taps`. A program goes through its share of
them, and its sums stay in registers until it is done: no atomics, the same bits in every run.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.depthwise_configs import Strips
from pbfx_kernels.depthwise_planes import Planes, by_tap, is_long, is_wide
from pbfx_kernels.depthwise_taps import evaluate_patch, load_patch, offsets, patch_at
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import ceiling, fast_activations, multiprocessors, on_device
from pbfx_kernels.triton_math import zeros

# Programs per multiprocessor: enough to hide latency, few enough partial sums.
_WAVES = 8


@triton.jit
def _depthwise_gradient_kernel(
    partial,
    grad,
    x,
    weights,
    bias,
    to_dendrite,
    S,
    DOWN,
    ACROSS,
    OUT_HEIGHT,
    N,
    HEIGHT,
    WIDTH,
    share,
    grad_b,
    grad_n,
    grad_h,
    grad_w,
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
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr,
    LONG: tl.constexpr,
    FORM: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = tl.full((BLOCK_N,), True, tl.int1) if EVEN_N else n < N
    start = pid // blocks_n * share
    sums = zeros(D, BLOCK_S, BLOCK_N)
    for step in range(0, share, BLOCK_S):
        s = start + step + tl.arange(0, BLOCK_S)
        image, row, column = patch_at(s, S, DOWN, ACROSS, ROWS, COLUMNS)
        # What lies past the end has an error of zero.
        g = load_patch(
            grad
            + offsets(
                image, row, column, n, grad_b, grad_n, grad_h, grad_w, LONG, WIDE_GRAD, COLUMNS
            ),
            row,
            (s < S)[:, None] & mask_n[None, :],
            OUT_HEIGHT,
            grad_h,
            grad_w,
            WIDE_GRAD,
            ROWS,
            COLUMNS,
            LEVELS,
            BLOCK_S,
        )
        a = evaluate_patch(
            x,
            weights,
            bias,
            bias,
            to_dendrite,
            image,
            row,
            column,
            n,
            mask_n,
            N,
            HEIGHT,
            WIDTH,
            x_b,
            x_n,
            x_h,
            x_w,
            STRIDE_H,
            STRIDE_W,
            PAD_H,
            PAD_W,
            DILATION_H,
            DILATION_W,
            TAPS_H,
            TAPS_W,
            D,
            False,
            ACTIVATION,
            FAST,
            False,
            HAS_BIAS,
            LONG,
            FORM,
            WIDE,
            ROWS,
            COLUMNS,
            LEVELS,
            BLOCK_S,
            BLOCK_N,
        )
        for place in tl.static_range(ROWS * COLUMNS):
            added = ()
            for d in tl.static_range(D):
                added = added + (sums[d] + g[place] * a[place * D + d],)
            sums = added
    partial += (pid // blocks_n).to(tl.int64) * D * N + n
    for d in tl.static_range(D):
        tl.store(partial + d * N, tl.sum(sums[d], axis=0), mask=mask_n)


def fused_depthwise_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    strips: Strips | None = None,
) -> Tensor:
    """Sum `dT_d = Σ_p g ⊙ a_d`, recomputing the activations.

    Args:
        grad: g, `(B, N, *spatial)`, any strides, not empty; its dtype is that of the computation.
        x: as in `fused_depthwise`, and likewise the others.
        weight: V.
        bias: c, `(D, N)`, or None.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.
        geometry: N groups, not transposed.
        strips: the configuration, by default `depthwise_strips`'.

    Returns:
        `(D, N)`, float32, the same bits in every run.
    """
    x, weights = x.to(grad.dtype), by_tap(weight.to(grad.dtype))
    planes = Planes.of(x, geometry, tuple(weight.shape[3:]))
    x, grad = planes.view(x), planes.view(grad)
    images, neurons, height, width = grad.shape
    dendrites = len(weights)
    # The sums are one more role.
    strips = strips or planes.strips(x, grad, dendrites + 1)
    down, across = ceiling(height, strips.rows), width // strips.columns
    count = images * down * across
    tiles, blocks_n = ceiling(count, strips.strips), ceiling(neurons, strips.neurons)
    each = ceiling(tiles, min(tiles, max(1, _WAVES * multiprocessors(x) // blocks_n)))
    shares = ceiling(tiles, each)
    partial = grad.new_empty((shares, dendrites, neurons), dtype=torch.float32)
    with on_device(x):
        _depthwise_gradient_kernel[(shares * blocks_n,)](
            partial,
            grad,
            x,
            weights,
            weights if bias is None else bias.contiguous(),
            to_dendrite.contiguous(),
            count,
            down,
            across,
            height,
            neurons,
            x.shape[2],
            x.shape[3],
            each * strips.strips,
            *grad.stride(),
            *x.stride(),
            *planes.form,
            D=dendrites,
            ACTIVATION=activation,
            FAST=fast_activations(x),
            HAS_BIAS=bias is not None,
            WIDE_GRAD=is_wide(strips, grad),
            LONG=is_long(x, grad),
            **planes.constants(x, strips, neurons),
        )
    return partial[0] if shares == 1 else partial.sum(0)
