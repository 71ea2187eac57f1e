"""The gradient of a neuron's cascade, in one pass over the error and the preactivations.

    a_d = f(z_d + c_d + Σ_{e<d} U_{d,e} ⊙ a_e)
    dz_d = f'(z_d) ⊙ (T_d ⊙ g + Σ_{k>d} U_{k,d} ⊙ dz_k)                 d = D, D-1, ..., F+1
    dT_d = Σ_p g ⊙ a_d        dc_d = Σ_p dz_d        dU_{d,e} = Σ_p dz_d ⊙ a_e

Shapes: P positions, N neurons, D dendrites, of which the oldest F do not learn, walked as (outer,
neuron, inner). `z` is what a library's product over stacked weights wrote, `(..., D * N)` or `(B,
D * N, *spatial)` in the order (group, d, neuron of the group); `dz` has the same form for D - F
dendrites, so the products that follow take it without a copy.

Recomputed: bias, cascade and activation, in registers, in float32. So a forward writes nothing for
its backward but `z`, and f' comes from numbers that were rounded before f and not after it: 1 - a²
of a rounded a next to 1 is mostly rounding. Sums run in two stages without atomics: the result is
the same bits in every run and on every GPU.

Floor: bytes. g and z are read once, dz is written once.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018, for the neuron; its
gradient is the chain rule.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import fast_activations
from pbfx_kernels.relaunch import Launch
from pbfx_kernels.triton_math import activation_and_slope, link, zeros
from pbfx_kernels.walking import ceiling, on_device, power_of_two, regular, walk

# Forms of sites; a training loop meets a handful.
_REMEMBERED = 4096
_WARPS = 4
_THREADS = 32 * _WARPS
# Registers of a thread that hold sums; more, and too few programs fit to hide the memory's latency.
_SUMMING = 48
# Elements per thread: of 16 bits, eight are the widest load.
_MOST_EACH = 8
# Of the axis that is contiguous in memory.
_NEURONS_WIDE = 64
_INNER_WIDE = 256
# Programs, and tiles on their way from memory while one is computed, for one dendrite and for more.
# As many programs as run at once on an H200, by their registers: more would only make more partial
# sums. On it 16384 x 3072 in bfloat16 takes 84 us at D = 1, 90 with three stages; at D = 3 it takes
# 210, with one stage and twice the programs 251.
_PROGRAMS, _STAGES = (1024, 512), (1, 3)
# Fewer tiles than this per program do not pay for a second stage.
_TILES_EACH = 4


@triton.jit
def _cascade_gradient_kernel(
    g_ptr,
    z_ptr,
    bias_ptr,
    to_soma_ptr,
    to_dendrite_ptr,
    dz_ptr,
    sums_ptr,
    neurons,
    outer,
    inner,
    group,
    g_o,
    g_n,
    g_i,
    z_d,
    z_o,
    z_n,
    z_i,
    dz_d,
    dz_o,
    dz_n,
    dz_i,
    D: tl.constexpr,
    FROZEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
):
    program, share = tl.program_id(0), tl.program_id(1)
    n = program * TILE_N + tl.arange(0, TILE_N)
    real = n < neurons
    at_n = n.to(tl.int64)[:, None]
    at_z, at_dz = at_n, at_n
    if GROUPED:
        at_z = at_n // group * (D * group) + at_n % group
        at_dz = at_n // group * ((D - FROZEN) * group) + at_n % group
    g_row = g_ptr + at_n * g_n
    z_row = z_ptr + at_z * z_n
    dz_row = dz_ptr + at_dz * dz_n
    biases, links_t, links_u = (), (), ()
    for d in tl.static_range(D):
        links_t = links_t + (link(to_soma_ptr + d * neurons, n, real, 0),)
        if HAS_BIAS:
            biases = biases + (link(bias_ptr + d * neurons, n, real, 0),)
        # Row d of the strictly lower triangle starts at d (d - 1) / 2.
        for e in tl.static_range(d):
            links_u = links_u + (link(to_dendrite_ptr + (d * D + e) * neurons, n, real, 0),)
    sums_t = zeros(D if SUMS else 0, TILE_N, TILE_I)
    sums_c = zeros(D - FROZEN if SUMS else 0, TILE_N, TILE_I)
    # The pairs e < d with d >= FROZEN, row by row.
    sums_u = zeros((D * (D - 1) - FROZEN * (FROZEN - 1)) // 2 if SUMS else 0, TILE_N, TILE_I)
    tiles = tl.cdiv(inner, TILE_I)
    for tile in tl.range(share, outer * tiles, tl.num_programs(1), num_stages=STAGES):
        at_o = (tile // tiles).to(tl.int64)
        at_i = ((tile % tiles).to(tl.int64) * TILE_I + tl.arange(0, TILE_I))[None, :]
        # Whole tiles everywhere: the compiler drops a mask of constants, and what it costs.
        here = tl.full((TILE_N, TILE_I), True, tl.int1)
        if not EVEN:
            here = real[:, None] & (at_i < inner)
        # What is not there has no error, and so adds nothing to any sum.
        g = tl.load(g_row + at_o * g_o + at_i * g_i, mask=here, other=0.0).to(tl.float32)
        at = z_row + at_o * z_o + at_i * z_i
        loaded = ()
        for _ in tl.static_range(D):
            loaded = loaded + (tl.load(at, mask=here, other=0.0).to(tl.float32),)
            at += z_d
        a, slopes = (), ()
        for d in tl.static_range(D):
            z = loaded[d]
            if HAS_BIAS:
                z += biases[d]
            for e in tl.static_range(d):
                z += links_u[(d * (d - 1)) // 2 + e] * a[e]
            a_d, slope = activation_and_slope(z, ACTIVATION, FAST)
            a, slopes = a + (a_d,), slopes + (slope,)
        # The newest first; dz holds those of D-i, ..., D-1.
        dz = ()
        for i in tl.static_range(D - FROZEN):
            error = links_t[D - 1 - i] * g
            for k in tl.static_range(i):
                error += links_u[((D - i + k) * (D - 1 - i + k)) // 2 + D - 1 - i] * dz[k]
            dz = (error * slopes[D - 1 - i],) + dz
        at = dz_row + at_o * dz_o + at_i * dz_i
        for d in tl.static_range(D - FROZEN):
            tl.store(at, dz[d].to(dz_ptr.dtype.element_ty), mask=here)
            at += dz_d
        if SUMS:
            added_t, added_c, added_u = (), (), ()
            for d in tl.static_range(D):
                added_t = added_t + (sums_t[d] + g * a[d],)
            for d in tl.static_range(D - FROZEN):
                added_c = added_c + (sums_c[d] + dz[d],)
                for e in tl.static_range(FROZEN + d):
                    pair = sums_u[(d * (d - 1)) // 2 + d * FROZEN + e]
                    added_u = added_u + (pair + dz[d] * a[e],)
            sums_t, sums_c, sums_u = added_t, added_c, added_u
    if SUMS:
        # (D, N), (D, N) and (D, D, N), one after the other; zeros where nothing learns.
        to = sums_ptr + share.to(tl.int64) * ((2 * D + D * D) * neurons) + n
        nothing = tl.zeros((TILE_N,), tl.float32)
        for d in tl.static_range(D):
            tl.store(to + d * neurons, tl.sum(sums_t[d], axis=1), mask=real)
            if d >= FROZEN:
                tl.store(to + (D + d) * neurons, tl.sum(sums_c[d - FROZEN], axis=1), mask=real)
            else:
                tl.store(to + (D + d) * neurons, nothing, mask=real)
            for e in tl.static_range(D):
                row = to + (2 * D + d * D + e) * neurons
                if d >= FROZEN and e < d:
                    pair = sums_u[(d * (d - 1) - FROZEN * (FROZEN - 1)) // 2 + e]
                    tl.store(row, tl.sum(pair, axis=1), mask=real)
                else:
                    tl.store(row, nothing, mask=real)


def cascade_gradient(
    grad: Tensor,
    z: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    frozen: int,
    sums: bool,
) -> tuple[Tensor, Tensor]:
    """Differentiate a site's output up to its dendrites' products.

    Args:
        grad: g, `(*soma)`, any strides, not empty.
        z: V x without bias, `(..., D * N)` or `(B, D * N, *spatial)`, dense; float32, float16 or
            bfloat16; 1 <= D <= `epilogue.MOST_DENDRITES`.
        bias: c, `(D, N)`, any float dtype, or None.
        to_soma: T, `(D, N)`, likewise.
        to_dendrite: U, `(D, D, N)`, likewise.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma.
        frozen: F < D: how many of the oldest dendrites get no gradient but of their `to_soma`.
        sums: whether to sum the gradients of links and biases.

    Returns:
        dz: as z with D - F in place of D, dtype of `z`.
        sums: dT, dc and dU, `(2 * D + D * D, N)`, float32, zero where there is none; `(0, N)` if
            they are not wanted.
    """
    axis = geometry.channel_axis
    grad, z = regular(grad, axis), regular(z, axis)
    prepared = _prepare(
        (grad.shape, grad.stride(), grad.dtype),
        (z.shape, z.stride(), z.dtype),
        tuple(None if t is None else t.dtype for t in (bias, to_soma, to_dendrite)),
        (to_soma.shape[0], frozen, sums),
        activation,
        axis,
        geometry.groups,
        fast_activations(grad),
        grad.get_device(),
    )
    dz = z.new_empty_strided(prepared.shape, prepared.strides)
    total = grad.new_empty(prepared.sums, dtype=torch.float32)
    with on_device(grad):
        prepared.launch(
            grad.get_device(),
            grad,
            z,
            None if bias is None else bias.contiguous(),
            to_soma.contiguous(),
            to_dendrite.contiguous(),
            dz,
            total,
        )
    return dz, total.sum(0) if total.dim() == 3 else total


class Prepared(NamedTuple):
    """What one site's passes have in common.

    Attributes:
        shape: of dz.
        strides: of dz.
        sums: shape of the kernel's sums, with a leading axis if they are in shares.
        launch: of the kernel.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    sums: tuple[int, ...]
    launch: Launch


Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


