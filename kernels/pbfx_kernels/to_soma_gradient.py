"""The one gradient of accepted dendrites, as a reduction in one pass over the activations.

    dT_d = Σ_p g ⊙ a_d

Shapes: P positions, N neurons, D dendrites. The error `g` is read once for all dendrites. The sum
runs in two stages: each program adds up its share of the positions in a fixed order and writes
`(shares, D, N)` partial sums in float32, and one `torch.sum` adds the shares. No atomics, so the
result is the same bits in every run, whether torch asks for that or not.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.epilogue import Tile, tile_of
from pbfx_kernels.launching import ceiling, multiprocessors, on_device
from pbfx_kernels.layout import grid_of, is_regular, regular

# Programs per multiprocessor: enough to hide latency, few enough that partial sums stay small.
_WAVES = 8
# Each dendrite is a tile of partial sums in registers.
MOST_DENDRITES = 8


@triton.jit
def _to_soma_gradient_kernel(
    partial,
    grad,
    activations,
    P,
    S,
    N,
    share,
    a_d,
    grad_b,
    grad_s,
    grad_n,
    a_b,
    a_s,
    a_n,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    wide_n = n.to(tl.int64)[None, :]
    start = (pid // blocks_n).to(tl.int64) * share
    # Of tiles, not of sums: the reduction across threads happens once, at the end.
    sums = ()
    for _ in tl.static_range(D):
        sums = sums + (tl.zeros((BLOCK_P, BLOCK_N), tl.float32),)
    for step in range(0, share, BLOCK_P):
        p = start + step + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & mask_n[None, :]
        if ROWS:
            outer = p[:, None]
            inner = tl.zeros_like(outer)
        else:
            outer = (p // S)[:, None]
            inner = (p % S)[:, None]
        g = tl.load(grad + outer * grad_b + inner * grad_s + wide_n * grad_n, mask=mask, other=0.0)
        at = activations + outer * a_b + inner * a_s + wide_n * a_n
        added = ()
        for d in tl.static_range(D):
            a = tl.load(at, mask=mask, other=0.0)
            added = added + (sums[d] + g.to(tl.float32) * a.to(tl.float32),)
            at += a_d
        sums = added
    partial += (pid // blocks_n).to(tl.int64) * D * N + n
    for d in tl.static_range(D):
        tl.store(partial + d * N, tl.sum(sums[d], axis=0), mask=mask_n)


def to_soma_gradient(grad: Tensor, activations: Tensor, channel_axis: int) -> Tensor:
    """Sum `dT_d = Σ_p g ⊙ a_d`.

    Args:
        grad: g, `(*soma)`, any strides, not empty.
        activations: a, `(D, *soma)`, any strides, any float dtype; 1 <= D <= `MOST_DENDRITES`.
        channel_axis: axis of the neurons in `grad`, negative (`Geometry.channel_axis`).

    Returns:
        `(D, N)`, float32.
    """
    dendrites, neurons = activations.shape[0], grad.shape[channel_axis]
    grad = regular(grad, channel_axis)
    if not is_regular(activations[0], channel_axis):
        activations = activations.contiguous()
    grid = grid_of(channel_axis, activations[0], grad)
    tile = tile_of(grid.positions, neurons, dendrites, grid.channels_last)
    share, shares = _shares(grid.positions, neurons, tile, multiprocessors(grad))
    partial = grad.new_empty((shares, dendrites, neurons), dtype=torch.float32)
    with on_device(grad):
        _to_soma_gradient_kernel[(shares * ceiling(neurons, tile.neurons),)](
            partial,
            grad,
            activations,
            grid.positions,
            grid.inner,
            neurons,
            share,
            activations.stride(0),
            *grid.strides[1],
            *grid.strides[0],
            D=dendrites,
            ROWS=grid.inner == 1,
            BLOCK_P=tile.positions,
            BLOCK_N=tile.neurons,
            num_warps=tile.warps,
        )
    return partial[0] if shares == 1 else partial.sum(0)


def _shares(positions: int, neurons: int, tile: Tile, multiprocessors: int) -> tuple[int, int]:
    """Return positions per program, whole tiles, and how many programs share the positions."""
    tiles = ceiling(positions, tile.positions)
    wanted = max(1, _WAVES * multiprocessors // ceiling(neurons, tile.neurons))
    each = ceiling(tiles, min(tiles, wanted))
    return each * tile.positions, ceiling(tiles, each)
