"""Everything after a library's GEMM or convolution over stacked weights, in one kernel.

    a_d = f(z_d + c_d + Σ_{e<d} U_{d,e} ⊙ a_e)        out = soma - (-Σ_d T_d ⊙ a_d)

Shapes: P positions, N neurons, D dendrites, G groups. `z` is what the library wrote, `(..., D * N)`
or `(B, D * N, *spatial)`, channels in the order (group, d, neuron of the group).

Fused: bias, cascade, activation, links and the sum with the soma; `z` is read once and everything
between stays in registers, in float32. Activations are written only if asked for: nothing needs
them in inference, and they are D times the size of the output. Nothing is recomputed.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import ceiling, fast_activations, on_device, power_of_two
from pbfx_kernels.layout import grid_of_strides, regular
from pbfx_kernels.relaunch import Launch
from pbfx_kernels.triton_math import cascade, negated_sum
from pbfx_kernels.walking import REMEMBERED, Sizes

# Elements of a tile. A thread then holds 8 elements of each of D + 1 tensors: enough loads in
# flight to hide the memory's latency, and no spills up to MOST_DENDRITES.
_TILE = 1024
_SMALL_TILE = 512
# Above this many dendrites the tile shrinks, so that the cascade stays in registers.
_FEW_DENDRITES = 5
# The cascade is unrolled; its code grows with D², and 16 take the assembler half a minute. Beyond,
# the reference takes over.
MOST_DENDRITES = 8


@triton.jit
def _dendrites_epilogue_kernel(
    out,
    kept,
    soma,
    z,
    bias,
    to_soma,
    to_dendrite,
    P,
    S,
    N,
    GROUP,
    z_d,
    kept_d,
    out_b,
    out_s,
    out_n,
    soma_b,
    soma_s,
    soma_n,
    z_b,
    z_s,
    z_n,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One axis: the other axes of a launch grid end at 65535.
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = (pid // blocks_n).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_n = n < N
    mask = (p < P)[:, None] & mask_n[None, :]
    if ROWS:
        outer = p[:, None]
        inner = tl.zeros_like(outer)
    else:
        outer = (p // S)[:, None]
        inner = (p % S)[:, None]
    wide_n = n.to(tl.int64)[None, :]
    if GROUPED:
        z_n0 = (wide_n // GROUP) * (D * GROUP) + wide_n % GROUP
    else:
        z_n0 = wide_n
    # All loads come first: the compiler may not move a load past the stores of activations.
    z += outer * z_b + inner * z_s + z_n0 * z_n
    loaded = ()
    for _ in tl.static_range(D):
        loaded = loaded + (tl.load(z, mask=mask, other=0.0).to(tl.float32),)
        z += z_d
    s = tl.load(soma + outer * soma_b + inner * soma_s + wide_n * soma_n, mask=mask, other=0.0)
    a = cascade(loaded, bias, to_dendrite, n, mask_n, N, D, HAS_BIAS, ACTIVATION, FAST, 1)
    negated = negated_sum(a, to_soma, n, mask_n, N, D, 1)
    at = outer * out_b + inner * out_s + wide_n * out_n
    tl.store(out + at, (s.to(tl.float32) - negated).to(out.dtype.element_ty), mask=mask)
    if KEEP:
        for d in tl.static_range(D):
            tl.store(kept + at, a[d].to(kept.dtype.element_ty), mask=mask)
            kept += kept_d


@dataclass(frozen=True, slots=True)
class Tile:
    """The configuration of an element-wise kernel: a tile of positions by neurons."""

    positions: int
    neurons: int
    warps: int = 4


def tile_of(
    positions: int, neurons: int, dendrites: int, channels_last: bool, mixed: bool = False
) -> Tile:
    """Choose a tile: wide along the axis that is contiguous in memory, square if that differs."""
    elements = _TILE if dendrites <= _FEW_DENDRITES else _SMALL_TILE
    if mixed:
        wide = min(power_of_two(neurons), 32)
        return Tile(elements // wide, wide)
    if channels_last:
        wide = min(power_of_two(neurons), 128)
        return Tile(elements // wide, wide)
    wide = min(power_of_two(positions), 256)
    return Tile(wide, min(elements // wide, power_of_two(neurons)))


def dendrites_epilogue(
    soma: Tensor,
    z: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    out: Tensor,
    kept: Tensor | None,
) -> None:
    """Write the neuron's output, and the activations if `kept` is given.

    Args:
        soma: `(*soma)`, any strides, not empty.
        z: the preactivations without bias, `(..., D * N)` or `(B, D * N, *spatial)`, dtype of
            `soma`; 1 <= D <= `MOST_DENDRITES`. What comes after D * N is not read.
        bias: c, `(D, N)`, any float dtype, or None.
        to_soma: T, `(D, N)`, likewise.
        to_dendrite: U, `(D, D, N)`, likewise.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma.
        out: `(*soma)`, `regular`; written.
        kept: `(D, *soma)`, each slice with the strides of `out`; written.
    """
    axis = geometry.channel_axis
    soma, z = regular(soma, axis), regular(z, axis)
    launch = _prepare(
        (axis, geometry.groups, *to_soma.shape, activation, fast_activations(soma)),
        (out.shape, out.stride(), soma.stride(), z.stride()),
        None if kept is None else kept.stride(0),
        (soma.dtype, None if bias is None else bias.dtype, to_soma.dtype, to_dendrite.dtype),
        soma.get_device(),
    )
    with on_device(soma):
        launch(
            soma.get_device(),
            out,
            # A pointer has to be one, whether it is read or not.
            out if kept is None else kept,
            soma,
            z,
            soma if bias is None else bias.contiguous(),
            to_soma.contiguous(),
            to_dendrite.contiguous(),
        )


@functools.lru_cache(REMEMBERED)
def _prepare(
    site: tuple[int, int, int, int, str, bool],
    layout: tuple[Sizes, Sizes, Sizes, Sizes],
    kept_d: int | None,
    dtypes: tuple[torch.dtype | None, ...],
    _: int,
) -> Launch:
    """Prepare the pass over tensors of this form.

    Args:
        site: channel axis, groups, D, N, activation, and whether the hardware's is exact enough.
        layout: the output's shape, and the strides of output, soma and preactivations.
        kept_d: stride of the activations, or None where they are not kept.
        dtypes: of soma, bias, to-soma and to-dendrite links, for which Triton compiles anew.
        _: the device, on which the compiled kernel lies.
    """
    axis, groups, dendrites, neurons, activation, fast = site
    shape, *strides = layout
    grid = grid_of_strides(axis, shape, *strides)
    tile = tile_of(grid.positions, neurons, dendrites, grid.channels_last, grid.mixed)
    blocks = ceiling(grid.positions, tile.positions) * ceiling(neurons, tile.neurons)
    group = neurons // groups
    sizes = grid.positions, grid.inner, neurons, group, group * strides[2][axis], kept_d or 0
    return Launch(
        _dendrites_epilogue_kernel,
        (blocks, 1),
        (*sizes, *grid.strides[0], *grid.strides[1], *grid.strides[2]),
        (
            *(dendrites, activation, fast, dtypes[1] is not None, kept_d is not None),
            *(grid.inner == 1, groups > 1, tile.positions, tile.neurons),
        ),
        tile.warps,
    )