@functools.lru_cache(_REMEMBERED)
def _prepare(
    g: Form,
    z: Form,
    _: tuple[torch.dtype | None, ...],
    learning: tuple[int, int, bool],
    activation: str,
    channel_axis: int,
    groups: int,
    fast: bool,
    __: int,
) -> Prepared:
    """Prepare the pass over tensors of this form, each of which can be walked.

    Args:
        g: shape, strides and dtype of the error.
        z: of the preactivations.
        _: dtypes of bias and links, for which Triton compiles anew.
        learning: D, F, and whether there are sums.
        activation: f.
        channel_axis: axis of the neurons in the error, negative.
        groups: G.
        fast: see `triton_math.activate`.
        __: the device, on which the compiled kernel lies.
    """
    dendrites, frozen, sums = learning
    count, neurons = dendrites - frozen, g[0][channel_axis]
    group = neurons // groups
    shape = list(z[0])
    shape[channel_axis] = count * neurons
    strides = dense_strides(tuple(shape), z[1])
    way = walk(g[0], channel_axis, g[1], z[1], strides)
    plan = _plan(way.outer, way.inner, neurons, dendrites, frozen, way.strides[1][1] == 1)
    even = neurons % plan.tile_neurons == 0 and way.inner % plan.tile_inner == 0
    launch = Launch(
        _cascade_gradient_kernel,
        (plan.programs, plan.shares),
        (
            *(neurons, way.outer, way.inner, group),
            *way.strides[0],
            group * z[1][channel_axis],
            *way.strides[1],
            group * strides[channel_axis],
            *way.strides[2],
        ),
        (
            *(
                dendrites,
                frozen,
                activation,
                fast,
                _[0] is not None,
                sums,
                groups > 1,
                even,
                plan.stages,
            ),
            *(plan.tile_neurons, plan.tile_inner),
        ),
        _WARPS,
    )
    rows = 2 * dendrites + dendrites * dendrites if sums else 0
    parts = (rows, neurons) if plan.shares == 1 or not sums else (plan.shares, rows, neurons)
    return Prepared(tuple(shape), strides, parts, launch)


