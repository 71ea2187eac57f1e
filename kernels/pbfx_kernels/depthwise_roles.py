"""What the roles of a *depthwise* site give at a patch of its outputs, in registers.

    a_d = f(z_d + c_d + Σ_{e<d} U_{d,e} ⊙ a_e)

Imported inside the functions that launch kernels, because it imports triton.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportIndexIssue=false

import triton
import triton.language as tl

from pbfx_kernels.depthwise_patches import multiple, offsets
from pbfx_kernels.depthwise_taps import convolve
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
def evaluate_patch(
    gathered,
    errors,
    x,
    weights,
    soma_bias,
    bias,
    to_dendrite,
    first,
    n,
    mask_n,
    N,
    plane,
    steps,
    GEOMETRY: tl.constexpr,
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
    CUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return what a patch's roles give: place by place, the soma's output if OWN_SOMA, then a_d.

    After all places come the TAPS_H * TAPS_W tiles of `gathered`, added to, if WEIGH.

    Args:
        gathered: what was gathered of the weights' gradient so far, if WEIGH.
        errors: g at all places, likewise.
        x: the whole input.
        weights: as of `convolve`.
        soma_bias: b, `(N,)`; not read without HAS_SOMA_BIAS.
        bias: c, `(D, N)`; not read without HAS_BIAS.
        to_dendrite: U, `(D, D, N)`.
        first: outputs of the patches, as of `patch_at`.
        steps: strides of the input, as of `offsets`.
        LONG: whether the elements of an image need 64 bits.

    The rest is as of `convolve`.
    """
    UP_H: tl.constexpr = GEOMETRY[4][0]
    UP_W: tl.constexpr = GEOMETRY[4][1]
    TAPS: tl.constexpr = GEOMETRY[3][0] * GEOMETRY[3][1]
    ROWS: tl.constexpr = CUT[0]
    COLUMNS: tl.constexpr = CUT[1]
    ROLES: tl.constexpr = D + 1 if OWN_SOMA else D
    SIDE: tl.constexpr = COLUMNS // UP_W
    top, left = first[1] * GEOMETRY[0][0] // UP_H, first[2] * GEOMETRY[0][1] // UP_W
    z = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        if OWN_SOMA:
            z = z + (start_from(soma_bias, n, mask_n, HAS_SOMA_BIAS, CUT[3], BLOCK_N),)
        for d in tl.static_range(D):
            z = z + (start_from(bias + d * N, n, mask_n, HAS_BIAS, CUT[3], BLOCK_N),)
    if WEIGH:
        z = z + gathered
    z = convolve(
        z,
        errors,
        x + offsets((first[0], top, left), n, steps, LONG, WIDE, SIDE),
        weights,
        (top, left),
        n,
        mask_n,
        N,
        plane,
        (multiple(steps[2], WIDE, SIDE), steps[3]),
        GEOMETRY,
        FORM,
        WIDE,
        ROLES,
        WEIGH,
        CUT,
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
        for tap in tl.static_range(TAPS):
            results = results + (z[ROWS * COLUMNS * ROLES + tap],)
    return results
