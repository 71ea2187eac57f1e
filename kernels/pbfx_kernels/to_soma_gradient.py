"""The one gradient of accepted dendrites, as a reduction in one pass.

    dT_d = Σ_p g ⊙ a_d        with a_d saved, or a_d = f(z_d + c_d + Σ_{e<d} U_{d,e} ⊙ a_e)

Shapes: P positions, N neurons, D dendrites. The error `g` is read once for all dendrites, and so
are the activations, or the preactivations that a library computed again: then bias, cascade and
activation are fused in, and no activation is ever in memory. The sum
runs in two stages: each program adds up its share of the positions in a fixed order and writes
`(shares, D, N)` partial sums in float32, and one `torch.sum` adds the shares. No atomics, so the
result is the same bits in every run, whether torch asks for that or not.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.epilogue import Tile, tile_of
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import ceiling, fast_activations, multiprocessors, on_device
from pbfx_kernels.layout import grid_of_strides, is_regular, regular
from pbfx_kernels.relaunch import Launch
from pbfx_kernels.shares import added
from pbfx_kernels.triton_math import cascade
from pbfx_kernels.walking import REMEMBERED, Sizes

# Programs per multiprocessor: enough to hide latency, few enough that partial sums stay small.
_WAVES = 8
# Each dendrite is a tile of partial sums in registers.
MOST_DENDRITES = 8


@triton.jit
def _to_soma_gradient_kernel(
    partial,
    grad,
    activations,
    bias,
    to_dendrite,
    P,
    S,
    N,
    GROUP,
    share,
    a_d,
    grad_b,
    grad_s,
    grad_n,
    a_b,
    a_s,
    a_n,
    D: tl.constexpr,
    FROM_Z: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    wide_n = n.to(tl.int64)[None, :]
    if GROUPED:
        a_n0 = (wide_n // GROUP) * (D * GROUP) + wide_n % GROUP
    else:
        a_n0 = wide_n
    start = (pid // blocks_n).to(tl.int64) * share
    # Of tiles, not of sums: the reduction across threads happens once, at the end.
    sums = ()
    for _ in tl.static_range(D):
        sums = sums + (tl.zeros((BLOCK_P, BLOCK_N), tl.float32),)
    for step in range(0, share, BLOCK_P):
        p = start + step + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & mask_n[None, :]
        if ROWS:
            outer = p[:, None]
            inner = tl.zeros_like(outer)
        else:
            outer = (p // S)[:, None]
            inner = (p % S)[:, None]
        g = tl.load(grad + outer * grad_b + inner * grad_s + wide_n * grad_n, mask=mask, other=0.0)
        at = activations + outer * a_b + inner * a_s + a_n0 * a_n
        a = ()
        for _ in tl.static_range(D):
            a = a + (tl.load(at, mask=mask, other=0.0).to(tl.float32),)
            at += a_d
        if FROM_Z:
            a = cascade(a, bias, to_dendrite, n, mask_n, N, D, HAS_BIAS, ACTIVATION, FAST, 1)
        added = ()
        for d in tl.static_range(D):
            added = added + (sums[d] + g.to(tl.float32) * a[d],)
        sums = added
    partial += (pid // blocks_n).to(tl.int64) * D * N + n
    for d in tl.static_range(D):
        tl.store(partial + d * N, tl.sum(sums[d], axis=0), mask=mask_n)


def to_soma_gradient(grad: Tensor, activations: Tensor, channel_axis: int) -> Tensor:
    """Sum `dT_d = Σ_p g ⊙ a_d`.

    Args:
        grad: g, `(*soma)`, any strides, not empty.
        activations: a, `(D, *soma)`, any strides, any float dtype; 1 <= D <= `MOST_DENDRITES`.
        channel_axis: axis of the neurons in `grad`, negative (`Geometry.channel_axis`).

    Returns:
        `(D, N)`, float32.
    """
    if not is_regular(activations[0], channel_axis):
        activations = activations.contiguous()
    first, step = activations[0], activations.stride(0)
    return _launch(grad, first, step, activations.shape[0], None, None, "", channel_axis, 1)


def to_soma_gradient_of(
    grad: Tensor,
    z: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
) -> Tensor:
    """Sum `dT_d = Σ_p g ⊙ a_d` from what the dendrites' GEMM or convolution computed.

    Args:
        grad: g, `(*soma)`, any strides, not empty.
        z: as of `dendrites_epilogue`, and likewise the others.
        bias: c, `(D, N)`, or None.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma.

    Returns:
        `(D, N)`, float32.
    """
    axis = geometry.channel_axis
    z, neurons = regular(z, axis), grad.shape[axis]
    step = neurons // geometry.groups * z.stride(axis)
    links = to_dendrite.shape[0], bias, to_dendrite, activation
    return _launch(grad, z.narrow(axis, 0, neurons), step, *links, axis, geometry.groups)


def _launch(
    grad: Tensor,
    first: Tensor,
    step: int,
    dendrites: int,
    bias: Tensor | None,
    to_dendrite: Tensor | None,
    activation: str,
    channel_axis: int,
    groups: int,
) -> Tensor:
    grad = regular(grad, channel_axis)
    launch, shares = _prepare(
        (channel_axis, groups, dendrites, step, activation, fast_activations(grad)),
        (grad.shape, grad.stride(), first.stride()),
        (grad.dtype, first.dtype, *(None if t is None else t.dtype for t in (bias, to_dendrite))),
        grad.get_device(),
        multiprocessors(grad),
    )
    neurons = grad.shape[channel_axis]
    partial = grad.new_empty((shares, dendrites, neurons), dtype=torch.float32)
    with on_device(grad):
        launch(
            grad.get_device(),
            partial,
            grad,
            first,
            # A pointer has to be one, whether it is read or not.
            grad if bias is None else bias.contiguous(),
            grad if to_dendrite is None else to_dendrite.contiguous(),
        )
    return added(partial)


@functools.lru_cache(REMEMBERED)
def _prepare(
    site: tuple[int, int, int, int, str, bool],
    layout: tuple[Sizes, Sizes, Sizes],
    dtypes: tuple[torch.dtype | None, ...],
    _: int,
    multiprocessors: int,
) -> tuple[Launch, int]:
    """Prepare the pass over tensors of this form.

    Args:
        site: channel axis, groups, D, the step from dendrite to dendrite in elements, activation,
            and whether the hardware's one is exact enough.
        layout: the error's shape, and the strides of error and first activation.
        dtypes: of error, activations, bias and links, for which Triton compiles anew.
        _: the device, on which the compiled kernel lies.
        multiprocessors: how many it has.

    Returns:
        launch: of the kernel.
        shares: how many sums there are to add up.
    """
    axis, groups, dendrites, step, activation, fast = site
    shape, *strides = layout
    neurons, (bias, links) = shape[axis], dtypes[2:]
    grid = grid_of_strides(axis, shape, strides[1], strides[0])
    tile = tile_of(grid.positions, neurons, dendrites, grid.channels_last, grid.mixed)
    share, shares = _shares(grid.positions, neurons, tile, multiprocessors)
    sizes = grid.positions, grid.inner, neurons, neurons // groups, share, step
    launch = Launch(
        _to_soma_gradient_kernel,
        (shares * ceiling(neurons, tile.neurons), 1),
        (*sizes, *grid.strides[1], *grid.strides[0]),
        (
            *(dendrites, links is not None, activation, fast, bias is not None),
            *(groups > 1, grid.inner == 1, tile.positions, tile.neurons),
        ),
        tile.warps,
    )
    return launch, shares


def _shares(positions: int, neurons: int, tile: Tile, multiprocessors: int) -> tuple[int, int]:
    """Return positions per program, whole tiles, and how many programs share the positions."""
    tiles = ceiling(positions, tile.positions)
    wanted = max(1, _WAVES * multiprocessors // ceiling(neurons, tile.neurons))
    each = ceiling(tiles, min(tiles, wanted))
    return each * tile.positions, ceiling(tiles, each)
