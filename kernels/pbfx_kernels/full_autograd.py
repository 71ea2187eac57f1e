"""`full_dendrites` for autograd: what it saves, its gradient, and eager mode; see `once`.

Under `create_graph` gradients are computed by the reference, whose own derivatives autograd knows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pbfx_kernels import reference
from pbfx_kernels.candidate_autograd import no_autocast
from pbfx_kernels.errors import ArgumentError
from pbfx_kernels.full_gradient import (
    differentiate_full,
    evaluate_full,
    saved_format,
    saved_shape,
)
from pbfx_kernels.geometry import Geometry, arguments_of
from pbfx_kernels.layout import laid_out, stack_strides, strides_of
from pbfx_kernels.once import in_eager_mode
from pbfx_kernels.tape import Taped, float32_precision
from pbfx_kernels.validation import check_dendrites, check_once


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
    promised: bool,
    _: object,
) -> tuple[Tensor, Tensor, Tensor]:
    links = weight, bias, to_soma, to_dendrite
    check_once(check_full, (soma, x, *links), activation, geometry, frozen)
    with no_autocast(soma):
        out, activations, z = evaluate_full(soma, x, *links, activation, geometry, keep)
    # What follows rounds by the layout that it finds: the soma's, without gaps.
    out = laid_out(out, strides_of(soma))
    if promised:
        activations = laid_out(activations, stack_strides(soma))
        z = laid_out(z, saved_like(soma, x, len(to_soma), geometry, "meta").stride())
    return out, activations, z


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
    promised: bool,
    _: object,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    links = weight, bias, to_soma, to_dendrite, activation, geometry, frozen
    with no_autocast(grad):
        grad_x, grad_weight, sums = differentiate_full(grad, z, x, *links, wants)
    if not promised:
        return grad_x, grad_weight, sums
    return (
        grad.new_empty(0) if grad_x is None else laid_out(grad_x, strides_of(x)),
        # The layout of a convolution's weight gradient depends on the backend; the fake promises a
        # contiguous one.
        grad.new_empty(0) if grad_weight is None else grad_weight.contiguous(),
        no_sums(grad) if sums is None else sums,
    )


evaluated, differentiated = Taped(_evaluate), Taped(_differentiate)


def remember(
    ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], learns: Sequence[bool]
) -> None:
    """Save what `differentiate` needs, of the inputs of `evaluate`."""
    _, *tensors, activation, geometry, frozen, _ = inputs
    ctx.wanted = tuple(learns[1:6])
    if any(ctx.wanted):
        ctx.save_for_backward(outputs[2], *tensors)
        ctx.form = activation, geometry, frozen


def differentiate(ctx: Any, grad: Tensor | None, by_ops: bool) -> tuple[Tensor | None, ...]:
    """Return the gradients of all tensors; arguments as of `once.Differentiate`."""
    if grad is None or not any(ctx.wanted):
        return (grad,)
    z, *tensors = ctx.saved_tensors
    if torch.is_grad_enabled():
        activation, geometry, frozen = ctx.form
        again = differentiable(grad, tensors, activation, geometry, frozen, ctx.wanted)
        return grad, *again
    wants = ctx.wanted[0], ctx.wanted[1], any(ctx.wanted[2:])
    if by_ops:
        activation, geometry, frozen = ctx.form
        form = activation, *arguments_of(geometry), frozen
        found = torch.ops.pbfx.full_dendrites_backward.default(grad, z, *tensors, *form, *wants)
    else:
        rest = *ctx.form, wants, False, float32_precision(grad)
        found = differentiated((grad, z, *tensors), *rest)
    return grad, *learned(tensors, found, ctx.wanted)


def _evaluate_eagerly(soma: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return evaluated((soma, *inputs[:5]), *inputs[5:], False, float32_precision(soma))


apply = in_eager_mode("_FullDendrites", _evaluate_eagerly, remember, differentiate)


def learned(
    tensors: Sequence[Tensor | None],
    found: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Take the results of a backward apart, and cast each as autograd wants it.

    Args:
        tensors: x, weight, bias, to_soma and to_dendrite.
        found: dx, dV, and dT, dc and dU in one tensor.
        wanted: for which of `tensors` there is a gradient.
    """
    (grad_x, grad_weight, sums), to_dendrite = found, tensors[4]
    gradients: list[Tensor | None] = [grad_x, grad_weight, None, None, None]
    if sums is not None and to_dendrite is not None and any(wanted[2:]):
        count = to_dendrite.shape[0]
        gradients[3], gradients[2], links = sums.split((count, count, count * count))
        gradients[4] = links.view_as(to_dendrite)
    return [
        gradient.to(tensor.dtype) if want and gradient is not None and tensor is not None else None
        for tensor, gradient, want in zip(tensors, gradients, wanted, strict=True)
    ]


def differentiable(
    grad: Tensor,
    tensors: Sequence[Tensor | None],
    activation: str,
    geometry: Geometry,
    frozen: int,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of what is wanted as functions that autograd can differentiate."""
    x, weight, bias, to_soma, to_dendrite = tensors
    assert x is not None
    assert weight is not None
    assert to_soma is not None
    assert to_dendrite is not None
    links = weight, bias, to_soma, to_dendrite, activation, geometry, frozen
    learners = [t for t, want in zip(tensors, wanted, strict=True) if want and t is not None]
    with no_autocast(grad):
        # The gradient of the soma is the error, whatever the soma is.
        out, _ = full_reference(torch.zeros_like(grad), x, *links)
        gradients = torch.autograd.grad(
            out, learners, grad, create_graph=True, allow_unused=True, materialize_grads=True
        )
    found = iter(gradients)
    return [next(found) if want else None for want in wanted]


def full_reference(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    frozen: int,
) -> tuple[Tensor, Tensor]:
    """Return `reference.dendrites` of dendrites of which the oldest `frozen` do not learn."""
    if frozen:
        weight, to_dendrite = _newer_learn(weight, frozen), _newer_learn(to_dendrite, frozen)
        bias = None if bias is None else _newer_learn(bias, frozen)
    return reference.dendrites(soma, x, weight, bias, to_soma, to_dendrite, activation, geometry)


def _newer_learn(stack: Tensor, frozen: int) -> Tensor:
    return torch.cat([stack[:frozen].detach(), stack[frozen:]])


def check_full(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    frozen: int,
) -> None:
    """Check the arguments of `pbfx::full_dendrites`.

    Raises:
        ArgumentError: names every argument that does not fit, with what was expected and what was
            got.
    """
    check_dendrites(soma, x, weight, bias, to_soma, to_dendrite, activation, geometry)
    if not 0 <= frozen <= weight.shape[0]:
        fault = f"frozen: expected 0 to D = {weight.shape[0]} dendrites, got {frozen}"
        raise ArgumentError("pbfx::full_dendrites", [fault])


def saved_like(
    soma: Tensor, x: Tensor, dendrites: int, geometry: Geometry, device: torch.device | str
) -> Tensor:
    """Return an empty tensor as the saved product is laid out."""
    return torch.empty(
        saved_shape(soma.shape, dendrites, geometry),
        dtype=soma.dtype,
        device=device,
        memory_format=saved_format(soma, x, geometry),
    )


def no_sums(grad: Tensor) -> Tensor:
    """Return what stands for sums that nobody wants."""
    return grad.new_empty(0, dtype=reference.accumulation_dtype(grad.dtype))
