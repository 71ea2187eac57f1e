"""The custom ops: what a graph holds, and what a kernel replaces.

    pbfx::dendrites              out, a = soma + Σ_d T_d ⊙ a_d, (D, *soma)
    pbfx::dendrites_backward     dT, from a
    pbfx::dendrites_recompute    dT, from the inputs of the forward
    pbfx::candidates             out, z = neuron, (C, *neuron)
    pbfx::candidates_backward    dV, dc, dU, the batch moments

They are custom ops and not `autograd.Function`s, since a symbolic trace goes *into* a Function and
loses its backward; an op stays one node through symbolic_trace, Dynamo, AOTAutograd and inductor.
Backwards are ops of their own, for the same reason. Which kernels run inside is for
`pbfx_kernels.strategy` to say, and for `candidate_autograd` where candidates are concerned.

The backwards are deliberately not the derivatives of the forwards: no error reaches the input of a
dendrite (perforated backpropagation), and a candidate, which feeds nothing, learns from the error
that passes by. `candidates` hands back its input so that it lies on the path of that error:
dead-code elimination cannot drop it, and it works with a frozen base. Its statistics leave as the
"gradient" of a `moments` parameter, so the graph needs no mutation and data-parallel training
averages them.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pbfx_kernels import candidate_autograd, reference
from pbfx_kernels.candidate_autograd import no_autocast as _no_autocast
from pbfx_kernels.dispatch import (
    evaluate_dendrites,
    recompute_to_soma_gradient,
    sum_to_soma_gradient,
)
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.registering import op
from pbfx_kernels.tape import Taped, float32_precision
from pbfx_kernels.validation import check_candidates, check_dendrites
from pbfx_kernels.walking import REMEMBERED


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
    check_dendrites(soma, x, *links, geometry)
    with _no_autocast(soma):
        out, activations = evaluate_dendrites(soma, x, *links, geometry, keep)
    return laid_out(out, strides_of(soma)), laid_out(activations, stack_strides(soma))


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
    return sum_links((grad, activations), channel_axis)


def _sum(grad: Tensor, activations: Tensor, channel_axis: int) -> Tensor:
    with _no_autocast(grad):
        return sum_to_soma_gradient(grad, activations, channel_axis)


sum_links = Taped(_sum)


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
    return sum_links_again(tensors, activation, geometry, float32_precision(grad))


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
    with _no_autocast(grad):
        return recompute_to_soma_gradient(grad, x, weight, bias, to_dendrite, activation, geometry)


sum_links_again = Taped(_sum_again)


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


def _dendrites_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, weight, bias, to_soma, to_dendrite, activation, *form, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.learns = to_soma.requires_grad
    if not ctx.learns:
        return
    ctx.kept, ctx.to_soma_dtype = keep, to_soma.dtype
    if keep:
        ctx.save_for_backward(output[1])
        ctx.channel_axis = -(len(form[0]) + 1)
    else:
        ctx.save_for_backward(x, weight, bias, to_dendrite)
        ctx.form = activation, *form


def _dendrites_gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    grad_to_soma = None
    if ctx.learns and grad is not None:
        if ctx.kept:
            (activations,) = ctx.saved_tensors
            grad_to_soma = torch.ops.pbfx.dendrites_backward.default(
                grad, activations, ctx.channel_axis
            )
        else:
            grad_to_soma = torch.ops.pbfx.dendrites_recompute.default(
                grad, *ctx.saved_tensors, *ctx.form
            )
        grad_to_soma = grad_to_soma.to(ctx.to_soma_dtype)
    return grad, None, None, None, grad_to_soma, *(None,) * 9


dendrites_op.register_autograd(_dendrites_gradients, setup_context=_dendrites_setup)


@op("candidates")
def candidates_op(
    neuron: Tensor,
    x: Tensor,
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    moments: Tensor,
    direction: Tensor,
    error_mean: Tensor,
    regression: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Copy `neuron` and compute `reference.candidate_preactivations`; see `candidate_autograd`."""
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    check_candidates(
        neuron,
        x,
        activations,
        weight,
        bias,
        to_dendrite,
        moments,
        direction,
        error_mean,
        regression,
        activation,
        geometry,
    )
    with _no_autocast(neuron):
        z = candidate_autograd.preactivate(
            x, activations.to(neuron.dtype), weight, bias, to_dendrite, geometry
        )
    # An op may not return its input, so the neuron's output is copied.
    return torch.empty_like(neuron).copy_(neuron), laid_out(z, stack_strides(neuron))


