"""`pbfx::perforated_conv2d`: a two-dimensional convolution with its dendrites as one node.

    out, a = W * x + b + Σ_d T_d ⊙ a_d, (D, *out)

As `pbfx::perforated_linear`: a graph holds it where the *fused* strategy may compute it, and its
backward is perforated. That is `aten::convolution_backward` for the soma and, for the links T, the
op that `pbfx::dendrites` would have had: `pbfx::dendrites_backward` where activations are kept,
`pbfx::dendrites_recompute` where they are not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pbfx_kernels.ops  # noqa: F401  registers the ops that a backward runs
from pbfx_kernels.candidate_autograd import no_autocast
from pbfx_kernels.dispatch import evaluate_dendrites
from pbfx_kernels.errors import ArgumentError
from pbfx_kernels.fallback import or_reference
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.layout import stack_like
from pbfx_kernels.problem import conv2d_problem
from pbfx_kernels.registering import op
from pbfx_kernels.strategy import route
from pbfx_kernels.tape import Taped, float32_precision
from pbfx_kernels.validation import check_dendrites


@op("perforated_conv2d")
def perforated_conv2d_op(
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
    groups: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Match `reference.dendrites` over `F.conv2d(x, weight, bias, ...)`.

    Args:
        x: `(B, channels, H, W)`; its dtype is that of the computation.
        weight: W, `(N, channels / groups, kH, kW)`, the dtype of `x`.
        bias: b, `(N,)`, or None, likewise.
        dendrite_weight: V, `(D, *W)`, any float dtype, as all that follow.
        dendrite_bias: c, `(D, N)`, or None.
        to_soma: T, `(D, N)`.
        to_dendrite: U, `(D, D, N)`, strictly lower triangle.
        activation: f, one of `ACTIVATIONS`.
        stride: one step per spatial dimension.
        padding: zeros on both sides, likewise.
        dilation: distance between kernel taps, likewise.
        groups: blocks of channels that do not see one another.
        keep: whether to return the activations, else `(0, *out)`, and a backward computes them
            again.

    Returns:
        out: `(B, N, H', W')`, in channels_last where `x` or `weight` is, else contiguous.
        activations: a, `(D, *out)`, each slice laid out as `out`.

    Raises:
        ArgumentError: the dendrites do not fit the soma (see `dendrites`), or `x` has no batch.
    """
    tensors = x, weight, bias, dendrite_weight, dendrite_bias, to_soma, to_dendrite
    form = tuple(stride), tuple(padding), tuple(dilation), groups
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
    form: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int],
    keep: bool,
    _: object,
) -> tuple[Tensor, Tensor]:
    geometry = Geometry(*form)
    links = dendrite_bias, to_soma, to_dendrite, activation
    out = _empty(x, weight, geometry)
    check_dendrites(out, x, dendrite_weight, *links, geometry)

    def kernel() -> tuple[Tensor, Tensor]:
        from pbfx_kernels.fused_convolution import fused_convolution, laid_out

        assert read is not None
        activations = stack_like(out, len(to_soma) if keep else 0)
        fused_convolution(
            read,
            x,
            laid_out(read, weight, dendrite_weight),
            (weight.shape[2], weight.shape[3]),
            bias,
            *links,
            geometry,
            out,
            activations if keep else None,
        )
        return out, activations

    def library() -> tuple[Tensor, Tensor]:
        with no_autocast(x):
            soma = F.conv2d(x, weight, bias, *form)
            found = evaluate_dendrites(soma, x, dendrite_weight, *links, geometry, keep)
        return out.copy_(found[0]), stack_like(out, len(found[1])).copy_(found[1])

    problem = conv2d_problem(x, weight, dendrite_weight, geometry)
    read = None if problem is None else route(problem, x.shape)
    if problem is None or read is None or not out.numel():
        return library()
    return or_reference(problem, kernel, library)


_evaluated = Taped(_evaluate)


def _empty(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return memory for the output, laid out as torch's own convolutions do on a GPU."""
    if x.dim() != 4 or weight.dim() != 4:
        fault = f"x, weight: expected 4 axes, got {tuple(x.shape)} and {tuple(weight.shape)}"
        raise ArgumentError("pbfx::perforated_conv2d", [fault])
    last = any(_channels_last(tensor) for tensor in (x, weight))
    return torch.empty(
        geometry.output_shape(x.shape, weight.shape),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _channels_last(tensor: Tensor) -> bool:
    # Axes of one are contiguous in either format; torch then goes by the strides.
    last = tensor.stride(1) == 1 and tensor.stride(3) >= tensor.shape[1]
    return last and tensor.is_contiguous(memory_format=torch.channels_last)


@perforated_conv2d_op.register_fake
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
    groups: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    out = _empty(x, weight, geometry)
    check_dendrites(
        out, x, dendrite_weight, dendrite_bias, to_soma, to_dendrite, activation, geometry
    )
    return out, stack_like(out, dendrite_weight.shape[0] if keep else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, dendrite_weight, dendrite_bias, to_soma, to_dendrite, *form, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.needs = x.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
    learns = ctx.learns = to_soma.requires_grad
    again = learns and not keep
    ctx.save_for_backward(
        x if any(ctx.needs) or again else None,
        weight if any(ctx.needs) else None,
        output[1] if learns and keep else None,
        *((dendrite_weight, dendrite_bias, to_dendrite) if again else (None, None, None)),
    )
    ctx.neurons, ctx.form, ctx.to_soma_dtype = weight.shape[0], form, to_soma.dtype


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 13
    x, weight, activations, *dendrites = ctx.saved_tensors
    activation, stride, padding, dilation, groups = ctx.form
    if x is not None and _channels_last(x):
        # Both backwards want it so, and in a graph it is fused with what gives the error.
        grad = grad.contiguous(memory_format=torch.channels_last)
    own: tuple[Any, ...] = (None, None, None)
    if any(ctx.needs):
        found = torch.ops.aten.convolution_backward.default(
            grad,
            x,
            weight,
            [ctx.neurons] if ctx.needs[2] else None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            list(ctx.needs),
        )
        own = tuple(g if needed else None for g, needed in zip(found, ctx.needs, strict=True))
    grad_to_soma = None
    if ctx.learns:
        if activations is not None:
            grad_to_soma = torch.ops.pbfx.dendrites_backward.default(grad, activations, -3)
        else:
            grad_to_soma = torch.ops.pbfx.dendrites_recompute.default(
                grad, x, *dendrites, activation, stride, padding, dilation, groups, False, []
            )
        grad_to_soma = grad_to_soma.to(ctx.to_soma_dtype)
    return (*own, None, None, grad_to_soma, *(None,) * 7)


perforated_conv2d_op.register_autograd(_gradients, setup_context=_setup)
