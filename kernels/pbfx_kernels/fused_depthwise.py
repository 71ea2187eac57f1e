"""The *depthwise* strategy: convolutions whose every neuron reads the one channel of its own.

    z_d = V_d * x      a_d = f(z_d + c_d + Σ_{e<d} U_{d,e} ⊙ a_e)      out = soma + Σ_d T_d ⊙ a_d

Shapes: N neurons and as many channels, D dendrites, over one or two dimensions. There is nothing to
multiply as matrices: each output is a few multiply-adds per role, so the floor is the traffic, one
read of the input and one write of the output. A library reads and writes it all once per role.

A thread computes a strip: ROWS outputs below one another, of one column and one channel. Their taps
overlap, so a strip reads ROWS + 2 rows of the input where 3 taps each would be 3 * ROWS, and each
weight once. All roles, soma and dendrites, share what is read; cascade, activation, links and the
sum stay in registers. Accumulation is in float32 with no TF32 anywhere.

`dT_d = Σ_p g ⊙ a_d` comes from the same strips, with the activations recomputed.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.depthwise_configs import WARPS, Strips, depthwise_strips
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import ceiling, fast_activations, multiprocessors, on_device
from pbfx_kernels.relaunch import relaunched
from pbfx_kernels.triton_math import cascade, link, negated_sum, zeros

# The cascade is unrolled for every row of a strip.
MOST_DENDRITES = 8
# Programs per multiprocessor in a reduction: enough to hide latency, few enough partial sums.
_WAVES = 8
# Elements of an image, with what lies in between, that 32 bits can count; padding goes below zero.
_SHORT = 2**30


@triton.jit
def strip_at(
    s,
    S,
    STRIPS,
    OUT_WIDTH,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Locate strips: image, first row and column of the output, and of the input."""
    # Strips past the end compute the first one; their results are not stored. Unsigned, because a
    # division of signed numbers takes twice the instructions, and there are few others here.
    at = tl.where(s < S, s, 0).to(tl.uint32)
    wide, strips = tl.cast(OUT_WIDTH, tl.uint32), tl.cast(STRIPS, tl.uint32)
    above = at // wide
    image = above // strips
    column = (at - above * wide).to(tl.int32)
    row = (above - image * strips).to(tl.int32) * ROWS
    return image.to(tl.int64), row, column, row * STRIDE_H - PAD_H, column * STRIDE_W - PAD_W


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

    It lies OFFSET after the first tap of an output that exists, so at OFFSET - PAD or more, and its
    last tap, at REACH, lies at most PAD - 1 past the end.
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
    x,
    weights,
    top,
    inside_w,
    mask_n,
    N,
    HEIGHT,
    x_h,
    STRIDE_H: tl.constexpr,
    PAD_H: tl.constexpr,
    DILATION_H: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    ROLES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the products with one column of taps; arguments as of `convolve`, at that column."""
    next_role = N * (TAPS_H * TAPS_W)
    if ROWS == 1:
        for t in range(TAPS_H):
            row = top + t * DILATION_H
            inside = inside_w & ((row >= 0) & (row < HEIGHT))[:, None]
            tile = tl.load(x, mask=inside, other=0.0).to(tl.float32)
            added = ()
            for role in tl.static_range(ROLES):
                w = tl.load(weights + role * next_role, mask=mask_n, other=0.0)[None, :]
                added = added + (z[role] + tile * w,)
            z = added
            x += DILATION_H * x_h
            weights += TAPS_W * N
    else:
        tiles = ()
        REACH: tl.constexpr = (TAPS_H - 1) * DILATION_H
        for r in tl.static_range((ROWS - 1) * STRIDE_H + REACH + 1):
            inside = inside_w & lies_within(top + r, HEIGHT, r, PAD_H, REACH)[:, None]
            tiles = tiles + (tl.load(x, mask=inside, other=0.0).to(tl.float32),)
            x += x_h
        for t in tl.static_range(TAPS_H):
            w = ()
            for role in tl.static_range(ROLES):
                w = w + (tl.load(weights + role * next_role, mask=mask_n, other=0.0)[None, :],)
            added = ()
            for i in tl.static_range(ROWS):
                for role in tl.static_range(ROLES):
                    tile = tiles[i * STRIDE_H + t * DILATION_H]
                    added = added + (z[i * ROLES + role] + tile * w[role],)
            z = added
            weights += TAPS_W * N
    return z


@triton.jit
def convolve(
    z,
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
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    UNROLL: tl.constexpr,
    ROLES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the products of all roles at all rows: row i of role r is entry i * ROLES + r.

    Args:
        z: the accumulators, a tuple of ROWS * ROLES tiles `(BLOCK_S, BLOCK_N)`.
        x: pointers to the first tap of the first row, `(BLOCK_S, BLOCK_N)`.
        weights: `(ROLES, TAPS_H * TAPS_W, N)` contiguous, float32.
        top: row of the input at the first tap, `(BLOCK_S,)`.
        left: likewise, the column.
        n: the neurons of the tile.
        mask_n: which of `n` exist.
        N: number of neurons.
        HEIGHT: of the input.
        WIDTH: likewise.
        x_h: stride of a row.
        x_w: stride of a column.
        STRIDE_H: of the convolution, down.
        PAD_H: likewise.
        PAD_W: along.
        DILATION_H: likewise.
        DILATION_W: along.
        TAPS_H: of the kernel.
        TAPS_W: likewise.
        UNROLL: whether to unroll the columns of taps, so that all loads are under way at once.
        ROLES: soma and dendrites, or dendrites alone.
        ROWS: of a strip.
    """
    weights += n
    REACH: tl.constexpr = (TAPS_W - 1) * DILATION_W
    if UNROLL:
        for u in tl.static_range(TAPS_W):
            column = left + u * DILATION_W
            inside_w = lies_within(column, WIDTH, u * DILATION_W, PAD_W, REACH)[:, None]
            inside_w &= mask_n[None, :]
            z = add_column(
                z,
                x + u * DILATION_W * x_w,
                weights + u * N,
                top,
                inside_w,
                mask_n,
                N,
                HEIGHT,
                x_h,
                STRIDE_H,
                PAD_H,
                DILATION_H,
                TAPS_H,
                TAPS_W,
                ROLES,
                ROWS,
            )
    else:
        for u in range(TAPS_W):
            column = left + u * DILATION_W
            inside_w = ((column >= 0) & (column < WIDTH))[:, None] & mask_n[None, :]
            z = add_column(
                z,
                x + u * DILATION_W * x_w,
                weights + u * N,
                top,
                inside_w,
                mask_n,
                N,
                HEIGHT,
                x_h,
                STRIDE_H,
                PAD_H,
                DILATION_H,
                TAPS_H,
                TAPS_W,
                ROLES,
                ROWS,
            )
    return z


