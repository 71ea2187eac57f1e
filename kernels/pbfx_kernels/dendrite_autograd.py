"""`pbfx::dendrites` in eager mode, without the dispatcher.

A graph holds the op. Eager code needs no node, so there an `autograd.Function` does the same work,
and Python crosses the dispatcher four times less per site and step, which is most of what a small
batch costs. Both call `evaluate_dendrites`, which chooses the kernels.
"""

from typing import Any

import torch
from torch import Tensor

from pbfx_kernels.candidate_autograd import no_autocast
from pbfx_kernels.dispatch import evaluate_dendrites
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.layout import stack_like
from pbfx_kernels.ops import sum_links, sum_links_again
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
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Do what `pbfx::dendrites` does; call it where `candidate_autograd.runs_eagerly` only.

    Args:
        soma: and the rest: as of the op.
        x: likewise.
        weight: likewise.
        bias: likewise.
        to_soma: likewise.
        to_dendrite: likewise.
        activation: likewise.
        geometry: likewise.
        keep: likewise.

    Raises:
        ArgumentError: shapes, dtypes, devices or names do not fit.
    """
    tensors = soma, x, weight, bias, to_soma, to_dendrite
    if torch.is_grad_enabled():
        return _cxx_apply(*tensors, activation, geometry, keep)
    return _evaluated(tensors, activation, geometry, keep, float32_precision(soma))


def _evaluate(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    keep: bool,
    _: object,
) -> tuple[Tensor, Tensor]:
    links = weight, bias, to_soma, to_dendrite, activation
    check_once(check_dendrites, (soma, x, *links[:4]), activation, geometry)
    with no_autocast(soma):
        out, activations = evaluate_dendrites(soma, x, *links, geometry, keep)
    # What follows rounds by the layout that it finds: the soma's, without gaps.
    if out.stride() != soma.stride():
        dense = torch.empty_like(soma)
        if out.stride() != dense.stride():
            out = dense.copy_(out)
    if activations.shape[0] and activations.stride()[1:] != out.stride():
        activations = stack_like(out, activations.shape[0]).copy_(activations)
    return out, activations


_evaluated = Taped(_evaluate)


class _Dendrites(torch.autograd.Function):
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
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = soma, x, weight, bias, to_soma, to_dendrite
        precision = float32_precision(soma)
        out, activations = _evaluated(tensors, activation, geometry, keep, precision)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(activations)
        ctx.learns = ctx.needs_input_grad[4]
        if ctx.learns:
            ctx.kept, ctx.dtype = keep, to_soma.dtype
            ctx.activation, ctx.geometry = activation, geometry
            saved = (activations,) if keep else (x, weight, bias, to_dendrite)
            ctx.save_for_backward(*saved)
        return out, activations

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, links = grads[0], None
        if ctx.learns and grad is not None:
            links = _links_gradient(ctx, grad).to(ctx.dtype)
        return grad, None, None, None, links, *(None,) * 4


def _links_gradient(ctx: Any, grad: Tensor) -> Tensor:
    geometry, axis = ctx.geometry, ctx.geometry.channel_axis
    # Under `create_graph`, an op says that it has no derivative; a kernel would not.
    ops = torch.ops.pbfx if torch.is_grad_enabled() else None
    if ctx.kept:
        (activations,) = ctx.saved_tensors
        if ops is not None:
            return ops.dendrites_backward.default(grad, activations, axis)
        return sum_links((grad, activations), axis)
    x, weight, bias, to_dendrite = ctx.saved_tensors
    if ops is not None:
        dendrites = grad, x, weight, bias, to_dendrite, ctx.activation
        form = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        output = geometry.transposed, geometry.output_padding
        return ops.dendrites_recompute.default(*dendrites, *form, *output)
    tensors = grad, x, weight, bias, to_dendrite
    return sum_links_again(tensors, ctx.activation, geometry, float32_precision(grad))


# The C++ half of `Function.apply`; the Python half looks for function transforms once more.
_cxx_apply: Any = super(torch.autograd.Function, _Dendrites).apply  # pyright: ignore[reportAttributeAccessIssue]
