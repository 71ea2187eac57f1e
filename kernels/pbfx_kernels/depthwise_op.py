"""`pbfx::perforated_depthwise`: a depthwise convolution with its dendrites, soma included.

    out, a = W * x + b + Σ_d T_d ⊙ a_d, (D, *out)

Soma and dendrites come from one read of the input; see `fused_depthwise`. The backward is
perforated as that of `pbfx::dendrites`: the error reaches the soma's parameters, its input and the
links T. It is `pbfx::perforated_depthwise_backward`, or, where it is to be differentiated itself,
torch's ops and `pbfx::dendrites_recompute`; of kept activations, `pbfx::dendrites_backward`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import pbfx_kernels.ops  # noqa: F401  registers the ops that a backward runs
from pbfx_kernels import reference
from pbfx_kernels.candidate_autograd import no_autocast
from pbfx_kernels.depthwise_backward_op import convolution_backward, recompute
from pbfx_kernels.dispatch import evaluate_dendrites
from pbfx_kernels.fallback import or_reference
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.layout import stack_like
from pbfx_kernels.problem import problem_of
from pbfx_kernels.registering import op
from pbfx_kernels.strategy import Strategy, choose
from pbfx_kernels.tape import Taped, float32_precision
from pbfx_kernels.validation import check_dendrites


def runs_depthwise(x: Tensor, weight: Tensor, dendrite_weight: Tensor, geometry: Geometry) -> bool:
    """Return whether the kernel computes this neuron, soma included.

    Args:
        x: `(B, N, *spatial)`, the batch optional, for shape, dtype and device.
        weight: W, `(N, 1, *kernel)`.
        dendrite_weight: V, `(D, N, 1, *kernel)`.
        geometry: the form of the soma.
    """
    if weight.dtype != x.dtype or dendrite_weight.shape[1:] != weight.shape or not x.numel():
        return False
    # The soma has as many neurons as the input has channels, so it is described by that.
    return choose(problem_of(x, dendrite_weight, geometry)) is Strategy.DEPTHWISE


@op("perforated_depthwise")
def perforated_depthwise_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dendrite_weight: Tensor,
    dendrite_bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Match `reference.dendrites` over the soma's convolution.

    Args:
        x: `(B, N, *spatial)`, over one or two dimensions, the batch optional.
        weight: W, `(N, 1, *kernel)`.
        bias: b, `(N,)`, or None.
        dendrite_weight: V, `(D, N, 1, *kernel)`.
        dendrite_bias: c, `(D, N)`, or None.
        to_soma: T, `(D, N)`.
        to_dendrite: U, `(D, D, N)`, strictly lower triangle.
        activation: f, one of `ACTIVATIONS`.
        stride: one step per spatial dimension.
        padding: zeros on both sides, likewise.
        dilation: distance between kernel taps, likewise.
        keep: whether to return the activations, else `(0, *out)`.

    Raises:
        ArgumentError: the dendrites do not fit the soma (see `dendrites`).
    """
    tensors = x, weight, bias, dendrite_weight, dendrite_bias, to_soma, to_dendrite
    form = tuple(stride), tuple(padding), tuple(dilation)
    return _evaluated(tensors, activation, form, keep, float32_precision(x))


def _evaluate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dendrite_weight: Tensor,
    dendrite_bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    form: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    keep: bool,
    _: object,
) -> tuple[Tensor, Tensor]:
    geometry = _geometry(weight, *form)
    links = dendrite_bias, to_soma, to_dendrite, activation

    def plain() -> tuple[Tensor, Tensor]:
        with no_autocast(x):
            soma = reference.product(x, weight, bias, geometry)
            check_dendrites(soma, x, dendrite_weight, *links, geometry)
            found = evaluate_dendrites(soma, x, dendrite_weight, *links, geometry, keep)
        out, activations = _allocate(x, weight, len(to_soma) if keep else 0, geometry)
        return out.copy_(found[0]), activations.copy_(found[1])

    def kernel() -> tuple[Tensor, Tensor]:
        from pbfx_kernels.fused_depthwise import depthwise_neuron

        out, activations = _allocate(x, weight, len(to_soma) if keep else 0, geometry)
        check_dendrites(out, x, dendrite_weight, *links, geometry)
        kept = activations if keep else None
        depthwise_neuron(x, weight, bias, dendrite_weight, *links, geometry, out, kept)
        return out, activations

    if not runs_depthwise(x, weight, dendrite_weight, geometry):
        return plain()
    return or_reference(problem_of(x, dendrite_weight, geometry), kernel, plain)


