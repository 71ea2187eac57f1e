"""Both sums that a linear op's backward takes over positions, from one read of the error.

    dT_d = Σ_p g ⊙ a_d        db = Σ_p g

Shapes: P positions, N neurons, D dendrites. Apart, they read `g` twice. The sum runs in two stages:
each program adds up its share of the positions in a fixed order and writes `(shares, D + 1, N)`
partial sums in float32, and a second kernel adds the shares and rounds. No atomics, so the result
is the same bits in every run.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.launching import ceiling, multiprocessors, on_device, power_of_two
from pbfx_kernels.relaunch import Launch
from pbfx_kernels.walking import REMEMBERED

# Elements of a tile, and its columns: a thread holds 8 of each of D + 1 tensors, 16 bytes of 16-bit
# ones.
_TILE, _WIDE = 1024, 128
# Programs per multiprocessor. More write more partial sums: two took 6 % less than four at
# 16384x3072, and 31 % less at 4096x1024.
_RESIDENT = 2
# Tiles on their way to each while it adds one up, and the bytes that they may be: a quarter of what
# an A100 shares, less what the system takes.
_MOST_WAITING, _SHARED = 3, 36 * 1024
# Of the second stage: partial sums that are added side by side, and neurons.
_BLOCK, _NARROW = 32, 32
# Each dendrite is a tile of partial sums in registers.
MOST_DENDRITES = 8


@triton.jit
def _sums_kernel(
    partial,
    grad,
    activations,
    P,
    N,
    share,
    grad_p,
    a_d,
    a_p,
    D: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, wide_n = (n < N)[None, :], n[None, :]
    start = tl.program_id(1).to(tl.int64) * share
    end = min(start + share, P)
    # Of tiles, not of sums: the reduction across threads happens once, at the end.
    sums = ()
    for _ in tl.static_range(D + 1):
        sums = sums + (tl.zeros((BLOCK_P, BLOCK_N), tl.float32),)
    for step in tl.range(0, share, BLOCK_P, num_stages=STAGES):
        p = start + step + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & mask_n
        g = tl.load(grad + (p * grad_p)[:, None] + wide_n, mask=mask, other=0.0).to(tl.float32)
        at = activations + (p * a_p)[:, None] + wide_n
        added = ()
        for d in tl.static_range(D):
            a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            added = added + (sums[d] + g * a,)
            at += a_d
        sums = added + (sums[D] + g,)
    partial += tl.program_id(1).to(tl.int64) * (D + 1) * N + n
    for row in tl.static_range(D + 1):
        tl.store(partial + row * N, tl.sum(sums[row], axis=0), mask=n < N)


@triton.jit
def _finish_kernel(
    of_links,
    of_bias,
    partial,
    N,
    shares,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, mask_n = tl.program_id(1), n < N
    total = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    for first in range(0, shares, BLOCK):
        share = first + tl.arange(0, BLOCK)
        at = (share.to(tl.int64) * (D + 1) + row)[:, None] * N + n[None, :]
        mask = (share < shares)[:, None] & mask_n[None, :]
        total += tl.load(partial + at, mask=mask, other=0.0)
    found = tl.sum(total, axis=0)
    if row < D:
        tl.store(of_links + row * N + n, found.to(of_links.dtype.element_ty), mask=mask_n)
    else:
        tl.store(of_bias + n, found.to(of_bias.dtype.element_ty), mask=mask_n)


def link_and_bias_gradients(
    grad: Tensor, activations: Tensor, links: torch.dtype, bias: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum `dT_d = Σ_p g ⊙ a_d` and `db = Σ_p g` of a linear op.

    Args:
        grad: g, `(P, N)`, any strides, not empty.
        activations: a, `(D, P, N)`, any strides, any float dtype; 1 <= D <= `MOST_DENDRITES`.
        links: dtype of dT.
        bias: dtype of db.

    Returns:
        `(D, N)` and `(N,)`.
    """
    grad, activations = (t if t.stride(-1) == 1 else t.contiguous() for t in (grad, activations))
    dendrites, positions, neurons = activations.shape
    prepared = _prepare(
        (positions, neurons, dendrites),
        (grad.stride(0), *activations.stride()[:2]),
        (grad.dtype, activations.dtype, links, bias),
        grad.get_device(),
        multiprocessors(grad),
    )
    partial = grad.new_empty((prepared.shares, dendrites + 1, neurons), dtype=torch.float32)
    of_links = grad.new_empty((dendrites, neurons), dtype=links)
    of_bias = grad.new_empty(neurons, dtype=bias)
    with on_device(grad):
        prepared.add(grad.get_device(), partial, grad, activations)
        prepared.finish(grad.get_device(), of_links, of_bias, partial)
    return of_links, of_bias


class Prepared(NamedTuple):
    """What one site's passes have in common.

    Attributes:
        add: the launch of the first stage.
        finish: of the second.
        shares: how many sums there are between them.
    """

    add: Launch
    finish: Launch
    shares: int


@functools.lru_cache(REMEMBERED)
def _prepare(
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    dtypes: tuple[torch.dtype, ...],
    _: int,
    multiprocessors: int,
) -> Prepared:
    """Prepare the passes over tensors of this form.

    Args:
        shape: P, N, D.
        strides: of a row of the error, of a dendrite and of a row of its activations.
        dtypes: of what is read and of what is written, for which Triton compiles anew.
        _: the device, on which the compiled kernels lie.
        multiprocessors: how many it has.
    """
    positions, neurons, dendrites = shape
    wide = min(_WIDE, power_of_two(neurons))
    tall = _TILE // wide
    waiting = _SHARED // (_TILE * (dtypes[0].itemsize + dendrites * dtypes[1].itemsize))
    stages = 1 + max(1, min(_MOST_WAITING, waiting))
    columns, tiles = ceiling(neurons, wide), ceiling(positions, tall)
    each = ceiling(tiles, max(1, _RESIDENT * multiprocessors // columns))
    shares = ceiling(tiles, each)
    add = Launch(
        _sums_kernel,
        (columns, shares),
        (positions, neurons, each * tall, *strides),
        (dendrites, stages, tall, wide),
        4,
    )
    narrow = min(_NARROW, power_of_two(neurons))
    grid = ceiling(neurons, narrow), dendrites + 1
    finish = Launch(_finish_kernel, grid, (neurons, shares), (dendrites, _BLOCK, narrow), 4)
    return Prepared(add, finish, shares)
