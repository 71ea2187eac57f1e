"""Sites whose dendrites learn by backpropagation: one product each way, one pass in between.

    z = x [V_1; ...; V_D]ᵀ                     out = soma + Σ_d T_d ⊙ a_d
    dz, dT, dc, dU = cascade_gradient(g, z)    dx = dz [V_1; ...; V_D]    [dV_1; ...; dV_D] = dzᵀ x

Saved for the backward: z, D times the size of the output, once; nothing else that is not there
anyway. dz is as large, so it is computed some images or rows at a time where that would matter.
Products are a library's, whatever the strategy of the forward is otherwise: a kernel that keeps
preactivations in registers has to write them here, and then has nothing over a library's.

Everything here works on every device and for every geometry; on CUDA devices that
`pbfx_kernels.strategy` knows, the passes between the products are Triton kernels.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pbfx_kernels import reference
from pbfx_kernels.activations import activate, activation_derivative
from pbfx_kernels.fallback import or_reference
from pbfx_kernels.geometry import LINEAR, Geometry
from pbfx_kernels.layout import stack_like, writable
from pbfx_kernels.packed import chunks, prefers_nhwc
from pbfx_kernels.problem import Problem, problem_of
from pbfx_kernels.strategy import Strategy, choose

# What the passes between the products compute in, and how long a cascade may be.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_DENDRITES = 8


def evaluate_full(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    keep: bool,
    strategy: Strategy | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate the dendrites of a site, and leave what `differentiate_full` reads.

    Args:
        soma: and the rest up to `geometry`: as of `reference.dendrites`.
        x: likewise.
        weight: likewise.
        bias: likewise.
        to_soma: likewise.
        to_dendrite: likewise.
        activation: likewise.
        geometry: likewise.
        keep: whether to return the activations.
        strategy: PACKED or REFERENCE, instead of the one that is chosen.

    Returns:
        out: `(*soma)`, dtype of `soma`.
        activations: a, `(D, *soma)`, likewise; `(0, *soma)` if not kept.
        z: V x without bias, `saved_shape`, likewise.
    """
    if not weight.shape[0]:
        z = soma.new_empty(saved_shape(soma.shape, 0, geometry))
        return soma.clone(), soma.new_empty((0, *soma.shape)), z
    flat = reference.flatten_weight(weight.to(soma.dtype), geometry)
    z = reference.product(_operand(x.to(soma.dtype), geometry), flat, None, geometry)
    links = bias, to_soma, to_dendrite, activation, geometry

    def plain() -> tuple[Tensor, Tensor]:
        stacked = _preactivations(z, bias, len(to_soma), geometry)
        out, each = reference.join(soma, stacked.unbind(), to_soma, to_dendrite, *links[3:])
        kept = torch.stack(each).to(soma.dtype) if keep else None
        return out, soma.new_empty((0, *soma.shape)) if kept is None else kept

    def kernel() -> tuple[Tensor, Tensor]:
        from pbfx_kernels.epilogue import dendrites_epilogue

        out = writable(soma, geometry.channel_axis)
        kept = stack_like(out, len(to_soma)) if keep else None
        dendrites_epilogue(soma, z, *links, out, kept)
        return out, soma.new_empty((0, *soma.shape)) if kept is None else kept

    problem = _problem(soma, weight, geometry)
    if (strategy or choose(problem)) is Strategy.REFERENCE:
        return *plain(), z
    out, kept = kernel() if strategy is not None else or_reference(problem, kernel, plain)
    return out, kept, z


