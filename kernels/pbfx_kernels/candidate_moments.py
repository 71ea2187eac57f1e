"""The error at a neuron, turned into its candidates' gradients and moments in one pass.

    a = f(z)        dz = -direction ⊙ (g - ḡ - β ⊙ (a - ā)) ⊙ f'(z) / P

    Σa   Σa²   Σg   Σg²   Σag        ∂c = Σ_p dz        ∂U_e = Σ_p dz ⊙ a_e

Shapes: P positions, N neurons, C candidates per neuron, D accepted dendrites. Every tensor of the
site is walked as `(outer, neuron, inner)`: NCHW is (B, N, HxW), and whatever lets all positions be
walked with one stride (linear ops, NHWC) is (1, N, P). `dz`, all that the weight gradient needs,
leaves in the dtype of the computation; f(z) is recomputed and nothing but `dz` and sums is written.
β and ā, which turn the covariance's gradient into the correlation's, are optional: without them the
kernel is compiled without the term.

Floor: bytes. g and z are read once and dz is written, 3 PN elements for one candidate, against
5 PN more passes of the eager reference. The sums are made in two stages: each program adds up its
own share of the positions in a fixed order, and `torch.sum` adds the shares. No atomics, and the
split depends on shapes alone, so the result is the same bits in every run and on every GPU.

Source: Fahlman and Lebiere, *The Cascade-Correlation Learning Architecture*, 1990.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.moments import ROWS
from pbfx_kernels.relaunch import Launch
from pbfx_kernels.triton_math import activation_and_slope
from pbfx_kernels.walking import (
    ceiling,
    interleaved_strides,
    is_regular,
    on_device,
    power_of_two,
    regular,
    walk,
)

# Forms of sites; a training loop meets a handful.
_REMEMBERED = 4096
# Elements per tile: four per thread of four warps. On an H200, 8192 x 4096 in bfloat16 takes 82 us;
# with eight per thread, whose accumulators leave room for half the programs, 122 us.
_TILE = 512
_WARPS = 4
# Elements of the stack of older activations that a tile reads: 16 per thread.
_STACKED = 2048
# Of the axis that is contiguous in memory: 256 bytes of float32 per neuron row, or a run of pixels.
_NEURONS_WIDE = 64
_INNER_WIDE = 256
# Programs that fill any present GPU several times over; more would only make more partial sums.
_PROGRAMS = 1024
# Fewer tiles than this per program do not pay for a second stage.
_TILES_EACH = 4


@triton.jit
def _candidate_moments_kernel(
    g_ptr,
    z_ptr,
    a_ptr,
    direction_ptr,
    mean_ptr,
    regression_ptr,
    dz_ptr,
    sums_ptr,
    neurons,
    outer,
    inner,
    candidates,
    row,
    g_o,
    g_n,
    g_i,
    z_c,
    z_o,
    z_n,
    z_i,
    dz_c,
    dz_o,
    dz_n,
    dz_i,
    a_e,
    a_o,
    a_n,
    a_i,
    positions,
    dz_scale,
    sum_scale,
    ACTIVATION: tl.constexpr,
    HAS_REGRESSION: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
):
    program, share = tl.program_id(0), tl.program_id(1)
    # Candidates of the same neurons run side by side and share g in the cache.
    c = program % candidates
    n = (program // candidates) * TILE_N + tl.arange(0, TILE_N)
    real = n < neurons
    at_n, at_c = n.to(tl.int64)[:, None], c.to(tl.int64)
    direction = tl.load(direction_ptr + c * neurons + n, mask=real, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + n, mask=real, other=0.0).to(tl.float32)
    if HAS_REGRESSION:
        line = regression_ptr + c * neurons + n
        trend = tl.load(line, mask=real, other=0.0).to(tl.float32)
        # (2, C, N): `row` is C N.
        mean_a = tl.load(line + row, mask=real, other=0.0).to(tl.float32)
    g_row = g_ptr + at_n * g_n
    z_row = z_ptr + at_c * z_c + at_n * z_n
    dz_row = dz_ptr + at_c * dz_c + at_n * dz_n
    sum_a = tl.zeros((TILE_N, TILE_I), tl.float32)
    sum_aa = tl.zeros((TILE_N, TILE_I), tl.float32)
    sum_g = tl.zeros((TILE_N, TILE_I), tl.float32)
    sum_gg = tl.zeros((TILE_N, TILE_I), tl.float32)
    sum_ag = tl.zeros((TILE_N, TILE_I), tl.float32)
    sum_dz = tl.zeros((TILE_N, TILE_I), tl.float32)
    # One tile of an older dendrite's activations per dendrite: reduced at once, or D tiles of
    # accumulators would spill.
    e = tl.arange(0, D_PADDED)
    sum_links = tl.zeros((D_PADDED, TILE_N), tl.float32)
    tiles = tl.cdiv(inner, TILE_I)
    for tile in range(share, outer * tiles, tl.num_programs(1)):
        at_o = (tile // tiles).to(tl.int64)
        at_i = ((tile % tiles).to(tl.int64) * TILE_I + tl.arange(0, TILE_I))[None, :]
        # Whole tiles everywhere: the compiler drops a mask of constants, and what it costs.
        here = tl.full((TILE_N, TILE_I), True, tl.int1)
        if not EVEN:
            here = real[:, None] & (at_i < inner)
        g = tl.load(g_row + at_o * g_o + at_i * g_i, mask=here, other=0.0).to(tl.float32)
        z = tl.load(z_row + at_o * z_o + at_i * z_i, mask=here, other=0.0).to(tl.float32)
        # Not FAST: the sums are of float32.
        a, slope = activation_and_slope(z, ACTIVATION, False, z_ptr.dtype.element_ty != tl.float32)
        residual = g - mean[:, None]
        if HAS_REGRESSION:
            residual -= trend[:, None] * (a - mean_a[:, None])
        dz = -direction[:, None] * residual * slope
        if not EVEN:
            # f(0) is not 0 for every f, and 0 - ḡ is not 0 either.
            a = tl.where(here, a, 0.0)
            dz = tl.where(here, dz, 0.0)
        tl.store(
            dz_row + at_o * dz_o + at_i * dz_i,
            (dz * dz_scale).to(dz_ptr.dtype.element_ty),
            mask=here,
        )
        sum_a += a
        sum_aa += a * a
        sum_g += g
        sum_gg += g * g
        sum_ag += a * g
        sum_dz += dz
        if D > 0:
            older = tl.load(
                a_ptr
                + e.to(tl.int64)[:, None, None] * a_e
                + (at_o * a_o + at_n * a_n + at_i * a_i)[None, :, :],
                mask=(e < D)[:, None, None] & here[None, :, :],
                other=0.0,
            ).to(tl.float32)
            sum_links += tl.sum(older * dz[None, :, :], axis=2)
    # Rows in the order of `Moment`, then the bias and the links. No module's constant is read here:
    # Triton would compare each with its old value at every launch.
    to = sums_ptr + share.to(tl.int64) * (7 + D) * row + c * neurons + n
    # Once, whatever the number of shares.
    count = tl.zeros((TILE_N,), tl.float32) + tl.where(share == 0, positions, 0.0)
    tl.store(to, count, mask=real)
    tl.store(to + row, tl.sum(sum_a, axis=1), mask=real)
    tl.store(to + 2 * row, tl.sum(sum_aa, axis=1), mask=real)
    tl.store(to + 3 * row, tl.sum(sum_g, axis=1), mask=real)
    tl.store(to + 4 * row, tl.sum(sum_gg, axis=1), mask=real)
    tl.store(to + 5 * row, tl.sum(sum_ag, axis=1), mask=real)
    tl.store(to + 6 * row, tl.sum(sum_dz, axis=1) * sum_scale, mask=real)
    if D > 0:
        # (C, D, N), as the parameter.
        links = sums_ptr + share.to(tl.int64) * (7 + D) * row + 7 * row
        at = (c * D + e)[:, None] * neurons + n[None, :]
        tl.store(links + at, sum_links * sum_scale, mask=(e < D)[:, None] & real[None, :])


class Signal(NamedTuple):
    """What the pass over the error leaves behind.

    Attributes:
        dz: `(C, *soma)`, dtype of z, still to be multiplied by `weight_scale`. Its memory is
            `(B, C * N, *spatial)` laid out as z, so that it is one convolution's output gradient
            without a copy.
        weight_scale: 1, but in float16.
        sums: `((7 + D) * C, N)`, float32; see `pbfx_kernels.moments`.
    """

    dz: Tensor
    weight_scale: float
    sums: Tensor


def candidate_moments(
    grad: Tensor,
    z: Tensor,
    activations: Tensor,
    direction: Tensor,
    error_mean: Tensor,
    regression: Tensor | None,
    activation: str,
    channel_axis: int,
) -> Signal:
    """Differentiate the candidates' covariance with the error up to `z`, and sum its moments.

    Args:
        grad: g, the error at the site's preactivation, `(*soma)`, any strides and float dtype.
        z: the candidates' preactivations, `(C, *soma)`, float32, float16 or bfloat16.
        activations: a, `(D, *soma)`, of the accepted dendrites.
        direction: `(C, N)`.
        error_mean: ḡ, `(N,)`.
        regression: β and ā, `(2, C, N)`, or None.
        activation: f, one of `ACTIVATIONS`.
        channel_axis: axis of the neurons in `grad`, negative (`Geometry.channel_axis`).
    """
    prepared = _prepare(
        (grad.shape, grad.stride(), grad.dtype),
        (z.shape, z.stride(), z.dtype),
        (activations.shape, activations.stride(), activations.dtype),
        (direction.dtype, error_mean.dtype, None if regression is None else regression.dtype),
        activation,
        channel_axis,
        grad.get_device(),
    )
    if prepared is None:
        grad = regular(grad, channel_axis)
        z, activations = (regular(stack, channel_axis, stacked=True) for stack in (z, activations))
        return candidate_moments(
            grad, z, activations, direction, error_mean, regression, activation, channel_axis
        )
    dz = z.new_empty_strided(z.shape, prepared.strides)
    if prepared.launch is None:
        total = grad.new_zeros(prepared.sums, dtype=torch.float32)
    else:
        total = grad.new_empty(prepared.sums, dtype=torch.float32)
        with on_device(grad):
            prepared.launch(
                grad.get_device(),
                grad,
                z,
                activations,
                direction.contiguous(),
                error_mean.contiguous(),
                None if regression is None else regression.contiguous(),
                dz,
                total,
            )
        if len(prepared.sums) == 3:
            total = total.sum(0)
    return Signal(dz, prepared.weight_scale, total)


class Prepared(NamedTuple):
    """What one site's passes have in common.

    Attributes:
        strides: of dz.
        weight_scale: of `Signal`.
        sums: shape of the kernel's output, with a leading axis if it is in shares.
        launch: of the kernel; None if there is nothing to sum.
    """

    strides: tuple[int, ...]
    weight_scale: float
    sums: tuple[int, ...]
    launch: Launch | None


Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


@functools.lru_cache(_REMEMBERED)
def _prepare(
    g: Form,
    z: Form,
    a: Form,
    steering: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    activation: str,
    channel_axis: int,
    __: int,
) -> Prepared | None:
    """Prepare the pass over tensors of this form; None if one of them cannot be walked.

    Args:
        g: shape, strides and dtype of the error.
        z: of the preactivations.
        a: of the older dendrites' activations.
        steering: dtypes of direction, mean and regression, for which Triton compiles anew.
        activation: f.
        channel_axis: axis of the neurons in the error, negative.
        __: the device, on which the compiled kernel lies.
    """
    count, dendrites = z[0][0], a[0][0]
    neurons, elements = g[0][channel_axis], math.prod(z[0])
    rows = (ROWS + dendrites) * count
    slices = (g[1], z[1][1:], a[1][1:]) if dendrites else (g[1], z[1][1:])
    if elements and not all(is_regular(g[0], strides, channel_axis) for strides in slices):
        return None
    strides = interleaved_strides(z[0], z[1], channel_axis)
    average = 1 / max(math.prod(g[0]) // max(neurons, 1), 1)
    # float16: 1/P on its own is below its smallest number for the P of a convolution, and the sum
    # of P terms without it is above the largest. So half of it before, and half after.
    half = math.sqrt(average) if z[2] == torch.float16 else 1.0
    if not elements:
        return Prepared(strides, half, (rows, neurons), None)
    # The strides of an empty stack say nothing, and must not keep the others from merging.
    older = a[1] if dendrites else z[1]
    way = walk(g[0], channel_axis, g[1], z[1][1:], strides[1:], older[1:])
    padded = power_of_two(max(dendrites, 1))
    plan = _plan(way.outer, way.inner, neurons, count, padded, way.strides[1][1] == 1)
    even = neurons % plan.tile_neurons == 0 and way.inner % plan.tile_inner == 0
    launch = Launch(
        _candidate_moments_kernel,
        (plan.programs, plan.shares),
        (
            neurons,
            way.outer,
            way.inner,
            count,
            count * neurons,
            *way.strides[0],
            z[1][0],
            *way.strides[1],
            strides[0],
            *way.strides[2],
            older[0],
            *way.strides[3],
            float(way.outer * way.inner),
            average / half,
            average,
        ),
        (
            *(activation, steering[2] is not None),
            *(dendrites, padded, even, plan.tile_neurons, plan.tile_inner),
        ),
        _WARPS,
    )
    sums = (rows, neurons) if plan.shares == 1 else (plan.shares, rows, neurons)
    return Prepared(strides, half, sums, launch)


class Plan(NamedTuple):
    """Tile and grid of the kernel."""

    tile_neurons: int
    tile_inner: int
    programs: int
    shares: int


def _plan(
    outer: int, inner: int, neurons: int, candidates: int, dendrites: int, neurons_adjoin: bool
) -> Plan:
    """Choose tile and grid from the sizes alone, so that sums come out the same on every GPU."""
    most = max(min(_TILE, _STACKED // dendrites), 1)
    all_neurons, all_inner = (power_of_two(max(n, 1)) for n in (neurons, inner))
    if neurons_adjoin:
        tile_neurons = min(all_neurons, _NEURONS_WIDE, most)
        tile_inner = min(all_inner, most // tile_neurons)
    else:
        tile_inner = min(all_inner, _INNER_WIDE, most)
        tile_neurons = min(all_neurons, most // tile_inner)
    programs = ceiling(neurons, tile_neurons) * candidates
    tiles = outer * ceiling(inner, tile_inner)
    shares = min(_PROGRAMS // max(programs, 1), ceiling(tiles, _TILES_EACH))
    return Plan(tile_neurons, tile_inner, programs, max(shares, 1))
