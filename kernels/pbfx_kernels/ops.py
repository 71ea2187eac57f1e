"""The custom ops: what a graph holds, and what a kernel replaces.

    pbfx::dendrites, ...               see `dendrite_op`
    pbfx::candidates                   out, z = neuron, (C, *neuron)
    pbfx::candidates_backward          dV, and the sums that `pbfx_kernels.moments` takes apart
    pbfx::candidate_preactivations     z alone, for graphs that are past autograd

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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import pbfx_kernels.dendrite_op  # noqa: F401  registers its ops
from pbfx_kernels import candidate_autograd, reference
from pbfx_kernels.candidate_autograd import no_autocast
from pbfx_kernels.geometry import Geometry, geometry_of
from pbfx_kernels.layout import laid_out, stack_strides
from pbfx_kernels.moments import ROWS, parted
from pbfx_kernels.registering import op
from pbfx_kernels.validation import check_candidates


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
    tensors = neuron, x, activations, weight, bias, to_dendrite
    # An op may not return its input, so the neuron's output is copied.
    return torch.empty_like(neuron).copy_(neuron), _preactivate(*tensors, geometry)


def _preactivate(
    neuron: Tensor,
    x: Tensor,
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    geometry: Geometry,
) -> Tensor:
    """Compute z, laid out as `neuron` is."""
    with no_autocast(neuron):
        z = candidate_autograd.preactivate(
            x, activations.to(neuron.dtype), weight, bias, to_dendrite, geometry
        )
    return laid_out(z, stack_strides(neuron))


def _new_pool(neuron: Tensor, weight: Tensor) -> Tensor:
    """Return memory for the preactivations of candidates with this weight."""
    return neuron.new_empty_strided((weight.shape[0], *neuron.shape), stack_strides(neuron))


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
    return torch.empty_like(neuron), _new_pool(neuron, weight)


@op("candidate_preactivations")
def candidate_preactivations_op(
    neuron: Tensor,
    x: Tensor,
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Tensor:
    """Compute the second result of `pbfx::candidates`, which has checked the arguments."""
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    return _preactivate(neuron, x, activations, weight, bias, to_dendrite, geometry)


@candidate_preactivations_op.register_fake
def _(
    neuron: Tensor,
    x: Tensor,
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Tensor:
    return _new_pool(neuron, weight)


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
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute what `candidate_autograd.differentiate` does, dense and contiguous."""
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    with no_autocast(grad):
        weight, sums = candidate_autograd.differentiate(
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
    return weight.to(weight_dtype).contiguous(), sums


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
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    neurons = geometry_of(stride, padding, dilation, groups, transposed, output_padding).neurons(
        weight_shape[1:]
    )
    rows = weight_shape[0] * (ROWS + activations.shape[0])
    weight = z.new_empty(weight_shape, dtype=weight_dtype)
    return weight, z.new_empty((rows, neurons), dtype=reference.accumulation_dtype(z.dtype))


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
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.form = inputs[10:]
        # In the order of the gradients.
        ctx.dtypes = [
            None if learner is None else learner.dtype
            for learner in (weight, bias, to_dendrite, moments)
        ]


def _candidates_gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    learned: list[Tensor | None] = [None] * 4
    if ctx.learns and grad is not None:
        grad_weight, sums = torch.ops.pbfx.candidates_backward.default(
            grad, *ctx.saved_tensors, ctx.weight_shape, *ctx.form, ctx.weight_dtype
        )
        gradients = grad_weight, *parted(sums, len(grad_weight))
        learned = [
            None if dtype is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
    return grad, None, None, *learned, *(None,) * 10


candidates_op.register_autograd(_candidates_gradients, setup_context=_candidates_setup)
