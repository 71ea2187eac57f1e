"""The loop over taps that *depthwise* kernels share: patches of outputs from one read of the input.

    z_d = V_d * x      a_d = f(z_d + c_d + Σ_{e<d} U_{d,e} ⊙ a_e)

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

from pbfx_kernels.depthwise_patches import apart, multiple, offsets
from pbfx_kernels.triton_math import cascade, link


@triton.jit
def start_from(
    bias, n, mask_n, HAS_BIAS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return an accumulator that starts from the bias: what is added now is not added later."""
    if HAS_BIAS:
        return tl.zeros((BLOCK_S, BLOCK_N), tl.float32) + link(bias, n, mask_n, 1)
    else:
        return tl.zeros((BLOCK_S, BLOCK_N), tl.float32)


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
    STRIDE_H: tl.constexpr,
    PAD_H: tl.constexpr,
    DILATION_H: tl.constexpr,
    UP_H: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    ROLES: tl.constexpr,
    WEIGH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add one column of the input times column U of the taps to column C of a patch."""
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
    top,
    left,
    n,
    mask_n,
    N,
    HEIGHT,
    WIDTH,
    x_h,
    x_w,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    UP_H: tl.constexpr,
    UP_W: tl.constexpr,
    FORM: tl.constexpr,
    WIDE: tl.constexpr,
    ROLES: tl.constexpr,
    WEIGH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add the products of all roles at all places of a patch.

    Args:
        z: the accumulators, ROWS * COLUMNS * ROLES tiles `(BLOCK_S, BLOCK_N)`, roles last; then, if
            WEIGH, TAPS_H * TAPS_W more, which gather errors times inputs.
        errors: g at all places, if WEIGH.
        x: pointers to where a patch starts in the input, padding aside, `(BLOCK_S, BLOCK_N)`.
        weights: `(ROLES, TAPS_H * TAPS_W, N)` contiguous, float32.
        top: row of the input there, `(BLOCK_S,)`.
        left: likewise, the column.
        n: the neurons of the tile.
        mask_n: which of `n` exist.
        N: number of neurons.
        HEIGHT: of the input.
        WIDTH: likewise.
        x_h: stride of a row.
        x_w: stride of a column.
        STRIDE_H: of the convolution, down.
        STRIDE_W: along.
        PAD_H: likewise.
        PAD_W: along.
        DILATION_H: likewise.
        DILATION_W: along.
        TAPS_H: of the kernel.
        TAPS_W: likewise.
        UP_H: how many rows lie from one of the input to the next, zeros in between; more than one
            in a transposed convolution, whose stride is one, in "patch" alone.
        UP_W: likewise, columns.
        FORM: "patch" unrolls all taps; "strip" those down and "loop" none, of patches with one
            column, and one row.
        WIDE: whether columns are loaded as vectors, in a patch.
        ROLES: soma and dendrites, or dendrites alone.
        WEIGH: whether to gather the weights' gradient, in a patch that is not transposed.
        ROWS: of a patch.
        COLUMNS: likewise.
        LEVELS: its logarithm if WIDE.
        BLOCK_S: patches of a tile.
    """
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
                inside_w = (column >= 0) & (column < WIDTH)
            else:
                inside_w = lies_within(column, WIDTH, block + PAD_W, PAD_W, LAST_W)
            inside_w = inside_w[:, None] & mask_n[None, :]
            tiles = ()
            for r in tl.static_range(TALL):
                row = top + (FIRST_H + r)
                if UP_H > 1:
                    inside_h = (row >= 0) & (row < HEIGHT)
                else:
                    inside_h = lies_within(row, HEIGHT, r, PAD_H, REACH_H)
                inside = inside_w & inside_h[:, None]
                place = x + (FIRST_H + r) * x_h
                if WIDE:
                    place += (block * SIDE + tl.arange(0, SIDE))[None, :]
                    tile = tl.load(place, mask=inside, other=0.0).to(tl.float32)
                    tiles = tiles + apart(tile, SIDE, LEVELS - UP_W // 2, BLOCK_S)
                else:
                    tile = tl.load(place + block * x_w, mask=inside, other=0.0)
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
                                STRIDE_H,
                                PAD_H,
                                DILATION_H,
                                UP_H,
                                TAPS_H,
                                TAPS_W,
                                ROLES,
                                WEIGH,
                                ROWS,
                                COLUMNS,
                            )
    else:
        for u in range(TAPS_W):
            column = left + (u * DILATION_W - PAD_W)
            inside_w = ((column >= 0) & (column < WIDTH))[:, None] & mask_n[None, :]
            along = x + (u * DILATION_W - PAD_W) * x_w
            if FORM == "strip":
                tiles = ()
                for r in tl.static_range(TALL):
                    row = top + (r - PAD_H)
                    inside = inside_w & lies_within(row, HEIGHT, r, PAD_H, REACH_H)[:, None]
                    tile = tl.load(along + (r - PAD_H) * x_h, mask=inside, other=0.0)
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
                    STRIDE_H,
                    PAD_H,
                    DILATION_H,
                    1,
                    TAPS_H,
                    1,
                    ROLES,
                    False,
                    ROWS,
                    1,
                )
            else:
                for t in range(TAPS_H):
                    row = top + (t * DILATION_H - PAD_H)
                    inside = inside_w & ((row >= 0) & (row < HEIGHT))[:, None]
                    place = along + (t * DILATION_H - PAD_H) * x_h
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
                        1,
                        0,
                        1,
                        1,
                        1,
                        1,
                        ROLES,
                        False,
                        1,
                        1,
                    )
    return z