def dense_strides(shape: tuple[int, ...], like: tuple[int, ...]) -> tuple[int, ...]:
    """Return strides without gaps for `shape`, its axes in memory in the order of `like`'s."""
    strides, step = [0] * len(shape), 1
    # Of axes that do not matter, being of size 1, the last is the innermost.
    for axis in sorted(range(len(shape)), key=lambda axis: (like[axis], -axis)):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


class Plan(NamedTuple):
    """Tile, grid and pipeline of the kernel."""

    tile_neurons: int
    tile_inner: int
    programs: int
    shares: int
    stages: int


def _plan(
    outer: int, inner: int, neurons: int, dendrites: int, frozen: int, neurons_adjoin: bool
) -> Plan:
    """Choose tile and grid from the sizes alone, so that sums come out the same on every GPU."""
    summed = 2 * dendrites - frozen
    summed += (dendrites * (dendrites - 1) - frozen * (frozen - 1)) // 2
    each = max(1, min(_MOST_EACH, _SUMMING // summed))
    # The greatest power of two that is not above `each`.
    most = _THREADS << (each.bit_length() - 1)
    all_neurons, all_inner = power_of_two(neurons), power_of_two(inner)
    if neurons_adjoin:
        tile_neurons = min(all_neurons, _NEURONS_WIDE)
        tile_inner = min(all_inner, most // tile_neurons)
    else:
        tile_inner = min(all_inner, _INNER_WIDE, most)
        tile_neurons = min(all_neurons, most // tile_inner)
    programs = ceiling(neurons, tile_neurons)
    tiles = outer * ceiling(inner, tile_inner)
    several = int(dendrites > 1)
    shares = min(_PROGRAMS[several] // programs, ceiling(tiles, _TILES_EACH))
    return Plan(tile_neurons, tile_inner, programs, max(shares, 1), _STAGES[several])
