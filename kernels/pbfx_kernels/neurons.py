"""Somas and dendrites packed for inference: one product over all their weights, one epilogue.

    r = x [W; V_1; ...; V_D]ᵀ + [b; c_1; ...; c_D]
    a_d = f(r_d + Σ_{e<d} U_{d,e} ⊙ a_e)        out = r_0 + Σ_d T_d ⊙ a_d

Weights are packed once, by `pack`, and not at every call. Where the soma is computed elsewhere,
because a norm that cannot be folded stands behind it, the packed weight holds the dendrites alone.

On a CUDA device the epilogue is one Triton kernel. Under `torch.compile` and `torch.export`, where
gradients are wanted, and everywhere else it is plain torch, so that a compiler can fuse it and an
exported graph holds nothing but aten ops.
"""

import dataclasses

import torch
from torch import Tensor

from pbfx_kernels import reference
from pbfx_kernels.candidate_autograd import autocasts, no_autocast
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.problem import linear_problem, problem_of
from pbfx_kernels.strategy import fallback_reason, streams


def pack(stacked: Tensor, geometry: Geometry) -> Tensor:
    """Make one weight of S, channels in the order (group, s, neuron of the group).

    Args:
        stacked: `(S, N, K)`, `(S, N, channels / groups, *kernel)` or, transposed, `(S, channels,
            N / groups, *kernel)`.
        geometry: the form of one of them.

    Returns:
        `(S * N, ...)`, or transposed `(channels, S * N / groups, *kernel)`, contiguous.
    """
    return reference.flatten_weight(stacked, geometry).contiguous()


def pack_bias(stacked: Tensor, geometry: Geometry) -> Tensor:
    """Make one bias of S, `(S, N)` to `(S * N,)`, in the order of `pack`."""
    return reference.flatten_stack(stacked, -1, geometry.groups).contiguous()


def neurons(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
) -> Tensor:
    """Evaluate somas with their dendrites.

    Args:
        x: `(..., K)` or `(B, channels, *spatial)`, the batch optional.
        weight: of `pack`, `[W; V_1; ...; V_D]`.
        bias: of `pack_bias`, likewise, or None.
        to_soma: T, `(D, N)`; D may be 0.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma.

    Returns:
        `(*soma)`, in the dtype of the soma's own op.
    """
    count = to_soma.shape[0]
    if not count or not _runs_kernel((x, weight), None, to_soma, geometry):
        r = reference.product(x, weight, bias, geometry)
        if not count:
            return r
        soma, *z = _split(r, count + 1, geometry)
        return reference.join(soma, z, to_soma, to_dendrite, activation, geometry)[0]
    if _streams(x, weight, count, geometry):
        return _streamed(x, weight, bias, to_soma, to_dendrite, activation)
    offsets = None
    if bias is not None and geometry.spatial:
        # A library adds the bias of a convolution in a pass of its own over all that it wrote; the
        # epilogue adds the dendrites' for nothing.
        bias, offsets = None, _unpacked_bias(bias, count + 1, geometry)
    soma, z = _halves(reference.product(x, weight, bias, geometry), count + 1, geometry)
    if offsets is not None:
        own, offsets = offsets.to(soma.dtype).tensor_split((1,))
        soma = soma.add_(own.reshape(-1, *(1,) * geometry.spatial))
    return _epilogue(soma, z, offsets, to_soma, to_dendrite, activation, geometry)


def joined(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
) -> Tensor:
    """Add packed dendrites to what a soma gave.

    Args:
        soma: `(*soma)`; its dtype is the dtype of the computation.
        x: the soma's input, `(..., K)` or `(B, channels, *spatial)`, the batch optional.
        weight: of `pack`, `[V_1; ...; V_D]`; D at least 1.
        bias: of `pack_bias`, likewise, or None.
        to_soma: T, `(D, N)`.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of this call of the soma.

    Returns:
        `(*soma)`, dtype of `soma`.
    """
    count, dtype = to_soma.shape[0], soma.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    with no_autocast(soma):
        if _runs_kernel((x, weight), soma, to_soma, geometry):
            z = reference.product(x, weight, None, geometry)
            offsets = None if bias is None else _unpacked_bias(bias, count, geometry)
            return _epilogue(soma, z, offsets, to_soma, to_dendrite, activation, geometry)
        z = reference.product(x, weight, None if bias is None else bias.to(dtype), geometry)
        parts = _split(z, count, geometry)
        return reference.join(soma, parts, to_soma, to_dendrite, activation, geometry)[0]


