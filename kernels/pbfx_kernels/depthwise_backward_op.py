"""`pbfx::perforated_depthwise_backward`: all gradients of a depthwise neuron.

    dT_d = Σ_p g ⊙ a_d      dW = Σ_p g ⊙ x(p + tap)      db = Σ_p g      dx = Wᵀ * g

Perforated, so the error reaches the soma's parameters, its input and the links T. Where all taps
are unrolled, one kernel makes all sums from one read of input and error, and another the input's
gradient; see `depthwise_gradient`. Libraries take several times that for depthwise convolutions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import pbfx_kernels.ops  # noqa: F401  registers the op that recomputes
from pbfx_kernels.candidate_autograd import no_autocast
from pbfx_kernels.depthwise_planes import is_patched, transposes
from pbfx_kernels.fallback import or_reference
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.layout import channels_last
from pbfx_kernels.problem import problem_of
from pbfx_kernels.registering import op
from pbfx_kernels.strategy import Strategy, choose

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


@op("perforated_depthwise_backward")
def perforated_depthwise_backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dendrite_weight: Tensor,
    dendrite_bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs_x: bool,
    needs_weight: bool,
    needs_links: bool,
) -> Gradients:
    """Differentiate `pbfx::perforated_depthwise`.

    Args:
        grad: g, `(B, N, *spatial)`, the batch optional.
        x: and the rest up to `dilation`: as of `pbfx::perforated_depthwise`.
        weight: likewise.
        dendrite_weight: likewise.
        dendrite_bias: likewise.
        to_dendrite: likewise.
        activation: likewise.
        stride: likewise.
        padding: likewise.
        dilation: likewise.
        needs_x: whether to return dx.
        needs_weight: whether to return dW and db.
        needs_links: whether to return dT.

    Returns:
        dx, `(B, N, *spatial)`; dW, `(N, 1, *kernel)`; db, `(N,)`; dT, `(D, N)`, of accumulation.
        What is not needed is empty.
    """
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), weight.shape[0])
    links = dendrite_weight, dendrite_bias, to_dendrite, activation

    def plain() -> Gradients:
        none = grad.new_empty(0)
        grad_x, grad_weight, grad_bias = convolution_backward(
            grad, x, weight, geometry, (needs_x, needs_weight, needs_weight)
        )
        grad_links = recompute(grad, x, *links, geometry) if needs_links else None
        return (
            none if grad_x is None else _laid_out(grad_x, x),
            none.clone() if grad_weight is None else _laid_out(grad_weight, weight),
            none.clone() if grad_bias is None else grad_bias,
            none.clone() if grad_links is None else grad_links,
        )

    def kernel() -> Gradients:
        from pbfx_kernels.depthwise_gradient import (
            depthwise_gradients,
            depthwise_input_gradient,
            fused_depthwise_gradient,
        )

        error = grad.contiguous() if x.is_contiguous() else grad
        if x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1:
            error = channels_last(grad)

        grad_x, grad_weight, grad_bias, grad_links = (grad.new_empty(0) for _ in range(4))
        if needs_weight:
            # Of no dendrites, if no links learn.
            count = len(dendrite_weight) if needs_links else 0
            bias = None if dendrite_bias is None else dendrite_bias[:count]
            given = dendrite_weight[:count], bias, to_dendrite[:count, :count], activation
            sums, taps, own = depthwise_gradients(error, x, *given, geometry)
            grad_links = sums if needs_links else grad_links
            grad_weight, grad_bias = _laid_out(taps.to(weight.dtype), weight), own.to(weight.dtype)
        elif needs_links:
            grad_links = fused_depthwise_gradient(error, x, *links, geometry)
        if needs_x and transposes(geometry, tuple(x.shape), tuple(weight.shape[2:])):
            grad_x = torch.empty_like(x)
            depthwise_input_gradient(error, weight, geometry, grad_x)
        elif needs_x:
            found = convolution_backward(error, x, weight, geometry, (True, False, False))[0]
            assert found is not None
            grad_x = _laid_out(found, x)
        return grad_x, grad_weight, grad_bias, grad_links

    with no_autocast(x):
        problem = problem_of(grad, dendrite_weight, geometry)
        alike = grad.dtype == x.dtype == weight.dtype and x.numel() > 0
        if not alike or not is_patched(tuple(weight.shape[2:])):
            return plain()
        if choose(problem) is not Strategy.DEPTHWISE:
            return plain()
        return or_reference(problem, kernel, plain)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return `tensor` with the strides that a graph was told of."""
    laid = torch.empty_like(like)
    return tensor if tensor.stride() == laid.stride() else laid.copy_(tensor)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Differentiate the soma by torch's own op; tensors as of the op of this file.

    Returns:
        dx, dW and db, or None for what `needs` does not ask for.
    """
    if not any(needs):
        return None, None, None
    batched = x.dim() == geometry.spatial + 2
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad if batched else grad[None],
        x if batched else x[None],
        weight,
        [weight.shape[0]],
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0] * geometry.spatial,
        geometry.groups,
        needs,
    )
    if grad_x is not None and not batched:
        grad_x = grad_x[0]
    return grad_x, grad_weight, grad_bias


def recompute(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
) -> Tensor:
    """Return dT, `(D, N)`, of activations computed again; arguments as of `dendrites`."""
    form = geometry.stride, geometry.padding, geometry.dilation, geometry.groups, False, []
    dendrites = weight, bias, to_dendrite, activation
    return torch.ops.pbfx.dendrites_recompute.default(grad, x, *dendrites, *form)


@perforated_depthwise_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dendrite_weight: Tensor,
    dendrite_bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs_x: bool,
    needs_weight: bool,
    needs_links: bool,
) -> Gradients:
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    none = grad.new_empty(0)
    return (
        torch.empty_like(x) if needs_x else none,
        torch.empty_like(weight) if needs_weight else none.clone(),
        weight.new_empty(weight.shape[0]) if needs_weight else none.clone(),
        grad.new_empty(dendrite_weight.shape[:2], dtype=wide) if needs_links else none.clone(),
    )
