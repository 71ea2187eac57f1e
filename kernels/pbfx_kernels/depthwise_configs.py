"""Configurations of the depthwise kernels: a pure function over shape.

A thread holds, per channel of its own, an accumulator for each role and row of a strip, and the
rows of the input that they read. So many registers set how many channels or columns it takes.
"""

from dataclasses import dataclass

from pbfx_kernels.launching import ceiling, power_of_two

WARPS = 4
# Float32 values of accumulators and inputs that a thread holds: with addresses and masks, 160
# registers, which leave room for three programs of four warps.
_HELD = 96
# Taps along a column up to which they are unrolled; a longer kernel is looped over, row by row.
UNROLLED_TAPS = 7
# Programs of four warps that keep a large GPU busy: an H200 has 132 multiprocessors.
_BUSY = 4 * 132


@dataclass(frozen=True, slots=True)
class Strips:
    """The configuration of the depthwise kernels.

    Attributes:
        rows: ROWS, outputs of a strip.
        strips: BLOCK_S, a power of two.
        neurons: BLOCK_N, likewise.
        unrolled: columns of taps up to which they are unrolled.
    """

    rows: int
    strips: int
    neurons: int
    unrolled: int = 3


def depthwise_strips(
    images: int,
    height: int,
    width: int,
    neurons: int,
    roles: int,
    taps: int,
    stride: int,
    dilation: int,
    channels_last: bool,
) -> Strips:
    """Choose the configuration of the depthwise kernels.

    Args:
        images: B.
        height: H', rows of the output.
        width: W'.
        neurons: N.
        roles: D, or D + 1 where the soma is computed too.
        taps: of the kernel, down.
        stride: likewise.
        dilation: likewise.
        channels_last: whether the channels are neighbours in memory; else columns are.
    """
    rows = 1 if taps > UNROLLED_TAPS else min(4, power_of_two(height))
    wide = wide_of(neurons, channels_last)
    while True:
        reach = (rows - 1) * stride + (taps - 1) * dilation + 1 if rows > 1 else 1
        each = 8
        while each > 1 and each * (rows * roles + reach) > _HELD:
            each //= 2
        strips = each * 32 * WARPS // wide
        tiles = ceiling(images * ceiling(height, rows) * width, strips) * ceiling(neurons, wide)
        # Half the rows give twice the programs, and half a thread's registers.
        if rows == 1 or (tiles >= _BUSY and each * (rows * roles + reach) <= _HELD):
            return Strips(rows, strips, wide)
        rows //= 2


def wide_of(neurons: int, channels_last: bool) -> int:
    """Return how many neurons a tile has: few lanes wasted, or columns on a tile of one neuron."""
    if not channels_last:
        return 1
    return min((64, 32, 16), key=lambda wide: ceiling(neurons, wide) * wide)
