"""The ops of sites whose dendrites learn by backpropagation.

    pbfx::full_dendrites             out, a, z = soma + Σ_d T_d ⊙ a_d, (D, *soma), V x
    pbfx::full_dendrites_backward    dx, dV, and dT, dc, dU in one tensor

They are what `pbfx::dendrites` is with the true gradient: the error goes on through the dendrites
to what they read, and everything they are made of learns, but for the weights of the oldest
`frozen`. Whoever does not want an error to reach the input detaches it. `z` is for the backward
alone. The backward is an op of its own, so that graphs hold it. Eager mode does without them:
`full_autograd`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pbfx_kernels import reference
from pbfx_kernels.candidate_autograd import no_autocast
from pbfx_kernels.full_autograd import check_full, differentiable, learned
from pbfx_kernels.full_gradient import (
    differentiate_full,
    evaluate_full,
    saved_format,
    saved_shape,
)
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.ops import geometry_of, laid_out, stack_strides, strides_of
from pbfx_kernels.registering import op
from pbfx_kernels.tape import Taped, float32_precision


@op("full_dendrites")
def full_dendrites_op(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    frozen: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Match `reference.dendrites`; arguments and errors are those of `pbfx_kernels.full_dendrites`.

    Without `keep`, the activations that come back are `(0, *soma)`.
    """
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    tensors = soma, x, weight, bias, to_soma, to_dendrite
    return _evaluated(tensors, activation, geometry, frozen, keep, float32_precision(soma))


def _evaluate(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    frozen: int,
    keep: bool,
    _: object,
) -> tuple[Tensor, Tensor, Tensor]:
    links = weight, bias, to_soma, to_dendrite, activation
    check_full(soma, x, *links, geometry, frozen)
    with no_autocast(soma):
        out, activations, z = evaluate_full(soma, x, *links, geometry, keep)
    return (
        laid_out(out, strides_of(soma)),
        laid_out(activations, stack_strides(soma)),
        laid_out(z, _saved(soma, x, len(to_soma), geometry, "meta").stride()),
    )


_evaluated = Taped(_evaluate)


@full_dendrites_op.register_fake
def _(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    frozen: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    check_full(soma, x, weight, bias, to_soma, to_dendrite, activation, geometry, frozen)
    count = weight.shape[0]
    kept = (count if keep else 0, *soma.shape)
    return (
        torch.empty_like(soma),
        soma.new_empty_strided(kept, stack_strides(soma)),
        _saved(soma, x, count, geometry, soma.device),
    )


@op("full_dendrites_backward")
def full_dendrites_backward_op(
    grad: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    frozen: int,
    wants_x: bool,
    wants_weight: bool,
    wants_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `pbfx::full_dendrites`; see `full_gradient.differentiate_full`.

    What is not wanted is empty, `(0,)`.
    """
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    tensors = grad, z, x, weight, bias, to_soma, to_dendrite
    wants = wants_x, wants_weight, wants_sums
    return _differentiated(tensors, activation, geometry, frozen, wants, float32_precision(grad))


def _differentiate(
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
    _: object,
) -> tuple[Tensor, Tensor, Tensor]:
    links = weight, bias, to_soma, to_dendrite, activation, geometry, frozen
    with no_autocast(grad):
        grad_x, grad_weight, sums = differentiate_full(grad, z, x, *links, wants)
    return (
        grad.new_empty(0) if grad_x is None else laid_out(grad_x, strides_of(x)),
        # The layout of a convolution's weight gradient depends on the backend; the fake promises a
        # contiguous one.
        grad.new_empty(0) if grad_weight is None else grad_weight.contiguous(),
        _no_sums(grad) if sums is None else sums,
    )


_differentiated = Taped(_differentiate)


@full_dendrites_backward_op.register_fake
def _(
    grad: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    frozen: int,
    wants_x: bool,
    wants_weight: bool,
    wants_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count, neurons = to_soma.shape
    nothing = _no_sums(grad)
    return (
        torch.empty_like(x, dtype=grad.dtype) if wants_x else grad.new_empty(0),
        grad.new_empty(weight.shape) if wants_weight else grad.new_empty(0),
        nothing.new_empty((2 * count + count * count, neurons)) if wants_sums else nothing,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, x, weight, bias, to_soma, to_dendrite, *form, frozen, _ = inputs
    _, activations, z = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(activations, z)
    ctx.save_for_backward(z, x, weight, bias, to_soma, to_dendrite)
    ctx.form, ctx.frozen = tuple(form), frozen


def _gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad[1:6]
    if grad is None or not any(wanted):
        return grad, *(None,) * 14
    z, *tensors = ctx.saved_tensors
    if torch.is_grad_enabled():
        activation, *form = ctx.form
        site = activation, geometry_of(*form), ctx.frozen
        return grad, *differentiable(grad, tensors, *site, wanted), *(None,) * 9
    found = torch.ops.pbfx.full_dendrites_backward.default(
        grad, z, *tensors, *ctx.form, ctx.frozen, *wanted[:2], any(wanted[2:])
    )
    return grad, *learned(tensors, found, wanted), *(None,) * 9


full_dendrites_op.register_autograd(_gradients, setup_context=_setup)


def _saved(
    soma: Tensor, x: Tensor, dendrites: int, geometry: Geometry, device: torch.device | str
) -> Tensor:
    """Return an empty tensor as the saved product is laid out."""
    return torch.empty(
        saved_shape(soma.shape, dendrites, geometry),
        dtype=soma.dtype,
        device=device,
        memory_format=saved_format(soma, x, geometry),
    )


def _no_sums(grad: Tensor) -> Tensor:
    return grad.new_empty(0, dtype=reference.accumulation_dtype(grad.dtype))