def _streams(x: Tensor, weight: Tensor, count: int, geometry: Geometry) -> bool:
    """Return whether one kernel had better read the packed weight of few rows' neurons."""
    if geometry.spatial or autocasts(x.device.type):
        return False
    stacked = weight.unflatten(0, (count + 1, -1))
    problem = linear_problem(x, stacked[0], stacked[1:])
    return problem is not None and streams(problem)


def _streamed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
) -> Tensor:
    from pbfx_kernels.streamed_neuron import streamed_neuron

    count, each = to_soma.shape
    stacked = weight.unflatten(0, (count + 1, each))
    own, theirs = (None, None) if bias is None else (bias[:each], bias[each:].view(count, each))
    out = x.new_empty((*x.shape[:-1], each))
    streamed_neuron(
        x.reshape(-1, x.shape[-1]),
        stacked[0],
        stacked[1:],
        own,
        theirs,
        to_soma,
        to_dendrite,
        activation,
        out.view(-1, each),
        None,
    )
    return out


def _split(r: Tensor, stacked: int, geometry: Geometry) -> tuple[Tensor, ...]:
    """Undo the order of `pack` on the channels of a product: S tensors `(*soma)`."""
    axis, groups = geometry.channel_axis, geometry.groups
    if groups == 1:
        return r.chunk(stacked, axis)
    split = r.unflatten(axis, (groups, stacked, r.shape[axis] // (groups * stacked)))
    return tuple(split.select(axis - 1, s).flatten(axis - 1, axis) for s in range(stacked))


def _halves(r: Tensor, stacked: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return the somas' part of a product, and the dendrites', which stays packed."""
    axis, groups = geometry.channel_axis, geometry.groups
    each = r.shape[axis] // (groups * stacked)
    if groups == 1:
        return r.narrow(axis, 0, each), r.narrow(axis, each, each * (stacked - 1))
    split = r.unflatten(axis, (groups, stacked, each))
    soma = split.select(axis - 1, 0).flatten(axis - 1, axis)
    return soma, split.narrow(axis - 1, 1, stacked - 1).flatten(axis - 2, axis)


def _unpacked_bias(bias: Tensor, stacked: int, geometry: Geometry) -> Tensor:
    """Undo `pack_bias`: `(S * N,)` to `(S, N)`."""
    return bias.view(geometry.groups, stacked, -1).movedim(1, 0).flatten(1)


def _epilogue(
    soma: Tensor,
    z: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
) -> Tensor:
    from pbfx_kernels.epilogue import dendrites_epilogue
    from pbfx_kernels.layout import writable

    out = writable(soma, geometry.channel_axis)
    dendrites_epilogue(soma, z, bias, to_soma, to_dendrite, activation, geometry, out, None)
    return out


def _dtype_of_product(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if autocasts(device) else x.dtype


def _runs_kernel(
    inputs: tuple[Tensor, Tensor], soma: Tensor | None, to_soma: Tensor, geometry: Geometry
) -> bool:
    """Return whether the epilogue of this call is the Triton kernel; it knows no gradients.

    Args:
        inputs: what the neurons read, and their packed weight.
        soma: its output, or None where the product is to give it.
        to_soma: T.
        geometry: the form of the soma.
    """
    x = inputs[0]
    # Compilers fuse plain torch with what follows, and tracers cannot look into a launch.
    if torch.compiler.is_compiling() or x.device.type != "cuda" or not x.numel():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, soma)):
        return False
    count, each = to_soma.shape
    form = torch.empty((count, each, *(1,) * (1 + geometry.spatial)), device="meta")
    dtype = _dtype_of_product(x) if soma is None else soma.dtype
    problem = dataclasses.replace(problem_of(x, form, geometry), dtype=dtype)
    return fallback_reason(problem) is None