@candidates_op.register_fake
def _(
    neuron: Tensor,
    x: Tensor,
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    moments: Tensor,
    direction: Tensor,
    error_mean: Tensor,
    regression: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    check_candidates(
        neuron,
        x,
        activations,
        weight,
        bias,
        to_dendrite,
        moments,
        direction,
        error_mean,
        regression,
        activation,
        geometry,
    )
    z = neuron.new_empty_strided((weight.shape[0], *neuron.shape), stack_strides(neuron))
    return torch.empty_like(neuron), z


@op("candidates_backward")
def candidates_backward_op(
    grad: Tensor,
    z: Tensor,
    x: Tensor,
    activations: Tensor,
    direction: Tensor,
    error_mean: Tensor,
    regression: Tensor | None,
    weight_shape: Sequence[int],
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `reference.candidates_backward`; gradients are dense and contiguous."""
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    with _no_autocast(grad):
        grad_weight, bias, to_dendrite, moments = candidate_autograd.differentiate(
            grad,
            z,
            x,
            activations,
            direction,
            error_mean,
            regression,
            weight_shape,
            activation,
            geometry,
        )
    # The layout of a convolution's weight gradient depends on the backend; the fake promises a
    # contiguous one.
    grad_weight = grad_weight.to(reference.accumulation_dtype(z.dtype)).contiguous()
    if candidate_autograd.fused(z):
        # Parts of one buffer, and what an op returns must not overlap.
        bias, to_dendrite, moments = bias.clone(), to_dendrite.clone(), moments.clone()
    return grad_weight, bias, to_dendrite, moments


@candidates_backward_op.register_fake
def _(
    grad: Tensor,
    z: Tensor,
    x: Tensor,
    activations: Tensor,
    direction: Tensor,
    error_mean: Tensor,
    regression: Tensor | None,
    weight_shape: Sequence[int],
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = weight_shape[0]
    n = geometry_of(stride, padding, dilation, groups, transposed, output_padding).neurons(
        weight_shape[1:]
    )
    shapes = (weight_shape, (c, n), (c, activations.shape[0], n), (6 * c, n))
    dtype = reference.accumulation_dtype(z.dtype)
    weight, bias, to_dendrite, moments = (z.new_empty(shape, dtype=dtype) for shape in shapes)
    return weight, bias, to_dendrite, moments


def _candidates_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, activations, weight, bias, to_dendrite, moments, *steering = inputs[:10]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.learns = any(
        learner is not None and learner.requires_grad
        for learner in (weight, bias, to_dendrite, moments)
    )
    if ctx.learns:
        ctx.save_for_backward(output[1], x, activations, *steering)
        ctx.weight_shape = weight.shape
        ctx.form = inputs[10:]
        # In the order of the gradients.
        ctx.dtypes = [
            None if learner is None else learner.dtype
            for learner in (weight, bias, to_dendrite, moments)
        ]


def _candidates_gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    learned: list[Tensor | None] = [None] * 4
    if ctx.learns and grad is not None:
        gradients = torch.ops.pbfx.candidates_backward.default(
            grad, *ctx.saved_tensors, ctx.weight_shape, *ctx.form
        )
        learned = [
            None if dtype is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
    return grad, None, None, *learned, *(None,) * 10


candidates_op.register_autograd(_candidates_gradients, setup_context=_candidates_setup)


def geometry_of(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Geometry:
    """Put the arguments of an op together."""
    form = tuple(stride), tuple(padding), tuple(dilation)
    return _geometry(*form, groups, transposed, tuple(output_padding))


_geometry = functools.lru_cache(REMEMBERED)(Geometry)


def strides_of(soma: Tensor) -> tuple[int, ...]:
    """Return the strides of `empty_like(soma)`: channels-last stays so, gaps and overlaps close."""
    return torch.empty_like(soma, device="meta").stride()


def stack_strides(soma: Tensor) -> tuple[int, ...]:
    """Return the strides of `(D, *soma)` whose every slice is laid out as `empty_like(soma)`."""
    return (soma.numel(), *strides_of(soma))


def laid_out(result: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Copy a result where it does not have the strides that the fake promised."""
    if result.stride() == strides:
        return result
    if all(
        size == 1 or found == promised
        for size, found, promised in zip(result.shape, result.stride(), strides, strict=True)
    ):
        # The same elements in the same places.
        return result.as_strided(result.shape, strides)
    return result.new_empty_strided(result.shape, strides).copy_(result)