def differentiate_full(
    grad: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    frozen: int,
    wants: tuple[bool, bool, bool],
    strategy: Strategy | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Differentiate `evaluate_full`; the gradient of `soma` is `grad` itself.

    Args:
        grad: g, `(*soma)`; its dtype is that of the computation.
        z: of `evaluate_full`.
        x: and the rest up to `geometry`: as there.
        weight: likewise.
        bias: likewise.
        to_soma: likewise.
        to_dendrite: likewise.
        activation: likewise.
        geometry: likewise.
        frozen: F: the oldest F dendrites learn nothing but their `to_soma`. Where an error is
            wanted at `x`, it comes through them too.
        wants: whether the gradients of `x`, of `weight`, and of links and bias are wanted.
        strategy: PACKED or REFERENCE, instead of the one that is chosen.

    Returns:
        x: `(*x)`, dtype of `grad`, or None.
        weight: `(D, *W)`, likewise; zero for frozen dendrites.
        sums: dT, dc and dU, `(2 * D + D * D, N)`, float32, or float64 for float64; zero for what
            is frozen, and above the diagonal.
    """
    wants_x, wants_weight, wants_sums = wants
    dtype, count = grad.dtype, weight.shape[0]
    learning = count - frozen
    # Without an error for x, what is frozen has nobody to pass it on to.
    first = 0 if wants_x else min(frozen, count - 1)
    if not grad.numel() or not count:
        rows = (2 * count + count * count, grad.shape[geometry.channel_axis])
        wide = reference.accumulation_dtype(dtype)
        return (
            grad.new_zeros(x.shape) if wants_x else None,
            grad.new_zeros(weight.shape) if wants_weight else None,
            grad.new_zeros(rows, dtype=wide) if wants_sums else None,
        )
    links = bias, to_soma, to_dendrite, activation, geometry, first, wants_sums
    problem = _problem(grad, weight, geometry)
    chosen = strategy or choose(problem)
    x = _operand(x.to(dtype), geometry)
    flat = reference.flatten_weight(weight[first:].to(dtype), geometry)

    def cascade(part: tuple[slice, ...]) -> tuple[Tensor, Tensor]:
        g, z_part = grad[part], z[part]

        def plain() -> tuple[Tensor, Tensor]:
            return plain_cascade_gradient(g, z_part, *links)

        def kernel() -> tuple[Tensor, Tensor]:
            from pbfx_kernels.cascade_gradient import cascade_gradient

            return cascade_gradient(g, z_part, *links)

        if chosen is Strategy.REFERENCE:
            return plain()
        return kernel() if strategy is not None else or_reference(problem, kernel, plain)

    parts = chunks(grad, count - first, geometry)
    grad_x, weights, sums = None, [], []
    if wants_x and len(parts) > 1:
        # A product is written where it belongs only if its rows lie one after the other.
        form = torch.preserve_format if geometry.spatial else torch.contiguous_format
        grad_x = torch.empty_like(x, memory_format=form)
    for part in parts:
        dz, summed = cascade(part)
        sums.append(summed)
        wanted = (wants_x, wants_weight and learning > 0)
        into = None if grad_x is None else grad_x[part]
        of_x, of_weight = product_gradients(dz, x[part], flat, geometry, *wanted, into)
        del dz
        weights.append(of_weight)
        grad_x = of_x if grad_x is None else grad_x
    total = (sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)) if wants_sums else None
    if total is not None and frozen > first:
        # They were differentiated for the sake of x alone.
        total[count : count + frozen] = 0
        total[2 * count : 2 * count + frozen * count] = 0
    grad_weight = None
    if wants_weight:
        grad_weight = grad.new_zeros(weight.shape) if learning < count else None
        if learning:
            added = weights[0] if len(weights) == 1 else _added(weights)
            found = reference.unflatten_weight(added, geometry, count - first)
            if grad_weight is None:
                grad_weight = found
            else:
                grad_weight[frozen:] = found[frozen - first :]
    return grad_x, grad_weight, total


def has_kernels(soma: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether what lies between the products is Triton kernels for such a site.

    Args:
        soma: its output, for device, dtype and shape.
        weight: V, `(D, *W)`, for its shape.
        geometry: the form of the soma.
    """
    return choose(_problem(soma, weight, geometry)) is not Strategy.REFERENCE


def may_have_kernels(soma: Tensor, weight: Tensor) -> bool:
    """Return what `has_kernels` is likely to say, by what a compiler can follow."""
    known = soma.device.type == "cuda" and soma.dtype in DTYPES
    return known and 1 <= weight.shape[0] <= MOST_DENDRITES


def saved_shape(soma: torch.Size, dendrites: int, geometry: Geometry) -> tuple[int, ...]:
    """Return the shape of what is saved: `(..., D * N)` or `(B, D * N, *spatial)`."""
    shape = list(soma)
    shape[geometry.channel_axis] *= dendrites
    return tuple(shape)


def saved_format(soma: Tensor, x: Tensor, geometry: Geometry) -> torch.memory_format:
    """Return how a library lays out its product: in NHWC if the soma is, or if it had better be."""
    if _nhwc(soma, x.shape, geometry):
        return torch.channels_last
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    if soma.dim() == geometry.spatial + 2 and soma.dim() in last:
        strides = soma.stride()
        if strides[1] == 1 and strides[0] != 1:
            return last[soma.dim()]
    return torch.contiguous_format


def product_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    wants_x: bool,
    wants_weight: bool,
    into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Differentiate `reference.product`: one GEMM or convolution for each that is wanted.

    Args:
        grad: the error at the product, as it came.
        x: as there.
        weight: likewise, dtype of `x`.
        geometry: the form of the op.
        wants_x: whether to return the gradient of `x`.
        wants_weight: whether to return that of `weight`.
        into: where the gradient of `x` is written, of its shape and dense, or None.
    """
    if not wants_x and not wants_weight:
        return None, None
    if geometry.spatial == 0:
        rows, neurons, inputs = math.prod(x.shape[:-1]), *weight.shape
        flat, of_x = grad.reshape(rows, neurons), None
        if wants_x:
            out = flat.new_empty(x.shape) if into is None else into
            torch.mm(flat, weight, out=out.view(rows, inputs))
            of_x = out
        return of_x, flat.t() @ x.reshape(rows, inputs) if wants_weight else None
    batched = x.dim() == geometry.spatial + 2
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad if batched else grad[None],
        x if batched else x[None],
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.transposed,
        geometry.output_padding or (0,) * geometry.spatial,
        geometry.groups,
        (wants_x, wants_weight, False),
    )
    of_x = None
    if wants_x:
        of_x = grad_x if batched else grad_x[0]
        of_x = of_x if into is None else into.copy_(of_x)
    return of_x, grad_weight if wants_weight else None


def plain_cascade_gradient(
    grad: Tensor,
    z: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    frozen: int,
    sums: bool,
) -> tuple[Tensor, Tensor]:
    """Do what `cascade_gradient.cascade_gradient` does, in plain torch on any device."""
    wide, axis = reference.accumulation_dtype(grad.dtype), geometry.channel_axis
    count, neurons = to_soma.shape
    stacked = _preactivations(z, bias, count, geometry)
    links, older = (
        reference.per_channel(t.to(wide), grad.dim(), geometry) for t in (to_soma, to_dendrite)
    )
    g, a, slopes = grad.to(wide), [], []
    for d in range(count):
        z_d = stacked[d]
        for e in range(d):
            z_d = z_d + older[d, e] * a[e]
        a.append(activate(activation, z_d))
        slopes.append(activation_derivative(activation, z_d))
    dz: dict[int, Tensor] = {}
    for d in reversed(range(frozen, count)):
        error = links[d] * g
        for k in range(d + 1, count):
            error = error + older[k, d] * dz[k]
        dz[d] = error * slopes[d]
    learned = torch.stack([dz[d] for d in range(frozen, count)])
    flat = reference.flatten_stack(learned.to(grad.dtype), axis, geometry.groups)
    if not sums:
        return flat, g.new_empty((0, neurons))
    rows = g.new_zeros((2 * count + count * count, neurons))
    rows[:count] = reference.sum_positions(torch.stack([g * a_d for a_d in a]), axis)
    rows[count + frozen : 2 * count] = reference.sum_positions(learned, axis)
    for d in range(max(frozen, 1), count):
        at = 2 * count + d * count
        products = torch.stack([dz[d] * a[e] for e in range(d)])
        rows[at : at + d] = reference.sum_positions(products, axis)
    return flat, rows


def _problem(soma: Tensor, weight: Tensor, geometry: Geometry) -> Problem:
    """Describe a site to `strategy.choose` without its geometry, which only libraries see here."""
    return dataclasses.replace(problem_of(soma, weight, geometry), geometry=LINEAR)


def _operand(x: Tensor, geometry: Geometry) -> Tensor:
    """Lay out the input of a product as a library's fast kernels want it."""
    nhwc = _nhwc(x, x.shape, geometry)
    return x.contiguous(memory_format=torch.channels_last) if nhwc else x


def _nhwc(like: Tensor, x: Sequence[int], geometry: Geometry) -> bool:
    """Return whether products are better in NHWC, given a tensor of their dtype and device."""
    known = like.is_cuda and not geometry.transposed
    return known and prefers_nhwc(x, like.element_size(), geometry)


def _preactivations(z: Tensor, bias: Tensor | None, count: int, geometry: Geometry) -> Tensor:
    """Take a product apart and add the bias: `(D, *soma)`, wide."""
    axis, wide = geometry.channel_axis, reference.accumulation_dtype(z.dtype)
    neurons = z.shape[axis] // count
    stacked = reference.unflatten_stack(z, axis, geometry.groups, count, neurons).to(wide)
    if bias is None:
        return stacked
    return stacked + reference.per_channel(bias.to(wide), z.dim(), geometry)


def _added(weights: list[Tensor | None]) -> Tensor:
    """Add the parts of a weight's gradient as a single product would: wide."""
    found = [weight for weight in weights if weight is not None]
    wide = reference.accumulation_dtype(found[0].dtype)
    total = found[0].to(wide)
    for weight in found[1:]:
        total = total + weight
    return total.to(found[0].dtype)
