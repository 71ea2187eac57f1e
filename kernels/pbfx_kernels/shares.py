"""Add up what programs have summed, each a share of the positions: always in the same order.

    total_c = Σ_s partial_{s, c}

Shapes: S shares, C columns. The sums of a site are some hundred columns of up to some thousand
shares, so on the host it is a launch, of which `Tensor.sum` costs several. On an H200, 96 columns
of 132, 1056 and 5408 shares take 2.2, 3.5 and 7.1 µs, and `Tensor.sum` 3.8, 9.2 and 8.0.
"""

# The type checker does not know what Triton adds to Python: launch options.
# pyright: reportCallIssue=false, reportArgumentType=false

import functools
import math

import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.launching import ceiling, on_device, power_of_two
from pbfx_kernels.relaunch import Launch
from pbfx_kernels.walking import REMEMBERED

# Columns of a program: 32 bytes, as memory is read at least, so that there are many programs.
_COLUMNS = 8
# Shares that are loaded at a time, 64 numbers for each of 128 threads.
_MOST_SHARES, _WARPS = 1024, 4


@triton.jit
def _shares_kernel(out, partial, S, C, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s < S)[:, None] & (c < C)[None, :]
        total += tl.load(partial + s.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0)
    tl.store(out + c, tl.sum(total, axis=0), mask=c < C)


def added(partial: Tensor) -> Tensor:
    """Add up shares.

    Args:
        partial: `(S, ...)`, float32, contiguous, not empty.

    Returns:
        `(...)`, a part of `partial` where there is one share; the same bits in every run.
    """
    shares, *shape = partial.shape
    if shares == 1:
        return partial[0]
    out = partial.new_empty(shape)
    with on_device(partial):
        _prepare(shares, math.prod(shape), partial.get_device())(partial.get_device(), out, partial)
    return out


@functools.lru_cache(REMEMBERED)
def _prepare(shares: int, columns: int, _: int) -> Launch:
    """Prepare the pass over sums of this form, on one device."""
    block = min(_MOST_SHARES, power_of_two(shares))
    grid = ceiling(columns, _COLUMNS), 1
    return Launch(_shares_kernel, grid, (shares, columns), (block, _COLUMNS), _WARPS)
