"""The loop over taps that *depthwise* kernels share: patches of outputs from one read of the input.

    z_d = V_d * x

A thread computes a patch: ROWS outputs below one another and COLUMNS side by side, of one channel.
Their taps overlap, so a patch of 4 by 8 with 3x3 taps reads 6 by 10 inputs and not 32 times 9, and
each weight once. Input columns are taken one after the other, each with all its rows: the next
one's registers are then those of the last.

In NCHW a column's neighbours come with it, as vectors: see `depthwise_patches`.

Imported inside the functions that launch kernels, because it imports triton.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportIndexIssue=false

import triton
import triton.language as tl

from pbfx_kernels.depthwise_patches import apart


@triton.jit
def lies_within(at, SIZE, OFFSET: tl.constexpr, PAD: tl.constexpr, REACH: tl.constexpr):
    """Return whether a row or column of the input exists, without asking what cannot be.

    It lies OFFSET after the first tap of an output that exists, so at OFFSET - PAD or more, and the
    tap at REACH, of an output that exists, lies at most PAD - 1 past the end.
    """
    if OFFSET < PAD:
        if OFFSET > REACH - PAD:
            return (at >= 0) & (at < SIZE)
        else:
            return at >= 0
    elif OFFSET > REACH - PAD:
        return at < SIZE
    else:
        return tl.full(at.shape, True, tl.int1)


@triton.jit
def add_column(
    z,
    tiles,
    errors,
    weights,
    mask_n,
    next_role,
    next_tap,
    C: tl.constexpr,
    U: tl.constexpr,
    DOWN: tl.constexpr,
    TAPS: tl.constexpr,
    ROLES: tl.constexpr,
    WEIGH: tl.constexpr,
    SIDES: tl.constexpr,
):
    """Add one column of the input times column U of the taps to column C of a patch.

    Stride, padding, dilation and `UP_H` are DOWN; TAPS and SIDES, of a patch, are rows and columns.
    """
    STRIDE_H: tl.constexpr = DOWN[0]
    PAD_H: tl.constexpr = DOWN[1]
    DILATION_H: tl.constexpr = DOWN[2]
    UP_H: tl.constexpr = DOWN[3]
    TAPS_H: tl.constexpr = TAPS[0]
    TAPS_W: tl.constexpr = TAPS[1]
    ROWS: tl.constexpr = SIDES[0]
    COLUMNS: tl.constexpr = SIDES[1]
    w = ()
    for t in tl.static_range(TAPS_H):
        for role in tl.static_range(ROLES):
            at = weights + role * next_role + t * next_tap
            w = w + (tl.load(at, mask=mask_n, other=0.0)[None, :],)
    added = ()
    for place in tl.static_range(ROWS * COLUMNS):
        for role in tl.static_range(ROLES):
            total = z[place * ROLES + role]
            if place % COLUMNS == C:
                for t in tl.static_range(TAPS_H):
                    if (place // COLUMNS * STRIDE_H + t * DILATION_H - PAD_H) % UP_H == 0:
                        # Not by a name: one would be no constant, and no index of a tuple.
                        tile = tiles[
                            (place // COLUMNS * STRIDE_H + t * DILATION_H - PAD_H) // UP_H
                            + PAD_H // UP_H
                        ]
                        total += tile * w[t * ROLES + role]
            added = added + (total,)
    if WEIGH:
        for tap in tl.static_range(TAPS_H * TAPS_W):
            total = z[ROWS * COLUMNS * ROLES + tap]
            if tap % TAPS_W == U:
                for i in tl.static_range(ROWS):
                    tile = tiles[i * STRIDE_H + tap // TAPS_W * DILATION_H]
                    total += tile * errors[i * COLUMNS + C]
            added = added + (total,)
    return added


@triton.jit
def convolve(
    z,
    errors,
    x,
    weights,
    corner,
    n,
    mask_n,
    N,
    plane,
    steps,
    GEOMETRY: tl.constexpr,
    FORM: tl.constexpr,
    WIDE: tl.constexpr,
    ROLES: tl.constexpr,
    WEIGH: tl.constexpr,
    CUT: tl.constexpr,
):
    """Add the products of all roles at all places of a patch.

    Args:
        z: the accumulators, ROWS * COLUMNS * ROLES tiles `(BLOCK_S, BLOCK_N)`, roles last; then, if
            WEIGH, TAPS_H * TAPS_W more, which gather errors times inputs.
        errors: g at all places, if WEIGH.
        x: pointers to where a patch starts in the input, padding aside, `(BLOCK_S, BLOCK_N)`.
        weights: `(ROLES, TAPS_H * TAPS_W, N)` contiguous, float32.
        corner: row and column of the input there, `(BLOCK_S,)` each.
        n: the neurons of the tile.
        mask_n: which of `n` exist.
        N: number of neurons.
        plane: height and width of the input.
        steps: strides of a row and of a column.
        GEOMETRY: pairs, down and along: stride, padding, dilation and taps of the convolution, and
            how many rows and columns lie from one of the input to the next, zeros in between; more
            than one in a transposed convolution, whose stride is one, in "patch" alone.
        FORM: "patch" unrolls all taps; "strip" those down and "loop" none, of patches with one
            column, and one row.
        WIDE: whether columns are loaded as vectors, in a patch.
        ROLES: soma and dendrites, or dendrites alone.
        WEIGH: whether to gather the weights' gradient, in a patch that is not transposed.
        CUT: as of `load_patch`.
    """
    STRIDE_H: tl.constexpr = GEOMETRY[0][0]
    STRIDE_W: tl.constexpr = GEOMETRY[0][1]
    PAD_H: tl.constexpr = GEOMETRY[1][0]
    PAD_W: tl.constexpr = GEOMETRY[1][1]
    DILATION_H: tl.constexpr = GEOMETRY[2][0]
    DILATION_W: tl.constexpr = GEOMETRY[2][1]
    TAPS_H: tl.constexpr = GEOMETRY[3][0]
    TAPS_W: tl.constexpr = GEOMETRY[3][1]
    UP_H: tl.constexpr = GEOMETRY[4][0]
    UP_W: tl.constexpr = GEOMETRY[4][1]
    ROWS: tl.constexpr = CUT[0]
    COLUMNS: tl.constexpr = CUT[1]
    top, left = corner
    weights += n
    next_role, next_tap = N * (TAPS_H * TAPS_W), N * TAPS_W
    REACH_H: tl.constexpr = (TAPS_H - 1) * DILATION_H
    LAST_W: tl.constexpr = (COLUMNS - 1) * STRIDE_W + (TAPS_W - 1) * DILATION_W
    # Rows of the input from the first to past the last that a patch reads.
    FIRST_H: tl.constexpr = -(PAD_H // UP_H)
    TALL: tl.constexpr = ((ROWS - 1) * STRIDE_H + REACH_H - PAD_H) // UP_H + 1 - FIRST_H
    if FORM == "patch":
        SIDE: tl.constexpr = COLUMNS // UP_W if WIDE else 1
        # Likewise vectors, or columns.
        FIRST: tl.constexpr = -(PAD_W // UP_W)
        END: tl.constexpr = (LAST_W - PAD_W) // UP_W + 1
        for block in tl.static_range(FIRST // SIDE, (END + SIDE - 1) // SIDE):
            column = left + block * SIDE
            if WIDE or UP_W > 1:
                inside_w = (column >= 0) & (column < plane[1])
            else:
                inside_w = lies_within(column, plane[1], block + PAD_W, PAD_W, LAST_W)
            inside_w = inside_w[:, None] & mask_n[None, :]
            tiles = ()
            for r in tl.static_range(TALL):
                row = top + (FIRST_H + r)
                if UP_H > 1:
                    inside_h = (row >= 0) & (row < plane[0])
                else:
                    inside_h = lies_within(row, plane[0], r, PAD_H, REACH_H)
                inside = inside_w & inside_h[:, None]
                place = x + (FIRST_H + r) * steps[0]
                if WIDE:
                    place += (block * SIDE + tl.arange(0, SIDE))[None, :]
                    tile = tl.load(place, mask=inside, other=0.0).to(tl.float32)
                    tiles = tiles + apart(tile, SIDE, CUT[2] - UP_W // 2, CUT[3])
                else:
                    tile = tl.load(place + block * steps[1], mask=inside, other=0.0)
                    tiles = tiles + (tile.to(tl.float32),)
            for j in tl.static_range(SIDE):
                column_of_tiles = ()
                for r in tl.static_range(TALL):
                    column_of_tiles = column_of_tiles + (tiles[r * SIDE + j],)
                for c in tl.static_range(COLUMNS):
                    for u in tl.static_range(TAPS_W):
                        if c * STRIDE_W + u * DILATION_W == (block * SIDE + j) * UP_W + PAD_W:
                            z = add_column(
                                z,
                                column_of_tiles,
                                errors,
                                weights + u * N,
                                mask_n,
                                next_role,
                                next_tap,
                                c,
                                u,
                                (STRIDE_H, PAD_H, DILATION_H, UP_H),
                                GEOMETRY[3],
                                ROLES,
                                WEIGH,
                                (ROWS, COLUMNS),
                            )
    else:
        for u in range(TAPS_W):
            column = left + (u * DILATION_W - PAD_W)
            inside_w = ((column >= 0) & (column < plane[1]))[:, None] & mask_n[None, :]
            along = x + (u * DILATION_W - PAD_W) * steps[1]
            if FORM == "strip":
                tiles = ()
                for r in tl.static_range(TALL):
                    row = top + (r - PAD_H)
                    inside = inside_w & lies_within(row, plane[0], r, PAD_H, REACH_H)[:, None]
                    tile = tl.load(along + (r - PAD_H) * steps[0], mask=inside, other=0.0)
                    tiles = tiles + (tile.to(tl.float32),)
                z = add_column(
                    z,
                    tiles,
                    errors,
                    weights + u * N,
                    mask_n,
                    next_role,
                    next_tap,
                    0,
                    0,
                    (STRIDE_H, PAD_H, DILATION_H, 1),
                    (TAPS_H, 1),
                    ROLES,
                    False,
                    (ROWS, 1),
                )
            else:
                for t in range(TAPS_H):
                    row = top + (t * DILATION_H - PAD_H)
                    inside = inside_w & ((row >= 0) & (row < plane[0]))[:, None]
                    place = along + (t * DILATION_H - PAD_H) * steps[0]
                    tile = tl.load(place, mask=inside, other=0.0).to(tl.float32)
                    z = add_column(
                        z,
                        (tile,),
                        errors,
                        weights + u * N + t * next_tap,
                        mask_n,
                        next_role,
                        next_tap,
                        0,
                        0,
                        (1, 0, 1, 1),
                        (1, 1),
                        ROLES,
                        False,
                        (1, 1),
                    )
    return z