@triton.jit
def evaluate_patch(
    gathered,
    errors,
    x,
    weights,
    soma_bias,
    bias,
    to_dendrite,
    image,
    row,
    column,
    n,
    mask_n,
    N,
    HEIGHT,
    WIDTH,
    x_b,
    x_n,
    x_h,
    x_w,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    UP_H: tl.constexpr,
    UP_W: tl.constexpr,
    D: tl.constexpr,
    OWN_SOMA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_SOMA_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LONG: tl.constexpr,
    FORM: tl.constexpr,
    WIDE: tl.constexpr,
    WEIGH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return what a patch's roles give: place by place, the soma's output if OWN_SOMA, then a_d.

    After all places come the TAPS_H * TAPS_W tiles of `gathered`, added to, if WEIGH.

    Args:
        gathered: what was gathered of the weights' gradient so far, if WEIGH.
        errors: g at all places, likewise.
        soma_bias: b, `(N,)`; not read without HAS_SOMA_BIAS.
        bias: c, `(D, N)`; not read without HAS_BIAS.
        to_dendrite: U, `(D, D, N)`.
        image: of the patches, `(BLOCK_S,)`, int64.
        row: first of the output, likewise.
        column: likewise.
        x_b: stride of an image.
        x_n: stride of a neuron.
        LONG: whether the elements of an image need 64 bits.

    The rest is as of `convolve`, and x the whole input.
    """
    ROLES: tl.constexpr = D + 1 if OWN_SOMA else D
    top, left = row * STRIDE_H // UP_H, column * STRIDE_W // UP_W
    SIDE: tl.constexpr = COLUMNS // UP_W
    z = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        if OWN_SOMA:
            z = z + (start_from(soma_bias, n, mask_n, HAS_SOMA_BIAS, BLOCK_S, BLOCK_N),)
        for d in tl.static_range(D):
            z = z + (start_from(bias + d * N, n, mask_n, HAS_BIAS, BLOCK_S, BLOCK_N),)
    if WEIGH:
        z = z + gathered
    z = convolve(
        z,
        errors,
        x + offsets(image, top, left, n, x_b, x_n, x_h, x_w, LONG, WIDE, SIDE),
        weights,
        top,
        left,
        n,
        mask_n,
        N,
        HEIGHT,
        WIDTH,
        multiple(x_h, WIDE, SIDE),
        x_w,
        STRIDE_H,
        STRIDE_W,
        PAD_H,
        PAD_W,
        DILATION_H,
        DILATION_W,
        TAPS_H,
        TAPS_W,
        UP_H,
        UP_W,
        FORM,
        WIDE,
        ROLES,
        WEIGH,
        ROWS,
        COLUMNS,
        LEVELS,
        BLOCK_S,
    )
    results = ()
    for place in tl.static_range(ROWS * COLUMNS):
        own = ()
        for d in tl.static_range(D):
            own = own + (z[place * ROLES + ROLES - D + d],)
        if OWN_SOMA:
            results = results + (z[place * ROLES],)
        # The bias is in already.
        results = results + cascade(
            own, bias, to_dendrite, n, mask_n, N, D, False, ACTIVATION, FAST, 1
        )
    if WEIGH:
        for tap in tl.static_range(TAPS_H * TAPS_W):
            results = results + (z[ROWS * COLUMNS * ROLES + tap],)
    return results
