"""Configurations of the depthwise kernels: a pure function over shape.

A thread holds, per channel of its own, an accumulator for each role and output of a patch, and a
column of the input that they read. So many registers set how large a patch is.
"""

from dataclasses import dataclass

from pbfx_kernels.launching import ceiling, power_of_two

WARPS = 4
# Accumulators that a thread holds: of 8 x 2 outputs of two channels at D = 3, with 251 registers in
# all, which was 3 % faster than half as many.
_HELD = 128
# Outputs of a channel that a thread computes: in NHWC each of two channels, whose weights take
# registers; in NCHW all threads of a program share them.
_PLACES = {True: 16, False: 32}
# Roles up to which a thread takes two channels.
_PAIRED_ROLES = 7
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
    # Weights of many roles fill the registers of a kernel that keeps them.
    each = 2 if channels_last and roles <= _PAIRED_ROLES else 1
    if taps > UNROLLED_TAPS or across > 3:
        rows, columns = (1 if taps > UNROLLED_TAPS else min(4, power_of_two(height))), 1
    else:
        # Few roles leave registers for more inputs.
        several = (8, 4, 2, 1) if not channels_last else (4, 2, 1) if roles <= 2 else (2, 1)
        columns = next(n for n in (*several, *up[1:]) if width % n == 0 and n % up[1] == 0)
        # Of more roles the code is long too.
        held = _HELD if roles <= _PAIRED_ROLES else _HELD // 2
        places = min(_PLACES[channels_last], held // (each * roles))
        fits = [n for n in (8, 7, 4, 2, 1) if n % up[0] == 0 and n * columns <= places]
        reach = (taps - 1) * form[4] + 1
        # The fewest rows of the input, read by patches from the first to past the end.
        rows = min(fits or up[:1], key=lambda n: ceiling(height, n) * ((n - 1) * form[0] + reach))
    return Strips(rows, each * 32 * WARPS // wide, wide, columns=columns)


def wide_of(neurons: int, channels_last: bool) -> int:
    """Return how many neurons a tile has: few lanes wasted, or columns on a tile of one neuron."""
    if not channels_last:
        return 1
    return min((64, 32, 16), key=lambda wide: ceiling(neurons, wide) * wide)
