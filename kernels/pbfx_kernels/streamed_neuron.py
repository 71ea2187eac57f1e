"""The *streamed* strategy for linear ops of few rows: every weight is read once, from where it is.

    z_d = V_d x + c_d + Σ_{e<d} U_{d,e} ⊙ a_e     a_d = f(z_d)     out = W x + b + Σ_d T_d ⊙ a_d

Shapes: P positions, K inputs, N neurons, D dendrites, S splits of K. Where rows are few, the
weights are what is read, `(D + 1) N K` of them, and what counts is how many bytes are on their way
at once. A tile's rows are gathered from W and V in the order in which a product comes apart in
registers (`fused_neuron.apart`), so nothing is laid out before, and there are enough programs for
all multiprocessors. Where neurons are too few for that, S programs share the inputs of a tile: each
writes its sums in float32, and a second kernel adds them in a fixed order and goes on to the
cascade. No atomics, so the result is the same bits in every run.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.fused_configs import Streams, streams_of
from pbfx_kernels.fused_neuron import apart, roles_of
from pbfx_kernels.launching import ceiling, fast_activations, on_device, power_of_two
from pbfx_kernels.relaunch import Launch
from pbfx_kernels.triton_math import cascade, link, negated_sum
from pbfx_kernels.walking import REMEMBERED

# Outputs of a program that adds splits up: a thread has one, and its splits' loads in flight.
_ADDED = 128


@triton.jit
def _streamed_kernel(
    out,
    kept,
    sums,
    x,
    weight,
    dendrite_weight,
    soma_bias,
    bias,
    to_soma,
    to_dendrite,
    P,
    N,
    K,
    share,
    kept_d,
    x_p,
    weight_n,
    dendrite_n,
    dendrite_d,
    D: tl.constexpr,
    ROLES: tl.constexpr,
    SPLIT: tl.constexpr,
    KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_SOMA_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Programs of the same neurons run together, so that the L2 cache serves all but the first.
    blocks_p = tl.cdiv(P, BLOCK_P)
    block_p, block_n = tl.program_id(0) % blocks_p, tl.program_id(0) // blocks_p
    split = tl.program_id(1)
    p = block_p * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = p < P
    # Where each thread of a product holds the roles of one neuron: see `fused_neuron.apart`.
    row = tl.arange(0, ROLES * BLOCK_N)
    theirs = block_n * BLOCK_N + row // (4 * ROLES) * 4 + row % 8 // 2
    role = row % (4 * ROLES) // 8 * 2 + row % 2
    real = (theirs < N) & (role <= D)
    k = tl.arange(0, BLOCK_K)
    wide, d = theirs.to(tl.int64), (role - 1).to(tl.int64)
    own = weight + wide * weight_n
    rows = tl.where(role == 0, own, dendrite_weight + d * dendrite_d + wide * dendrite_n)
    start = split * share
    at_x = x + (p.to(tl.int64) * x_p)[:, None] + (start + k)[None, :]
    at_w = rows[None, :] + (start + k)[:, None]
    product = tl.zeros((BLOCK_P, ROLES * BLOCK_N), tl.float32)
    for step in tl.range(0, min(share, K - start), BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            some_x, some_w = mask_p[:, None], real[None, :]
        else:
            left = k < K - start - step
            some_x, some_w = mask_p[:, None] & left[None, :], real[None, :] & left[:, None]
        product = tl.dot(
            tl.load(at_x, mask=some_x, other=0.0),
            tl.load(at_w, mask=some_w, other=0.0),
            product,
            input_precision=PRECISION,
        )
        at_x += BLOCK_K
        at_w += BLOCK_K
    roles = apart(product, ROLES, BLOCK_P, BLOCK_N)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    at = (p.to(tl.int64) * N)[:, None] + n[None, :]
    mask = mask_p[:, None] & mask_n[None, :]
    if SPLIT:
        sums += split.to(tl.int64) * (D + 1) * P * N
        for role in tl.static_range(D + 1):
            tl.store(sums + at, roles[role], mask=mask)
            sums += tl.cast(P, tl.int64) * N
    else:
        z = ()
        for d in tl.static_range(D):
            z = z + (roles[d + 1],)
        a = cascade(z, bias, to_dendrite, n, mask_n, N, D, HAS_BIAS, ACTIVATION, FAST, 1)
        s = roles[0]
        if HAS_SOMA_BIAS:
            s += link(soma_bias, n, mask_n, 1)
        s -= negated_sum(a, to_soma, n, mask_n, N, D, 1)
        tl.store(out + at, s.to(out.dtype.element_ty), mask=mask)
        if KEEP:
            for d in tl.static_range(D):
                tl.store(kept + d * kept_d + at, a[d].to(kept.dtype.element_ty), mask=mask)


@triton.jit
def _added_kernel(
    out,
    kept,
    sums,
    soma_bias,
    bias,
    to_soma,
    to_dendrite,
    P,
    N,
    kept_d,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_SOMA_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    size = tl.cast(P, tl.int64) * N
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n, mask = (at % N).to(tl.int32), at < size
    split = tl.arange(0, WIDE)
    from_ = sums + (split.to(tl.int64) * (D + 1) * size)[:, None] + at[None, :]
    some = (split < SPLITS)[:, None] & mask[None, :]
    roles = ()
    for _ in tl.static_range(D + 1):
        parts = tl.load(from_, mask=some, other=0.0)
        roles = roles + (tl.sum(parts, axis=0, keep_dims=True),)
        from_ += size
    z = ()
    for d in tl.static_range(D):
        z = z + (roles[d + 1],)
    a = cascade(z, bias, to_dendrite, n, mask, N, D, HAS_BIAS, ACTIVATION, FAST, 1)
    s = roles[0]
    if HAS_SOMA_BIAS:
        s += link(soma_bias, n, mask, 1)
    s -= negated_sum(a, to_soma, n, mask, N, D, 1)
    tl.store(out + at[None, :], s.to(out.dtype.element_ty), mask=mask[None, :])
    if KEEP:
        for d in tl.static_range(D):
            to = kept + d * kept_d + at[None, :]
            tl.store(to, a[d].to(kept.dtype.element_ty), mask=mask[None, :])


def streamed_neuron(
    x: Tensor,
    weight: Tensor,
    dendrite_weight: Tensor,
    soma_bias: Tensor | None,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    out: Tensor,
    kept: Tensor | None,
    streams: Streams | None = None,
) -> None:
    """Write the neuron's output, and the activations if `kept` is given.

    Args:
        x: `(P, K)`, not empty; float16, bfloat16, or float32 for TF32 products.
        weight: W, `(N, K)`, the dtype of `x`.
        dendrite_weight: V, `(D, N, K)`, D from 1 to 7, any float dtype; cast to that of `x`.
        soma_bias: b, `(N,)`, any float dtype, or None.
        bias: c, `(D, N)`, likewise.
        to_soma: T, `(D, N)`, any float dtype.
        to_dendrite: U, `(D, D, N)`, likewise.
        activation: f, one of `ACTIVATIONS`.
        out: `(P, N)`, contiguous; written.
        kept: `(D, P, N)`, contiguous; written.
        streams: the configuration, by default `streams_of`'s.
    """
    x, weight = _dense(x), _dense(weight)
    dendrite_weight = _dense(dendrite_weight.to(x.dtype))
    shape = *x.shape, *to_soma.shape
    streams = streams or streams_of(shape[0], shape[3], shape[1], shape[2], x.element_size())
    links = soma_bias, bias, to_soma, to_dendrite
    stream, add = _prepare(
        shape,
        (x.stride(0), weight.stride(0), dendrite_weight.stride(1), dendrite_weight.stride(0)),
        (x.dtype, *(None if t is None else t.dtype for t in links)),
        (kept is not None, activation, fast_activations(x)),
        streams,
        x.get_device(),
    )
    sums = out
    if add is not None:
        sums = out.new_empty((streams.splits, shape[2] + 1, *out.shape), dtype=torch.float32)
    # A pointer has to be one, whether it is read or not.
    kept = out if kept is None else kept
    soma_bias = to_soma if soma_bias is None else soma_bias
    bias = to_soma if bias is None else bias
    links = tuple(t.contiguous() for t in (soma_bias, bias, to_soma, to_dendrite))
    with on_device(x):
        stream(x.get_device(), out, kept, sums, x, weight, dendrite_weight, *links)
        if add is not None:
            add(x.get_device(), out, kept, sums, *links)


def _dense(matrix: Tensor) -> Tensor:
    """Return `matrix` with elements of a row side by side."""
    if matrix.stride(-1) == 1 or matrix.shape[-1] == 1:
        return matrix
    return matrix.contiguous()


@functools.lru_cache(REMEMBERED)
def _prepare(
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype | None, ...],
    way: tuple[bool, str, bool],
    streams: Streams,
    _: int,
) -> tuple[Launch, Launch | None]:
    """Prepare the launches over tensors of this form.

    Args:
        shape: P, K, D, N.
        strides: of a row of `x`, of W and of V, and of a dendrite.
        dtypes: of x and of the links, for which Triton compiles anew.
        way: whether activations are kept, which they are, and whether the hardware's is exact
            enough.
        streams: the configuration.
        _: the device, on which the compiled kernels lie.

    Returns:
        The product's, and that which adds splits up, if there are any.
    """
    positions, inputs, dendrites, neurons = shape
    form = *way, dtypes[1] is not None, dtypes[2] is not None
    kept_d = positions * neurons if way[0] else 0
    share = ceiling(ceiling(inputs, streams.inputs), streams.splits) * streams.inputs
    tiles = ceiling(positions, streams.positions) * ceiling(neurons, streams.neurons)
    split = streams.splits > 1
    stream = Launch(
        _streamed_kernel,
        (tiles, streams.splits),
        (positions, neurons, inputs, share, kept_d, *strides),
        (
            *(dendrites, roles_of(dendrites), split, *form, inputs % streams.inputs == 0, "tf32"),
            *(streams.positions, streams.neurons, streams.inputs, streams.stages),
        ),
        streams.warps,
    )
    if not split:
        return stream, None
    add = Launch(
        _added_kernel,
        (ceiling(positions * neurons, _ADDED), 1),
        (positions, neurons, kept_d),
        (dendrites, streams.splits, power_of_two(streams.splits), *form, _ADDED),
        4,
    )
    return stream, add
