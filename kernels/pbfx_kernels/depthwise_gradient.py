"""The gradients of a *depthwise* site, with its activations computed again.

    dT_d = Σ_p g ⊙ a_d      dW = Σ_p g ⊙ x(p + tap)      db = Σ_p g      dx = Wᵀ * g

All sums come from one read of input and error: the patches are those of the forward, see
`depthwise_taps`, and what they read is what the weight's gradient needs. A program goes through its
share of them, and its sums stay in registers until it is done: no atomics, the same bits in every
run. The input's gradient is a transposed convolution of the error, by the forward's kernel without
dendrites, whose input has zeros between its rows and columns where the stride is above one.

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
from pbfx_kernels.depthwise_patches import load_patch, offsets, patch_at
from pbfx_kernels.depthwise_planes import Planes, by_tap, is_patched, is_wide, pointed
from pbfx_kernels.depthwise_roles import evaluate_patch
from pbfx_kernels.fused_depthwise import launch_depthwise
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import ceiling, multiprocessors, on_device
from pbfx_kernels.relaunch import relaunched
from pbfx_kernels.shares import added
from pbfx_kernels.triton_math import zeros

# Programs per multiprocessor: enough to hide latency, few enough partial sums.
_WAVES = 8


@relaunched
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
    UP_H: tl.constexpr,
    UP_W: tl.constexpr,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr,
    LONG: tl.constexpr,
    FORM: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_GRAD: tl.constexpr,
    WEIGH: tl.constexpr,
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
    TAPS: tl.constexpr = TAPS_H * TAPS_W if WEIGH else 0
    # Of the links, of the bias and of the taps.
    sums = zeros(D + WEIGH, BLOCK_S, BLOCK_N)
    gathered = zeros(TAPS, BLOCK_S, BLOCK_N)
    for step in range(0, share, BLOCK_S):
        s = start + step + tl.arange(0, BLOCK_S)
        first = patch_at(s, S, DOWN, ACROSS, ROWS, COLUMNS)
        # What lies past the end has an error of zero.
        g = load_patch(
            grad + offsets(first, n, (grad_b, grad_n, grad_h, grad_w), LONG, WIDE_GRAD, COLUMNS),
            first[1],
            (s < S)[:, None] & mask_n[None, :],
            OUT_HEIGHT,
            (grad_b, grad_n, grad_h, grad_w),
            WIDE_GRAD,
            (ROWS, COLUMNS, LEVELS, BLOCK_S),
        )
        results = evaluate_patch(
            gathered,
            g,
            x,
            weights,
            bias,
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
            False,
            ACTIVATION,
            FAST,
            False,
            HAS_BIAS,
            LONG,
            FORM,
            WIDE,
            WEIGH,
            (ROWS, COLUMNS, LEVELS, BLOCK_S),
            BLOCK_N,
        )
        for place in tl.static_range(ROWS * COLUMNS):
            added = ()
            for d in tl.static_range(D):
                added = added + (sums[d] + g[place] * results[place * D + d],)
            if WEIGH:
                added = added + (sums[D] + g[place],)
            sums = added
        gathered = ()
        for tap in tl.static_range(TAPS):
            gathered = gathered + (results[ROWS * COLUMNS * D + tap],)
    partial += (pid // blocks_n).to(tl.int64) * (D + WEIGH + TAPS) * N + n
    for i in tl.static_range(D + WEIGH):
        tl.store(partial + i * N, tl.sum(sums[i], axis=0), mask=mask_n)
    for tap in tl.static_range(TAPS):
        at = partial + (D + WEIGH + tap) * N
        tl.store(at, tl.sum(gathered[tap], axis=0), mask=mask_n)


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
    return _sums(grad, x, weight, bias, to_dendrite, activation, geometry, False, strips)


def depthwise_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    strips: Strips | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the gradients of links, soma weight and soma bias in one pass.

    Arguments are as of `fused_depthwise_gradient`; without dendrites, D = 0, the first is empty.

    Returns:
        dT, `(D, N)`; dW, `(N, 1, *kernel)`; db, `(N,)`: float32, the same bits in every run.

    Raises:
        ValueError: the taps are too many to unroll; see `is_patched`.
    """
    if not is_patched(tuple(weight.shape[3:])):
        raise ValueError(f"kernels of {tuple(weight.shape[3:])} taps are looped over, not unrolled")
    sums = _sums(grad, x, weight, bias, to_dendrite, activation, geometry, True, strips)
    links, own, taps = sums.split((len(weight), 1, sums.shape[0] - len(weight) - 1))
    # Apart: results of an op may not share memory.
    by_neuron = taps.t().clone(memory_format=torch.contiguous_format)
    return links.clone(), by_neuron.reshape(weight.shape[1:]), own[0].clone()


def depthwise_input_gradient(
    grad: Tensor,
    weight: Tensor,
    geometry: Geometry,
    out: Tensor,
    strips: Strips | None = None,
) -> None:
    """Write the gradient of the soma's input.

    Args:
        grad: g, `(B, N, *spatial)`, any strides, not empty.
        weight: W, `(N, 1, *kernel)`, dtype of `grad`; `transposes` this convolution.
        geometry: N groups, not transposed.
        out: `(B, N, *spatial)`, shape of the input, any strides; written.
        strips: the configuration, by default `depthwise_strips`'.
    """
    backwards = by_tap(weight.flip(tuple(range(2, weight.dim())))[None])
    planes = Planes.of(grad, geometry, tuple(weight.shape[2:])).transposed()
    nothing = grad.new_empty((0, weight.shape[0]))
    launch_depthwise(
        None, grad, backwards, None, None, nothing, nothing, "tanh", planes, out, None, strips
    )


def _sums(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    weigh: bool,
    strips: Strips | None,
) -> Tensor:
    """Return the sums of links and, if `weigh`, of the bias and all taps, `(sums, N)`."""
    dendrites, taps = len(weight), tuple(weight.shape[3:])
    x, weights = x.to(grad.dtype), by_tap(weight.to(grad.dtype))
    planes = Planes.of(x, geometry, taps)
    x, grad = planes.view(x), planes.view(grad)
    # The sums take registers too: those of the taps, where a thread keeps them for two channels.
    held = 4 if weigh and planes.channels_last else 1
    strips = strips or planes.strips(grad, dendrites + held)
    cut = planes.cut(grad, x, strips)
    tiles, blocks_n = cut.tiles
    each = ceiling(tiles, min(tiles, max(1, _WAVES * multiprocessors(x) // blocks_n)))
    shares = ceiling(tiles, each)
    sums = dendrites + (1 + math.prod(taps) if weigh else 0)
    partial = grad.new_empty((shares, sums, grad.shape[1]), dtype=torch.float32)
    with on_device(x):
        _depthwise_gradient_kernel[(shares * blocks_n,)](
            partial,
            grad,
            x,
            weights,
            pointed(bias, weights),
            to_dendrite.contiguous(),
            *cut.sizes,
            each * strips.strips,
            *grad.stride(),
            *x.stride(),
            *planes.form,
            *planes.up,
            D=dendrites,
            ACTIVATION=activation,
            HAS_BIAS=bias is not None,
            WIDE_GRAD=is_wide(strips, grad),
            WEIGH=weigh,
            **planes.constants(strips, x, grad),
        )
    return added(partial)