@relaunched
def _depthwise_kernel(
    out,
    kept,
    soma,
    x,
    weights,
    soma_bias,
    bias,
    to_soma,
    to_dendrite,
    S,
    STRIPS,
    OUT_HEIGHT,
    OUT_WIDTH,
    N,
    HEIGHT,
    WIDTH,
    kept_d,
    out_b,
    out_n,
    out_h,
    out_w,
    soma_b,
    soma_n,
    soma_h,
    soma_w,
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
    D: tl.constexpr,
    OWN_SOMA: tl.constexpr,
    KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_SOMA_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    EVEN_N: tl.constexpr,
    LONG: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    ROLES: tl.constexpr = D + 1 if OWN_SOMA else D
    pid = tl.program_id(0)
    # Programs that run together share cache lines.
    if CHANNELS_INNER:
        blocks_n = tl.cdiv(N, BLOCK_N)
        block_s, block_n = pid // blocks_n, pid % blocks_n
    else:
        blocks_s = tl.cdiv(S, BLOCK_S)
        block_s, block_n = pid % blocks_s, pid // blocks_s
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # A mask that is true everywhere costs the compiler nothing.
    mask_n = tl.full((BLOCK_N,), True, tl.int1) if EVEN_N else n < N
    s = block_s * BLOCK_S + tl.arange(0, BLOCK_S)
    image, row, column, top, left = strip_at(
        s, S, STRIPS, OUT_WIDTH, STRIDE_H, STRIDE_W, PAD_H, PAD_W, ROWS
    )
    # Within an image 32 bits do, unless LONG.
    INDEX: tl.constexpr = tl.int64 if LONG else tl.int32
    high, along, which = row.to(INDEX), column.to(INDEX), n.to(INDEX)[None, :]
    z = ()
    for _ in tl.static_range(ROWS):
        if OWN_SOMA:
            z = z + (start_from(soma_bias, n, mask_n, HAS_SOMA_BIAS, BLOCK_S, BLOCK_N),)
        for d in tl.static_range(D):
            z = z + (start_from(bias + d * N, n, mask_n, HAS_BIAS, BLOCK_S, BLOCK_N),)
    corner = image * x_b + (top.to(INDEX) * x_h + left.to(INDEX) * x_w)
    z = convolve(
        z,
        x + corner[:, None] + which * x_n,
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
        STRIDE_H,
        PAD_H,
        PAD_W,
        DILATION_H,
        DILATION_W,
        TAPS_H,
        TAPS_W,
        UNROLL,
        ROLES,
        ROWS,
    )
    mask = (s < S)[:, None] & mask_n[None, :]
    at_soma = (image * soma_b + (high * soma_h + along * soma_w))[:, None] + which * soma_n
    at_out = (image * out_b + (high * out_h + along * out_w))[:, None] + which * out_n
    # All loads come first: the compiler may not move a load past a store.
    results = ()
    activations = ()
    for i in tl.static_range(ROWS):
        there = mask & (row + i < OUT_HEIGHT)[:, None]
        own = ()
        for d in tl.static_range(D):
            own = own + (z[i * ROLES + ROLES - D + d],)
        # The bias is in already.
        a = cascade(own, bias, to_dendrite, n, mask_n, N, D, False, ACTIVATION, FAST, 1)
        if OWN_SOMA:
            summed = z[i * ROLES]
        else:
            summed = tl.load(soma + at_soma + i * soma_h, mask=there, other=0.0).to(tl.float32)
        results = results + (summed - negated_sum(a, to_soma, n, mask_n, N, D, 1),)
        activations = activations + a
    for i in tl.static_range(ROWS):
        there = mask & (row + i < OUT_HEIGHT)[:, None]
        tl.store(out + at_out + i * out_h, results[i].to(out.dtype.element_ty), mask=there)
        if KEEP:
            for d in tl.static_range(D):
                value = activations[i * D + d].to(kept.dtype.element_ty)
                at = at_out + tl.cast(kept_d, tl.int64) * d + i * out_h
                tl.store(kept + at, value, mask=there)


@relaunched
def _depthwise_gradient_kernel(
    partial,
    grad,
    x,
    weights,
    bias,
    to_dendrite,
    S,
    STRIPS,
    OUT_HEIGHT,
    OUT_WIDTH,
    N,
    HEIGHT,
    WIDTH,
    share,
    grad_b,
    grad_n,
    grad_h,
    grad_w,
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
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr,
    LONG: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = tl.full((BLOCK_N,), True, tl.int1) if EVEN_N else n < N
    INDEX: tl.constexpr = tl.int64 if LONG else tl.int32
    which = n.to(INDEX)[None, :]
    start = pid // blocks_n * share
    sums = zeros(D, BLOCK_S, BLOCK_N)
    for step in range(0, share, BLOCK_S):
        s = start + step + tl.arange(0, BLOCK_S)
        image, row, column, top, left = strip_at(
            s, S, STRIPS, OUT_WIDTH, STRIDE_H, STRIDE_W, PAD_H, PAD_W, ROWS
        )
        z = ()
        for _ in tl.static_range(ROWS):
            for d in tl.static_range(D):
                z = z + (start_from(bias + d * N, n, mask_n, HAS_BIAS, BLOCK_S, BLOCK_N),)
        corner = image * x_b + (top.to(INDEX) * x_h + left.to(INDEX) * x_w)
        z = convolve(
            z,
            x + corner[:, None] + which * x_n,
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
            STRIDE_H,
            PAD_H,
            PAD_W,
            DILATION_H,
            DILATION_W,
            TAPS_H,
            TAPS_W,
            UNROLL,
            D,
            ROWS,
        )
        mask = (s < S)[:, None] & mask_n[None, :]
        at = image * grad_b + (row.to(INDEX) * grad_h + column.to(INDEX) * grad_w)
        at_grad = at[:, None] + which * grad_n
        for i in tl.static_range(ROWS):
            there = mask & (row + i < OUT_HEIGHT)[:, None]
            # What lies past the end has an error of zero.
            g = tl.load(grad + at_grad + i * grad_h, mask=there, other=0.0).to(tl.float32)
            own = ()
            for d in tl.static_range(D):
                own = own + (z[i * D + d],)
            a = cascade(own, bias, to_dendrite, n, mask_n, N, D, False, ACTIVATION, FAST, 1)
            added = ()
            for d in tl.static_range(D):
                added = added + (sums[d] + g * a[d],)
            sums = added
    partial += (pid // blocks_n).to(tl.int64) * D * N + n
    for d in tl.static_range(D):
        tl.store(partial + d * N, tl.sum(sums[d], axis=0), mask=mask_n)


@dataclass(frozen=True, slots=True)
class _Planes:
    """A convolution over two dimensions, as which one over a single dimension is seen too."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    taps: tuple[int, int]
    down: bool

    @classmethod
    def of(cls, geometry: Geometry, taps: tuple[int, ...], channels_last: bool) -> "_Planes":
        if geometry.spatial == 2:
            first, second = taps
            s, p, d = geometry.stride, geometry.padding, geometry.dilation
            return cls((s[0], s[1]), (p[0], p[1]), (d[0], d[1]), (first, second), False)
        (stride,), (padding,), (dilation,) = geometry.stride, geometry.padding, geometry.dilation
        if channels_last:
            # Strips lie along the only dimension.
            return cls((stride, 1), (padding, 0), (dilation, 1), (taps[0], 1), True)
        return cls((1, stride), (0, padding), (1, dilation), (1, taps[0]), False)

    def view(self, tensor: Tensor, spatial: int) -> Tensor:
        """Return `tensor` as `(B, N, H, W)`."""
        if spatial == 1:
            tensor = tensor.unsqueeze(-1 if self.down else -2)
        return tensor if tensor.dim() == 4 else tensor[None]


def fused_depthwise(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    out: Tensor,
    kept: Tensor | None,
    strips: Strips | None = None,
) -> None:
    """Write the neuron's output, and the activations if `kept` is given.

    Args:
        soma: `(B, N, *spatial)`, over one or two dimensions, the batch optional, any strides, not
            empty; float32, float16 or bfloat16.
        x: `(B, N, *spatial)`, any strides; cast to the dtype of `soma`.
        weight: V, `(D, N, 1, *kernel)`, 1 <= D <= `MOST_DENDRITES`; rounded to that dtype.
        bias: c, `(D, N)`, any float dtype, or None.
        to_soma: T, `(D, N)`, likewise.
        to_dendrite: U, `(D, D, N)`, likewise.
        activation: f, one of `ACTIVATIONS`.
        geometry: N groups, not transposed.
        out: shape of `soma`, any strides; written.
        kept: `(D, *soma)`, each slice with the strides of `out`; written.
        strips: the configuration, by default `depthwise_strips`'.
    """
    weights = _by_tap(weight.to(soma.dtype))
    links = bias, to_soma, to_dendrite, activation
    taps = tuple(weight.shape[3:])
    _launch(soma, x.to(soma.dtype), weights, None, *links, geometry, taps, out, kept, strips)


def depthwise_neuron(
    x: Tensor,
    weight: Tensor,
    soma_bias: Tensor | None,
    dendrite_weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    out: Tensor,
    kept: Tensor | None,
    strips: Strips | None = None,
) -> None:
    """Write the neuron's output, the soma's own convolution included, and the activations.

    Args:
        x: `(B, N, *spatial)`, over one or two dimensions, the batch optional, any strides, not
            empty; float32, float16 or bfloat16.
        weight: W, `(N, 1, *kernel)`, dtype of `x`.
        soma_bias: b, `(N,)`, any float dtype, or None.
        dendrite_weight: V, `(D, N, 1, *kernel)`; rounded to the dtype of `x`.
        bias: and the rest: as of `fused_depthwise`.
        to_soma: likewise.
        to_dendrite: likewise.
        activation: likewise.
        geometry: likewise.
        out: `(B, N, *spatial)`, any strides; written.
        kept: likewise.
        strips: likewise.
    """
    weights = _by_tap(torch.cat((weight[None], dendrite_weight.to(x.dtype))))
    links = soma_bias, bias, to_soma, to_dendrite, activation
    taps = tuple(weight.shape[2:])
    _launch(None, x, weights, *links, geometry, taps, out, kept, strips)


def _by_tap(weight: Tensor) -> Tensor:
    """Return `(roles, taps, N)` of `(roles, N, 1, *kernel)`, float32, contiguous."""
    by_tap = weight.flatten(2).transpose(1, 2)
    return torch.empty(by_tap.shape, dtype=torch.float32, device=weight.device).copy_(by_tap)


def _launch(
    soma: Tensor | None,
    x: Tensor,
    weights: Tensor,
    soma_bias: Tensor | None,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    taps: tuple[int, ...],
    out: Tensor,
    kept: Tensor | None,
    strips: Strips | None,
) -> None:
    channels_last = x.stride(geometry.channel_axis) == 1 and x.shape[geometry.channel_axis] > 1
    planes = _Planes.of(geometry, taps, channels_last)
    x, out = planes.view(x, geometry.spatial), planes.view(out, geometry.spatial)
    seen = out if soma is None else planes.view(soma, geometry.spatial)
    images, neurons, height, width = out.shape
    roles, dendrites = len(weights), len(to_soma)
    strips = strips or _strips(out.shape, roles, planes, channels_last)
    rows = ceiling(height, strips.rows)
    count = images * rows * width
    with on_device(x):
        _depthwise_kernel[(ceiling(count, strips.strips) * ceiling(neurons, strips.neurons),)](
            out,
            # A pointer has to be one, whether it is read or not.
            out if kept is None else kept,
            seen,
            x,
            weights,
            weights if soma_bias is None else soma_bias.contiguous(),
            weights if bias is None else bias.contiguous(),
            to_soma.contiguous(),
            to_dendrite.contiguous(),
            count,
            rows,
            height,
            width,
            neurons,
            x.shape[2],
            x.shape[3],
            0 if kept is None else kept.stride(0),
            *out.stride(),
            *seen.stride(),
            *x.stride(),
            *planes.stride,
            *planes.padding,
            *planes.dilation,
            *planes.taps,
            D=dendrites,
            OWN_SOMA=soma is None,
            KEEP=kept is not None,
            ACTIVATION=activation,
            FAST=fast_activations(x),
            HAS_SOMA_BIAS=soma_bias is not None,
            HAS_BIAS=bias is not None,
            CHANNELS_INNER=strips.neurons > 1,
            EVEN_N=neurons % strips.neurons == 0,
            LONG=_is_long(x, seen, out),
            UNROLL=planes.taps[1] <= strips.unrolled,
            ROWS=strips.rows,
            BLOCK_S=strips.strips,
            BLOCK_N=strips.neurons,
            num_warps=WARPS,
        )


def fused_depthwise_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    strips: Strips | None = None,
) -> Tensor:
    """Sum `dT_d = Σ_p g ⊙ a_d`, recomputing the activations.

    Args:
        grad: g, `(B, N, *spatial)`, any strides, not empty; its dtype is that of the computation.
        x: as in `fused_depthwise`, and likewise the others.
        weight: V.
        bias: c, `(D, N)`, or None.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.
        geometry: N groups, not transposed.
        strips: the configuration, by default `depthwise_strips`'.

    Returns:
        `(D, N)`, float32, the same bits in every run.
    """
    x, weights = x.to(grad.dtype), _by_tap(weight.to(grad.dtype))
    channels_last = x.stride(geometry.channel_axis) == 1 and x.shape[geometry.channel_axis] > 1
    planes = _Planes.of(geometry, tuple(weight.shape[3:]), channels_last)
    x, grad = planes.view(x, geometry.spatial), planes.view(grad, geometry.spatial)
    images, neurons, height, width = grad.shape
    dendrites = len(weights)
    # The sums are one more role.
    strips = strips or _strips(grad.shape, dendrites + 1, planes, channels_last)
    rows = ceiling(height, strips.rows)
    count = images * rows * width
    tiles, blocks_n = ceiling(count, strips.strips), ceiling(neurons, strips.neurons)
    each = ceiling(tiles, min(tiles, max(1, _WAVES * multiprocessors(x) // blocks_n)))
    shares = ceiling(tiles, each)
    partial = grad.new_empty((shares, dendrites, neurons), dtype=torch.float32)
    with on_device(x):
        _depthwise_gradient_kernel[(shares * blocks_n,)](
            partial,
            grad,
            x,
            weights,
            weights if bias is None else bias.contiguous(),
            to_dendrite.contiguous(),
            count,
            rows,
            height,
            width,
            neurons,
            x.shape[2],
            x.shape[3],
            each * strips.strips,
            *grad.stride(),
            *x.stride(),
            *planes.stride,
            *planes.padding,
            *planes.dilation,
            *planes.taps,
            D=dendrites,
            ACTIVATION=activation,
            FAST=fast_activations(x),
            HAS_BIAS=bias is not None,
            EVEN_N=neurons % strips.neurons == 0,
            LONG=_is_long(x, grad),
            UNROLL=planes.taps[1] <= strips.unrolled,
            ROWS=strips.rows,
            BLOCK_S=strips.strips,
            BLOCK_N=strips.neurons,
            num_warps=WARPS,
        )
    return partial[0] if shares == 1 else partial.sum(0)


def _is_long(*tensors: Tensor) -> bool:
    """Return whether an image of one of these tensors, `(B, N, H, W)`, needs 64 bits to walk."""
    return any(
        sum(size * step for size, step in zip(t.shape[1:], t.stride()[1:], strict=True)) >= _SHORT
        for t in tensors
    )


def _strips(out: tuple[int, ...], roles: int, planes: _Planes, channels_last: bool) -> Strips:
    images, neurons, height, width = out
    down = planes.taps[0], planes.stride[0], planes.dilation[0]
    return depthwise_strips(images, height, width, neurons, roles, *down, channels_last)
