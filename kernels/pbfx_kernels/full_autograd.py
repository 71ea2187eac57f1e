"""`full_dendrites` for autograd: in eager mode without the dispatcher, and twice differentiated.

A graph holds `pbfx::full_dendrites`. Eager code needs no node, so there an `autograd.Function` does
the same work, and Python crosses the dispatcher twice less per site and step. Under `create_graph`
both compute their gradients by the reference, whose own derivatives autograd knows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pbfx_kernels import reference
from pbfx_kernels.candidate_autograd import no_autocast
from pbfx_kernels.errors import ArgumentError
from pbfx_kernels.full_gradient import differentiate_full, evaluate_full
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.ops import laid_out, strides_of
from pbfx_kernels.tape import Taped, float32_precision
from pbfx_kernels.validation import check_dendrites, check_once


def apply(
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
) -> tuple[Tensor, Tensor]:
    """Do what `pbfx::full_dendrites` does; call it where `candidate_autograd.runs_eagerly` only.

    Args:
        soma: and the rest: as of `full.full_dendrites`.
        x: likewise.
        weight: likewise.
        bias: likewise.
        to_soma: likewise.
        to_dendrite: likewise.
        activation: likewise.
        geometry: likewise.
        frozen: likewise.
        keep: likewise.

    Raises:
        ArgumentError: shapes, dtypes, devices or names do not fit.
    """
    tensors = soma, x, weight, bias, to_soma, to_dendrite
    return _cxx_apply(*tensors, activation, geometry, frozen, keep)


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
    links = weight, bias, to_soma, to_dendrite
    check_once(check_full, (soma, x, *links), activation, geometry, frozen)
    with no_autocast(soma):
        out, activations, z = evaluate_full(soma, x, *links, activation, geometry, keep)
    # What follows rounds by the layout that it finds: the soma's, without gaps.
    return laid_out(out, strides_of(soma)), activations, z


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    links = weight, bias, to_soma, to_dendrite, activation
    with no_autocast(grad):
        return differentiate_full(grad, z, x, *links, geometry, frozen, wants)


_evaluated, _differentiated = Taped(_evaluate), Taped(_differentiate)


class _FullDendrites(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> tuple[Tensor, Tensor]:
        tensors, precision = (x, weight, bias, to_soma, to_dendrite), float32_precision(soma)
        out, activations, z = _evaluated(
            (soma, *tensors), activation, geometry, frozen, keep, precision
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(activations)
        if any(ctx.needs_input_grad[1:]):
            ctx.save_for_backward(z, *tensors)
            ctx.form = activation, geometry, frozen
        return out, activations

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, wanted = grads[0], ctx.needs_input_grad[1:6]
        if grad is None or not any(wanted):
            return grad, *(None,) * 9
        z, x, weight, bias, to_soma, to_dendrite = ctx.saved_tensors
        tensors = x, weight, bias, to_soma, to_dendrite
        activation, geometry, frozen = ctx.form
        if torch.is_grad_enabled():
            again = differentiable(grad, tensors, activation, geometry, frozen, wanted)
            return grad, *again, *(None,) * 4
        wants = wanted[0], wanted[1], any(wanted[2:])
        found = _differentiated((grad, z, *tensors), *ctx.form, wants, float32_precision(grad))
        return grad, *learned(tensors, found, wanted), *(None,) * 4


# The C++ half of `Function.apply`; the Python half looks for function transforms once more.
_cxx_apply: Any = super(torch.autograd.Function, _FullDendrites).apply  # pyright: ignore[reportAttributeAccessIssue]


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