_evaluated = Taped(_evaluate)


def _geometry(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Geometry:
    return Geometry(tuple(stride), tuple(padding), tuple(dilation), weight.shape[0])


def _allocate(x: Tensor, weight: Tensor, count: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return memory for the output, in the memory format of `x`, and for so many activations."""
    out = x.new_empty(geometry.output_shape(x.shape, weight.shape))
    if x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1:
        out = torch.empty_like(out, memory_format=torch.channels_last)
    return out, stack_like(out, count)


@perforated_depthwise_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dendrite_weight: Tensor,
    dendrite_bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    keep: bool,
) -> tuple[Tensor, Tensor]:
    geometry = _geometry(weight, stride, padding, dilation)
    out, activations = _allocate(x, weight, dendrite_weight.shape[0] if keep else 0, geometry)
    links = dendrite_bias, to_soma, to_dendrite, activation
    check_dendrites(out, x, dendrite_weight, *links, geometry)
    return out, activations


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, dendrite_weight, dendrite_bias, to_soma, to_dendrite, *rest = inputs
    activation, *form, keep = rest
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.needs = x.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
    ctx.learns, ctx.kept = to_soma.requires_grad, keep
    ctx.activation, ctx.form, ctx.to_soma_dtype = activation, form, to_soma.dtype
    again = ctx.learns and not keep
    ctx.save_for_backward(
        x if ctx.needs[1] or again else None,
        weight,
        output[1] if ctx.learns and keep else None,
        *((dendrite_weight, dendrite_bias, to_dendrite) if again else (None, None, None)),
    )
    ctx.x_shape = x.shape


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 12
    x, weight, activations, dendrite_weight, dendrite_bias, to_dendrite = ctx.saved_tensors
    geometry = _geometry(weight, *ctx.form)
    links = dendrite_weight, dendrite_bias, to_dendrite, ctx.activation
    needs_x, needs_weight, needs_bias = ctx.needs
    if x is not None and not torch.is_grad_enabled():
        again = ctx.learns and not ctx.kept
        if not again:
            # Of no dendrites.
            none = grad.new_empty((0, *weight.shape))
            links = none, None, grad.new_empty((0, 0, weight.shape[0])), ctx.activation
        wanted = needs_x, needs_weight or needs_bias, again
        op = torch.ops.pbfx.perforated_depthwise_backward.default
        *parts, found = op(grad, x, weight, *links, *ctx.form, *wanted)
        parts = [t if need else None for t, need in zip(parts, ctx.needs, strict=True)]
    else:
        # Of torch's ops, which have derivatives, and of which none reads an input that is not kept.
        given = grad.new_empty(ctx.x_shape) if x is None else x
        parts = convolution_backward(grad, given, weight, geometry, ctx.needs)
        found = recompute(grad, given, *links, geometry) if ctx.learns and not ctx.kept else None
    if ctx.kept and ctx.learns:
        axis = geometry.channel_axis
        found = torch.ops.pbfx.dendrites_backward.default(grad, activations, axis)
    grad_to_soma = found.to(ctx.to_soma_dtype) if ctx.learns and found is not None else None
    return *parts, None, None, grad_to_soma, *(None,) * 6


perforated_depthwise_op.register_autograd(_gradients, setup_context=_setup)
