"""The ops of dendrites in the neuron phase, beside a soma that somebody else computes.

    pbfx::dendrites              out, a = soma + Σ_d T_d ⊙ a_d, (D, *soma)
    pbfx::dendrites_backward     dT, from a
    pbfx::dendrites_recompute    dT, from the inputs of the forward

Perforated: no error reaches the input of a dendrite. See `ops` for why they are ops, and backwards
too; which kernels run inside is for `pbfx_kernels.strategy` to say.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pbfx_kernels import reference
from pbfx_kernels.candidate_autograd import no_autocast
from pbfx_kernels.dispatch import (
    evaluate_dendrites,
    recompute_to_soma_gradient,
    sum_to_soma_gradient,
)
from pbfx_kernels.geometry import Geometry, arguments_of, geometry_of, with_geometry
from pbfx_kernels.layout import laid_out, stack_strides, strides_of
from pbfx_kernels.once import in_graphs
from pbfx_kernels.registering import op
from pbfx_kernels.tape import Taped, float32_precision
from pbfx_kernels.validation import check_dendrites, check_once


@op("dendrites")
def dendrites_op(
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
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Match `reference.dendrites`; arguments and errors are those of `pbfx_kernels.dendrites`.

    Without `keep`, the activations that come back are `(0, *soma)`.
    """
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    return evaluate(soma, x, weight, bias, to_soma, to_dendrite, activation, geometry, keep)


def evaluate(
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
    """Do what the op does."""
    tensors = soma, x, weight, bias, to_soma, to_dendrite
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
    strides = soma.stride() if soma.is_contiguous() else strides_of(soma)
    return laid_out(out, strides), laid_out(activations, (soma.numel(), *strides))


_evaluated = Taped(_evaluate)


@dendrites_op.register_fake
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
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    check_dendrites(soma, x, weight, bias, to_soma, to_dendrite, activation, geometry)
    count = weight.shape[0] if keep else 0
    activations = soma.new_empty_strided((count, *soma.shape), stack_strides(soma))
    return torch.empty_like(soma), activations


@op("dendrites_backward")
def dendrites_backward_op(grad: Tensor, activations: Tensor, channel_axis: int) -> Tensor:
    """Match `reference.dendrites_backward`."""
    return _summed((grad, activations), channel_axis)


def _sum(grad: Tensor, activations: Tensor, channel_axis: int) -> Tensor:
    with no_autocast(grad):
        return sum_to_soma_gradient(grad, activations, channel_axis)


_summed = Taped(_sum)


@dendrites_backward_op.register_fake
def _(grad: Tensor, activations: Tensor, channel_axis: int) -> Tensor:
    shape = (activations.shape[0], grad.shape[channel_axis])
    return grad.new_empty(shape, dtype=reference.accumulation_dtype(grad.dtype))


@op("dendrites_recompute")
def dendrites_recompute_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Tensor:
    """Match `reference.dendrites_backward` on the activations of `reference.dendrites`."""
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    tensors = grad, x, weight, bias, to_dendrite
    return _summed_again(tensors, activation, geometry, float32_precision(grad))


def _sum_again(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    _: object,
) -> Tensor:
    with no_autocast(grad):
        return recompute_to_soma_gradient(grad, x, weight, bias, to_dendrite, activation, geometry)


_summed_again = Taped(_sum_again)


@dendrites_recompute_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Tensor:
    return grad.new_empty(to_dendrite.shape[1:], dtype=reference.accumulation_dtype(grad.dtype))


def remember(
    ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], learns: Sequence[bool]
) -> None:
    """Save what `differentiate` needs, of the inputs of `evaluate`."""
    _, x, weight, bias, to_soma, to_dendrite, activation, geometry, keep = inputs
    ctx.learns = learns[4]
    if not ctx.learns:
        return
    ctx.kept, ctx.dtype, ctx.activation, ctx.geometry = keep, to_soma.dtype, activation, geometry
    ctx.save_for_backward(*(outputs[1:] if keep else (x, weight, bias, to_dendrite)))


def differentiate(ctx: Any, grad: Tensor | None, by_ops: bool) -> tuple[Tensor | None, ...]:
    """Return the gradients of soma and links; arguments as of `once.Differentiate`."""
    if grad is None or not ctx.learns:
        return (grad,)
    geometry, tensors, ops = ctx.geometry, (grad, *ctx.saved_tensors), torch.ops.pbfx
    if ctx.kept:
        axis = geometry.channel_axis
        links = ops.dendrites_backward.default(*tensors, axis) if by_ops else _summed(tensors, axis)
    elif by_ops:
        form = ctx.activation, *arguments_of(geometry)
        links = ops.dendrites_recompute.default(*tensors, *form)
    else:
        links = _summed_again(tensors, ctx.activation, geometry, float32_precision(grad))
    return grad, None, None, None, links.to(ctx.dtype)


in_graphs(dendrites_op, remember, differentiate, with_geometry)
