"""What kernels share: the activations, and the cascade of a neuron's dendrites in registers.

    a_d = f(z_d + c_d + Σ_{e<d} U_{d,e} ⊙ a_e)        -Σ_d T_d ⊙ a_d

Imported inside the functions that launch kernels, because it imports triton.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, FAST: tl.constexpr, ROUNDED: tl.constexpr = False):
    """Apply one of `pbfx_kernels.ACTIVATIONS` to a float32 tile; `gelu` is the one with erf.

    FAST is for results that will be rounded to bfloat16: the hardware's tanh, with a relative error
    of 2^-11, a quarter of that rounding's. Where memory is not the limit, activations are: 4 of
    every 5 instructions outside the matrix units. ROUNDED is for z from a dtype of half the bits;
    see `tanh`.
    """
    if ACTIVATION == "sigmoid":
        return sigmoid(z, FAST)
    elif ACTIVATION == "tanh":
        return hardware_tanh(z) if FAST else tanh(z, ROUNDED)
    elif ACTIVATION == "relu":
        # As torch: NaN stays NaN.
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "silu", "not one of pbfx_kernels.ACTIVATIONS")
        return z * sigmoid(z, FAST)


@triton.jit
def sigmoid(z, FAST: tl.constexpr):
    """Compute the logistic function; FAST, from the hardware's tanh."""
    if FAST:
        return 0.5 * hardware_tanh(0.5 * z) + 0.5
    else:
        return tl.sigmoid(z)


@triton.jit
def activation_and_slope(
    z, ACTIVATION: tl.constexpr, FAST: tl.constexpr, ROUNDED: tl.constexpr = False
):
    """Return f(z) and f'(z) of a float32 tile; arguments as of `activate`."""
    if ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        a = z * below
        slope = below + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == "silu":
        gate = sigmoid(z, FAST)
        a = z * gate
        slope = gate * (1.0 + z * (1.0 - gate))
    else:
        a = activate(z, ACTIVATION, FAST, ROUNDED)
        if ACTIVATION == "sigmoid":
            slope = a * (1.0 - a)
        elif ACTIVATION == "tanh":
            slope = 1.0 - a * a
        else:
            # As torch: zero at the kink, and the error passes where z is NaN.
            slope = tl.where(z <= 0.0, 0.0, 1.0)
    return a, slope


@triton.jit
def hardware_tanh(z):
    """Compute tanh by the instruction of capability 7.5 and up; the interpreter has none."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def tanh(z, ROUNDED: tl.constexpr):
    """Compute tanh to a few float32 ulps. Triton has none that its interpreter knows too.

    ROUNDED is for z from a dtype of half the bits, to which 1e-7 in all is nothing.
    """
    # The difference cancels near zero: there, a polynomial in z² fitted by least squares to
    # tanh(z) / z on |z| < 0.5 at Chebyshev nodes, off by at most 1.5e-8.
    u = z * z
    p = -0.0530305073 + 0.0172169393 * u
    p = 0.133255654 + p * u
    p = -0.333331184 + p * u
    p = 0.999999994 + p * u
    # exp(2 z), as a power of two: 2 / ln 2. Infinity and zero lead to 1 and -1.
    difference = 1.0 - 2.0 / (1.0 + tl.exp2(z * 2.8853900817779268))
    if ROUNDED:
        return difference
    else:
        return tl.where(u < 0.25, z * p, difference)


@triton.jit
def link(links, n, mask, ALONG: tl.constexpr):
    """Load one float32 link per neuron, lined up with tiles whose axis `ALONG` is the neurons."""
    return tl.expand_dims(tl.load(links + n, mask=mask, other=0.0).to(tl.float32), 1 - ALONG)


@triton.jit
def cascade(
    z,
    bias,
    to_dendrite,
    n,
    mask,
    N,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    ALONG: tl.constexpr,
):
    """Turn the preactivations of D dendrites, a tuple of float32 tiles, into their activations.

    Args:
        z: V_d x, a tuple of D tiles.
        bias: c, `(D, N)` contiguous; not read without HAS_BIAS.
        to_dendrite: U, `(D, D, N)` contiguous, strictly lower triangle.
        n: the neurons of the tile.
        mask: which of `n` exist.
        N: number of neurons.
        D: number of dendrites.
        HAS_BIAS: whether there is a bias.
        ACTIVATION: f.
        FAST: see `activate`.
        ALONG: axis of the tiles that is the neurons.
    """
    activations = ()
    for d in tl.static_range(D):
        z_d = z[d]
        if HAS_BIAS:
            z_d += link(bias + d * N, n, mask, ALONG)
        for e in tl.static_range(d):
            z_d += link(to_dendrite + (d * D + e) * N, n, mask, ALONG) * activations[e]
        activations = activations + (activate(z_d, ACTIVATION, FAST),)
    return activations


@triton.jit
def negated_sum(activations, to_soma, n, mask, N, D: tl.constexpr, ALONG: tl.constexpr):
    """Sum `-Σ_d T_d ⊙ a_d`; see `reference.dendrites` for why it is negated."""
    total = tl.zeros_like(activations[0])
    for d in tl.static_range(D):
        total -= link(to_soma + d * N, n, mask, ALONG) * activations[d]
    return total


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Make a tuple of float32 accumulators."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((BLOCK_P, BLOCK_N), tl.float32),)
    return tiles


@triton.jit
def finish(
    z,
    out,
    kept,
    soma,
    bias,
    to_soma,
    to_dendrite,
    at_out,
    at_soma,
    kept_d,
    share,
    n,
    mask_n,
    mask,
    N,
    D: tl.constexpr,
    MODE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
):
    """End a kernel whose accumulators `z`, a tuple, hold the preactivations without bias.

    MODE "add" stores the neuron's output, "keep" the activations too. MODE "gradient" takes the
    error `g` in place of `soma` and stores this tile's share of `Σ_p g ⊙ a_d` into `out`,
    `(shares, D, N)`.
    """
    a = cascade(z, bias, to_dendrite, n, mask_n, N, D, HAS_BIAS, ACTIVATION, FAST, 1)
    # Not earlier: the accumulators fill most registers.
    s = tl.load(soma + at_soma, mask=mask, other=0.0).to(tl.float32)
    if MODE == "gradient":
        out += share.to(tl.int64) * D * N + n
        for d in tl.static_range(D):
            # Rows past the end hold f(c), and an error of zero.
            tl.store(out + d * N, tl.sum(s * a[d], axis=0), mask=mask_n)
    else:
        negated = negated_sum(a, to_soma, n, mask_n, N, D, 1)
        tl.store(out + at_out, (s - negated).to(out.dtype.element_ty), mask=mask)
        if MODE == "keep":
            for d in tl.static_range(D):
                tl.store(kept + at_out, a[d].to(kept.dtype.element_ty), mask=mask)
                kept += kept_d
