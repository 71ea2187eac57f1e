"""Patches of a depthwise site's output: where they lie, and how a thread loads and stores one.

Where columns are neighbours in memory, so are those of a patch: WIDE loads and stores them as one
vector, whose columns come apart in registers.

Imported inside the functions that launch kernels, because it imports triton.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportIndexIssue=false

import triton
import triton.language as tl


@triton.jit
def patch_at(
    s,
    S,
    DOWN,
    ACROSS,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Locate patches of the output: image, first row, first column."""
    # Patches past the end compute the first one; their results are not stored. Unsigned, because a
    # division of signed numbers takes twice the instructions, and there are few others here.
    at = tl.where(s < S, s, 0).to(tl.uint32)
    across, down = tl.cast(ACROSS, tl.uint32), tl.cast(DOWN, tl.uint32)
    above = at // across
    image = above // down
    column = (at - above * across).to(tl.int32) * COLUMNS
    row = (above - image * down).to(tl.int32) * ROWS
    return image.to(tl.int64), row, column


@triton.jit
def multiple(stride, WIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a stride so that the compiler knows: vectors of COLUMNS start at its multiples."""
    return stride // COLUMNS * COLUMNS if WIDE else stride


@triton.jit
def apart(tile, WIDTH: tl.constexpr, LEVELS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Take `(BLOCK_S, WIDTH)` apart into columns `(BLOCK_S, 1)`; WIDTH is 2 to the LEVELS."""
    tiles = (tile,)
    for level in tl.static_range(LEVELS):
        even, odd = (), ()
        for i in tl.static_range(2**level):
            # By the lowest bit that is left, so that columns stay in order.
            halves = tl.split(tl.reshape(tiles[i], (BLOCK_S, WIDTH // 2 ** (level + 1), 2)))
            even, odd = even + (halves[0],), odd + (halves[1],)
        tiles = even + odd
    return tiles


@triton.jit
def together(tiles, WIDTH: tl.constexpr, LEVELS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Join columns `(BLOCK_S, 1)` into `(BLOCK_S, WIDTH)`: what `apart` undoes."""
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(WIDTH // 2 ** (level + 1)):
            pair = tl.join(tiles[i], tiles[i + WIDTH // 2 ** (level + 1)])
            joined = joined + (tl.reshape(pair, (BLOCK_S, 2 ** (level + 1))),)
        tiles = joined
    return tiles[0]


@triton.jit
def offsets(first, n, steps, LONG: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return where patches start, `(BLOCK_S, BLOCK_N)`; within an image 32 bits do, unless LONG.

    Args:
        first: image, row and column, as of `patch_at`.
        n: the neurons of the tile.
        steps: strides of an image, a neuron, a row and a column.
        LONG: whether the elements of an image need 64 bits.
        WIDE: whether columns are loaded or stored as vectors.
        COLUMNS: of such a vector.
    """
    INDEX: tl.constexpr = tl.int64 if LONG else tl.int32
    step_b, step_n = multiple(steps[0], WIDE, COLUMNS), multiple(steps[1], WIDE, COLUMNS)
    step_h = multiple(steps[2], WIDE, COLUMNS)
    start = first[0] * step_b + (first[1].to(INDEX) * step_h + first[2].to(INDEX) * steps[3])
    return start[:, None] + n.to(INDEX)[None, :] * step_n


@triton.jit
def load_patch(at, row, mask, HEIGHT, steps, WIDE: tl.constexpr, CUT: tl.constexpr):
    """Load what lies like the output, row by row: float32 tiles, zero where there is none.

    Args:
        at: pointers to the first of a patch, `(BLOCK_S, BLOCK_N)`.
        row: of the output, `(BLOCK_S,)`.
        mask: which patches and neurons exist, `(BLOCK_S, BLOCK_N)`.
        HEIGHT: of the output.
        steps: as of `offsets`.
        WIDE: whether the columns of a patch are one vector.
        CUT: rows and columns of a patch, the logarithm of the latter if WIDE, and the patches of a
            tile.
    """
    ROWS: tl.constexpr = CUT[0]
    COLUMNS: tl.constexpr = CUT[1]
    tiles = ()
    step_h = multiple(steps[2], WIDE, COLUMNS)
    for i in tl.static_range(ROWS):
        there = mask & (row + i < HEIGHT)[:, None]
        if WIDE:
            place = at + i * step_h + tl.arange(0, COLUMNS)[None, :]
            tile = tl.load(place, mask=there, other=0.0).to(tl.float32)
            tiles = tiles + apart(tile, COLUMNS, CUT[2], CUT[3])
        else:
            for c in tl.static_range(COLUMNS):
                tile = tl.load(at + i * step_h + c * steps[3], mask=there, other=0.0)
                tiles = tiles + (tile.to(tl.float32),)
    return tiles


@triton.jit
def store_patch(at, tiles, row, mask, HEIGHT, steps, WIDE: tl.constexpr, CUT: tl.constexpr):
    """Store a patch; arguments as of `load_patch`, which undoes it."""
    ROWS: tl.constexpr = CUT[0]
    COLUMNS: tl.constexpr = CUT[1]
    step_h = multiple(steps[2], WIDE, COLUMNS)
    for i in tl.static_range(ROWS):
        there = mask & (row + i < HEIGHT)[:, None]
        if WIDE:
            rounded = ()
            for c in tl.static_range(COLUMNS):
                rounded = rounded + (tiles[i * COLUMNS + c].to(at.dtype.element_ty),)
            tile = together(rounded, COLUMNS, CUT[2], CUT[3])
            tl.store(at + i * step_h + tl.arange(0, COLUMNS)[None, :], tile, mask=there)
        else:
            for c in tl.static_range(COLUMNS):
                tile = tiles[i * COLUMNS + c].to(at.dtype.element_ty)
                tl.store(at + i * step_h + c * steps[3], tile, mask=there)
