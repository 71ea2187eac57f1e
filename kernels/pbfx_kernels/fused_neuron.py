"""The *fused* strategy for linear ops: soma and dendrites in one kernel, from one read of `x`.

    z_d = V_d x + c_d + Σ_{e<d} U_{d,e} ⊙ a_e     a_d = f(z_d)     out = W x + b + Σ_d T_d ⊙ a_d

Shapes: P positions, K inputs, N neurons, D dendrites. The weights of a neuron, W_n and V_{d,n}, lie
next to one another (`interleave`), so a tile of positions by neurons is one wide product, as wide
as the matrix units like it. Its accumulators hold a neuron's soma and dendrites in the registers of
one thread, and taking them apart moves nothing.

Programs stay: one takes tile after tile, so that the loads of the next tile are under way while
activations are computed. Tiles are loaded by descriptors, which are bulk copies on Hopper.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.fused_configs import Blocks, neuron_blocks
from pbfx_kernels.launching import (
    ceiling,
    fast_activations,
    multiprocessors,
    on_device,
    power_of_two,
)
from pbfx_kernels.relaunch import boxes, relaunched
from pbfx_kernels.triton_math import cascade, link, negated_sum
from pbfx_kernels.walking import merged_stride

# Neurons whose weights are interleaved together: what a thread holds of a product's row is pairs of
# neighbours, eight columns apart.
QUAD = 4


@triton.jit
def apart(product, ROLES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Take an interleaved product, `(BLOCK_P, ROLES * BLOCK_N)`, apart into a tile per role."""
    if ROLES == 1:
        return (product,)
    else:
        # (block, high, neuron, low): role 2 high + low of neuron 4 block + neuron.
        HIGH: tl.constexpr = ROLES // 2
        product = tl.reshape(product, (BLOCK_P, BLOCK_N // 4, HIGH, 4, 2))
        product = tl.reshape(tl.permute(product, (0, 1, 3, 2, 4)), (BLOCK_P, BLOCK_N, HIGH, 2))
        even, odd = tl.split(product)
        evens = columns(even, HIGH)
        odds = columns(odd, HIGH)
        roles = ()
        for high in tl.static_range(HIGH):
            roles = roles + (evens[high], odds[high])
        return roles


@triton.jit
def columns(tiles, COUNT: tl.constexpr):
    """Take `(BLOCK_P, BLOCK_N, COUNT)` apart along its last axis, for a COUNT of 1, 2 or 4."""
    if COUNT == 1:
        return (tl.reshape(tiles, (tiles.shape[0], tiles.shape[1])),)
    elif COUNT == 2:
        first, second = tl.split(tiles)
        return first, second
    else:
        tl.static_assert(COUNT == 4, "roles come in twos, fours and eights")
        even, odd = tl.split(tl.reshape(tiles, (tiles.shape[0], tiles.shape[1], 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@relaunched
def _neuron_kernel(
    out,
    kept,
    x,
    weights,
    soma_bias,
    bias,
    to_soma,
    to_dendrite,
    P,
    N,
    K,
    kept_d,
    D: tl.constexpr,
    ROLES: tl.constexpr,
    KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_SOMA_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_P: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    blocks_p, blocks_n = tl.cdiv(P, BLOCK_P), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_p * blocks_n, PROGRAMS, flatten=True):
        # Programs that run together share rows and columns, so that the L2 cache serves them.
        first = tile // (GROUP_P * blocks_n) * GROUP_P
        rows = min(blocks_p - first, GROUP_P)
        within = tile % (GROUP_P * blocks_n)
        block_p, block_n = first + within % rows, within // rows

        product = tl.zeros((BLOCK_P, ROLES * BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            product = tl.dot(
                x.load([block_p * BLOCK_P, k]),
                weights.load([block_n * (ROLES * BLOCK_N), k]).T,
                product,
                input_precision=PRECISION,
            )
        roles = apart(product, ROLES, BLOCK_P, BLOCK_N)
        p = block_p * BLOCK_P + tl.arange(0, BLOCK_P)
        n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = n < N
        z = ()
        for d in tl.static_range(D):
            z = z + (roles[d + 1],)
        a = cascade(z, bias, to_dendrite, n, mask_n, N, D, HAS_BIAS, ACTIVATION, FAST, 1)
        s = roles[0]
        if HAS_SOMA_BIAS:
            s += link(soma_bias, n, mask_n, 1)
        s -= negated_sum(a, to_soma, n, mask_n, N, D, 1)
        row, mask = (p.to(tl.int64) * N)[:, None], (p < P)[:, None] & mask_n[None, :]
        # Rows first: columns then take registers of 32 bits, or none.
        tl.store(out + row + n[None, :], s.to(out.dtype.element_ty), mask=mask)
        if KEEP:
            for d in tl.static_range(D):
                at = kept + d * kept_d + row + n[None, :]
                tl.store(at, a[d].to(kept.dtype.element_ty), mask=mask)


@relaunched
def _interleave_kernel(
    rows,
    weight,
    dendrite_weight,
    N,
    K,
    ROW,
    CHANNELS,
    weight_n,
    weight_c,
    weight_t,
    dendrite_d,
    dendrite_n,
    dendrite_c,
    dendrite_t,
    D: tl.constexpr,
    ROLES: tl.constexpr,
    SOMA: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    # Where each thread of a product holds the roles of one neuron: see `apart`.
    if ROLES == 1:
        n, role = row, row * 0
    else:
        n = row // (4 * ROLES) * 4 + row % 8 // 2
        role = row % (4 * ROLES) // 8 * 2 + row % 2
    real = (n < N)[:, None] & (k < K)[None, :]
    channel, tap = (k % CHANNELS).to(tl.int64)[None, :], (k // CHANNELS).to(tl.int64)[None, :]
    wide = n.to(tl.int64)[:, None]
    d = role - SOMA
    theirs = dendrite_weight + d.to(tl.int64)[:, None] * dendrite_d
    theirs += wide * dendrite_n + channel * dendrite_c + tap * dendrite_t
    value = tl.load(theirs, mask=real & (d >= 0)[:, None] & (d < D)[:, None], other=0.0)
    value = value.to(rows.dtype.element_ty)
    if SOMA:
        own = weight + wide * weight_n + channel * weight_c + tap * weight_t
        soma = tl.load(own, mask=real & (d < 0)[:, None], other=0.0)
        value = tl.where((d < 0)[:, None], soma, value)
    at = rows + row.to(tl.int64)[:, None] * ROW + k[None, :]
    tl.store(at, value, mask=(row < (N + 3) // 4 * 4 * ROLES)[:, None] & (k < ROW)[None, :])


def interleave(
    weight: Tensor | None,
    dendrite_weight: Tensor,
    aligned: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Lay the weights of each neuron side by side, as the kernels read them, in one launch.

    Args:
        weight: W, `(N, K)` or `(N, channels / groups, *kernel)`, any strides; None where the soma
            is computed elsewhere.
        dendrite_weight: V, `(D, *W)`, D from 1 to 7, any float dtype and strides.
        aligned: what the length of a row is rounded up to a multiple of, with zeros.
        dtype: of the result, by default that of W, or else of V.

    Returns:
        `(R * M, K)` contiguous, taps before channels: R is the number of `roles_of`, and M is N,
        rounded up to a multiple of 4; roles and neurons that do not exist are zeros.
    """
    dendrites, neurons, channels, *kernel = dendrite_weight.shape
    own, soma = (dendrite_weight[0], False) if weight is None else (weight, True)
    inputs, roles = channels * math.prod(kernel), roles_of(dendrites, soma)
    length = ceiling(inputs, aligned) * aligned
    own, tap = _walked(own, 2)
    dendrite_weight, dendrite_tap = _walked(dendrite_weight, 3)
    shape = ceiling(neurons, QUAD) * QUAD * roles, length
    rows = own.new_empty(shape, dtype=dtype or own.dtype)
    block, deep = 32, min(128, power_of_two(length))
    with on_device(rows):
        _interleave_kernel[(ceiling(len(rows), block), ceiling(length, deep))](
            rows,
            own,
            dendrite_weight,
            neurons,
            inputs,
            length,
            channels,
            *own.stride()[:2],
            tap,
            *dendrite_weight.stride()[:3],
            dendrite_tap,
            D=dendrites,
            ROLES=roles,
            SOMA=int(soma),
            BLOCK=block,
            BLOCK_K=deep,
        )
    return rows


def _walked(weight: Tensor, before: int) -> tuple[Tensor, int]:
    """Return weights whose taps, the axes after the first `before`, have one stride, and that."""
    kernel, strides = tuple(weight.shape[before:]), tuple(weight.stride()[before:])
    tap = merged_stride(kernel, strides)
    if tap is None:
        weight = weight.contiguous()
        tap = 1
    return weight, tap


def roles_of(dendrites: int, soma: bool = True) -> int:
    """Return how many roles 1 to 7 dendrites and a soma take up side by side: a power of two."""
    return power_of_two(dendrites + soma)


def can_describe(x: Tensor) -> bool:
    """Return whether a descriptor can load from `x`, `(P, K)`: rows dense, 16 bytes apart."""
    row = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and row % 16 == 0 and x.data_ptr() % 16 == 0


def fused_neuron(
    x: Tensor,
    weights: Tensor,
    soma_bias: Tensor | None,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    out: Tensor,
    kept: Tensor | None,
    blocks: Blocks | None = None,
) -> None:
    """Write the neuron's output, and the activations if `kept` is given.

    Args:
        x: `(P, K)`, not empty, `can_describe`; float16, bfloat16, or float32 for TF32 products.
        weights: W and V, `interleave`d, the dtype of `x`.
        soma_bias: b, `(N,)`, any float dtype, or None.
        bias: c, `(D, N)`, likewise.
        to_soma: T, `(D, N)`, D from 1 to 7, any float dtype.
        to_dendrite: U, `(D, D, N)`, likewise.
        activation: f, one of `ACTIVATIONS`.
        out: `(P, N)`, contiguous; written.
        kept: `(D, P, N)`, contiguous; written.
        blocks: the configuration, by default `neuron_blocks`'.
    """
    dendrites, neurons = to_soma.shape
    positions, inputs = x.shape
    shape = positions, neurons, inputs, dendrites
    blocks = blocks or neuron_blocks(*shape, x.element_size(), kept is not None)
    roles = roles_of(dendrites)
    tiles = ceiling(positions, blocks.positions) * ceiling(neurons, blocks.neurons)
    programs = min(tiles, multiprocessors(x) * blocks.resident)
    with on_device(x):
        _neuron_kernel[(programs,)](
            out,
            # A pointer has to be one, whether it is read or not.
            out if kept is None else kept,
            _described(x, blocks.positions, blocks.inputs),
            _described(weights, roles * blocks.neurons, blocks.inputs),
            to_soma if soma_bias is None else soma_bias,
            to_soma if bias is None else bias.contiguous(),
            to_soma.contiguous(),
            to_dendrite.contiguous(),
            positions,
            neurons,
            inputs,
            0 if kept is None else kept.stride(0),
            D=dendrites,
            ROLES=roles,
            KEEP=kept is not None,
            ACTIVATION=activation,
            FAST=fast_activations(x),
            HAS_SOMA_BIAS=soma_bias is not None,
            HAS_BIAS=bias is not None,
            PRECISION="tf32",
            BLOCK_P=blocks.positions,
            BLOCK_N=blocks.neurons,
            BLOCK_K=blocks.inputs,
            GROUP_P=8,
            PROGRAMS=programs,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


def _described(matrix: Tensor, rows: int, columns: int) -> Any:
    return boxes(matrix, matrix.shape, matrix.stride(), (rows, columns))
