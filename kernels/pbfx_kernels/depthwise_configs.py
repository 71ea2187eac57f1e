"""Configurations of the depthwise kernels: a pure function over shape.

A thread holds, per channel of its own, an accumulator for each role and row of a strip, and the
rows of the input that they read. So many registers set how many channels or columns it takes.
"""

from dataclasses import dataclass

from pbfx_kernels.launching import ceiling, power_of_two

WARPS = 4
# Accumulators that a thread holds: with inputs, addresses and masks, 160 registers, which leave
# room for three programs of four warps.
_HELD = 64
# Taps along a column up to which they are unrolled; a longer kernel is looped over, row by row.
UNROLLED_TAPS = 7


@dataclass(frozen=True, slots=True)
class Strips:
    """The configuration of the depthwise kernels.

    Attributes:
        rows: ROWS, outputs below one another that a thread computes.
        strips: BLOCK_S, patches of outputs of a program, a power of two.
        neurons: BLOCK_N, likewise.
        unrolled: columns of taps up to which they are unrolled.
        columns: COLUMNS, outputs side by side that a thread computes; divides W', and is 1 unless
            all taps are unrolled.
    """

    rows: int
    strips: int
    neurons: int
    unrolled: int = 3
    columns: int = 1


def depthwise_strips(
    out: tuple[int, ...],
    roles: int,
    form: tuple[int, ...],
    up: tuple[int, int],
    channels_last: bool,
) -> Strips:
    """Choose the configuration of the depthwise kernels.

    Args:
        out: `(B, N, H', W')`, the shape of the output.
        roles: D, or D + 1 where the soma is computed too.
        form: stride, padding, dilation and taps, each down and along.
        up: see `depthwise_planes.Planes`; rows and columns are multiples of it.
        channels_last: whether the channels are neighbours in memory; else columns are.
    """
    _, neurons, height, width = out
    taps, across = form[6:]
    wide = wide_of(neurons, channels_last)
    each = 2 if channels_last else 1
    if taps > UNROLLED_TAPS or across > 3:
        rows, columns = (1 if taps > UNROLLED_TAPS else min(4, power_of_two(height))), 1
    else:
        held = _HELD // (each * roles)
        columns = next(n for n in (4, 2, 7, 1) if width % n == 0 and n % up[1] == 0)
        fits = [n for n in (8, 7, 4, 2, 1) if n % up[0] == 0 and n <= max(held // columns, up[0])]
        # Few rows past the end; then the most that registers hold.
        rows = min(fits, key=lambda n: (ceiling(height, n) * n, -n))
    return Strips(rows, each * 32 * WARPS // wide, wide, columns=columns)


def wide_of(neurons: int, channels_last: bool) -> int:
    """Return how many neurons a tile has: few lanes wasted, or columns on a tile of one neuron."""
    if not channels_last:
        return 1
    return min((64, 32, 16), key=lambda wide: ceiling(neurons, wide) * wide)
