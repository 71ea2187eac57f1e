"""What accepted dendrites add to the preactivations of candidates, in one pass and in place.

    z_c += c_c + Σ_e U_{c,e} ⊙ a_e

Shapes: P positions, N neurons, C candidates, D accepted dendrites, walked as (outer, neuron,
inner). The library's GEMM or convolution has left V_c x in `z`; the bias joins here because a
convolution would add it in a pass of its own. The sum is in float32 and is rounded once.

Floor: bytes. z is read and written, and every a_e is read once per candidate, mostly from cache.

Source: Fahlman and Lebiere, *The Cascade-Correlation Learning Architecture*, 1990.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.relaunch import Launch
from pbfx_kernels.walking import ceiling, on_device, power_of_two, regular, walk

# Forms of sites; a training loop meets a handful.
_REMEMBERED = 4096
# Elements per program: eight per thread of four warps.
_TILE = 1024
_WARPS = 4
# Of the axis that is contiguous in memory.
_NEURONS_WIDE = 64
_INNER_WIDE = 256


@triton.jit
def _candidate_cascade_kernel(
    z_ptr,
    a_ptr,
    bias_ptr,
    links_ptr,
    neurons,
    inner,
    z_c,
    z_o,
    z_n,
    z_i,
    a_e,
    a_o,
    a_n,
    a_i,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
):
    blocks = tl.cdiv(neurons, TILE_N)
    tiles = tl.cdiv(inner, TILE_I)
    # Positions on the first axis of the grid, the only one that is not bounded by 65,535.
    program, c = tl.program_id(0), tl.program_id(1)
    n = (program % blocks) * TILE_N + tl.arange(0, TILE_N)
    tile = program // blocks
    real = n < neurons
    at_n = n.to(tl.int64)[:, None]
    at_o = (tile // tiles).to(tl.int64)
    at_i = ((tile % tiles).to(tl.int64) * TILE_I + tl.arange(0, TILE_I))[None, :]
    here = real[:, None] & (at_i < inner)
    at = z_ptr + c.to(tl.int64) * z_c + at_o * z_o + at_n * z_n + at_i * z_i
    z = tl.load(at, mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + c * neurons + n, mask=real, other=0.0).to(tl.float32)[:, None]
    older = a_ptr + at_o * a_o + at_n * a_n + at_i * a_i
    for e in tl.static_range(D):
        link = tl.load(links_ptr + (c * D + e) * neurons + n, mask=real, other=0.0)
        a = tl.load(older + tl.full((), e, tl.int64) * a_e, mask=here, other=0.0)
        z += link.to(tl.float32)[:, None] * a.to(tl.float32)
    tl.store(at, z.to(z_ptr.dtype.element_ty), mask=here)


def add_cascade_(
    z: Tensor, activations: Tensor, bias: Tensor | None, to_dendrite: Tensor, channel_axis: int
) -> Tensor:
    """Add bias and cascade to `z` in place, and return it.

    Args:
        z: `V_c x`, `(C, *soma)`, float32, float16 or bfloat16. A copy is returned instead where the
            axes beside the neurons' cannot be walked.
        activations: a, `(D, *soma)`, D at least 1.
        bias: c, `(C, N)`, or None.
        to_dendrite: U, `(C, D, N)`.
        channel_axis: axis of the neurons in the soma's output, negative.
    """
    if not z.numel():
        return z
    z, activations = (regular(stack, channel_axis, stacked=True) for stack in (z, activations))
    launch = _prepare(
        (z.shape, z.stride(), z.dtype),
        (activations.shape, activations.stride(), activations.dtype),
        None if bias is None else bias.dtype,
        to_dendrite.dtype,
        channel_axis,
        z.get_device(),
    )
    with on_device(z):
        launch(
            z.get_device(),
            z,
            activations,
            None if bias is None else bias.contiguous(),
            to_dendrite.contiguous(),
        )
    return z


Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


@functools.lru_cache(_REMEMBERED)
def _prepare(
    z: Form, a: Form, bias: torch.dtype | None, _: torch.dtype, channel_axis: int, __: int
) -> Launch:
    """Prepare the pass over tensors of this form, each of which can be walked.

    Args:
        z: shape, strides and dtype of the preactivations.
        a: of the older dendrites' activations.
        bias: its dtype, or None without one.
        _: dtype of the links, for which Triton compiles anew.
        channel_axis: axis of the neurons, negative.
        __: the device, on which the compiled kernel lies.
    """
    count, neurons, dendrites = z[0][0], z[0][channel_axis], a[0][0]
    way = walk(z[0][1:], channel_axis, z[1][1:], a[1][1:])
    plan = _plan(way.outer, way.inner, neurons, way.strides[0][1] == 1)
    return Launch(
        _candidate_cascade_kernel,
        (plan[2], count),
        (neurons, way.inner, z[1][0], *way.strides[0], a[1][0], *way.strides[1]),
        (dendrites, bias is not None, *plan[:2]),
        _WARPS,
    )


def _plan(outer: int, inner: int, neurons: int, neurons_adjoin: bool) -> tuple[int, int, int]:
    """Return the tile's neurons and inner positions, and the number of programs per candidate."""
    all_neurons, all_inner = power_of_two(neurons), power_of_two(inner)
    if neurons_adjoin:
        tile_neurons = min(all_neurons, _NEURONS_WIDE)
        tile_inner = min(all_inner, _TILE // tile_neurons)
    else:
        tile_inner = min(all_inner, _INNER_WIDE)
        tile_neurons = min(all_neurons, _TILE // tile_inner)
    tiles = outer * ceiling(inner, tile_inner)
    return tile_neurons, tile_inner, ceiling(neurons, tile_neurons) * tiles
