"""Run a site by the strategy that `pbfx_kernels.strategy` chooses: what the ops call."""

import functools

import torch
from torch import Tensor

from pbfx_kernels import reference
from pbfx_kernels.fallback import or_reference
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.layout import stack_like, writable
from pbfx_kernels.strategy import Problem, Strategy, choose, problem_of
from pbfx_kernels.walking import REMEMBERED


def evaluate_dendrites(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    keep: bool,
    strategy: Strategy | None = None,
) -> tuple[Tensor, Tensor]:
    """Evaluate the dendrites of a site; arguments as of `reference.dendrites`.

    Args:
        soma: and the rest up to `geometry`: as there.
        x: likewise.
        weight: likewise.
        bias: likewise.
        to_soma: likewise.
        to_dendrite: likewise.
        activation: likewise.
        geometry: likewise.
        keep: whether to return the activations.
        strategy: one that can compute this site, instead of the one that is chosen.

    Returns:
        out: `(*soma)`, dtype of `soma`.
        activations: a, `(D, *soma)`, or `(0, *soma)` if not kept.
    """
    links = weight, bias, to_soma, to_dendrite, activation

    def plain() -> tuple[Tensor, Tensor]:
        out, activations = reference.dendrites(soma, x, *links, geometry)
        return out, activations if keep else activations[:0]

    if strategy is not None:
        if strategy is Strategy.REFERENCE:
            return plain()
        return _launch(strategy, soma, x, *links, geometry, keep)
    problem = problem_of(soma, weight, geometry)
    chosen = choose(problem)
    if chosen is Strategy.REFERENCE:
        return plain()
    return or_reference(problem, lambda: _launch(chosen, soma, x, *links, geometry, keep), plain)


def _launch(
    strategy: Strategy,
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
    """Evaluate the dendrites of a site with kernels of ours."""
    links = weight, bias, to_soma, to_dendrite, activation
    out = writable(soma, geometry.channel_axis)
    kept = stack_like(out, weight.shape[0]) if keep else None
    if strategy is Strategy.PACKED:
        from pbfx_kernels.packed import packed_dendrites

        packed_dendrites(soma, x, *links, geometry, out, kept)
    elif geometry.spatial == 0:
        from pbfx_kernels.fused_linear import fused_linear

        fused_linear(soma, x, *links, out, kept)
    else:
        from pbfx_kernels.fused_conv2d import fused_conv2d

        fused_conv2d(soma, x, *links, geometry, out, kept)
    return out, soma.new_empty((0, *soma.shape)) if kept is None else kept


def sum_to_soma_gradient(grad: Tensor, activations: Tensor, channel_axis: int) -> Tensor:
    """Sum `dT_d = Σ_p g ⊙ a_d`; arguments and result as of `reference.dendrites_backward`."""
    problem = _problem_of_sum(
        grad.shape, grad.dtype, grad.device, activations.shape[0], grad.dim() + channel_axis
    )

    def plain() -> Tensor:
        return reference.dendrites_backward(grad, activations, channel_axis)

    def kernel() -> Tensor:
        from pbfx_kernels.to_soma_gradient import to_soma_gradient

        return to_soma_gradient(grad, activations, channel_axis)

    return (
        plain() if choose(problem) is Strategy.REFERENCE else or_reference(problem, kernel, plain)
    )


@functools.lru_cache(REMEMBERED)
def _problem_of_sum(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, dendrites: int, axis: int
) -> Problem:
    """Describe a sum by the rules for a forward whose weight says no more than its shape."""
    grad = torch.empty((), dtype=dtype, device=device).expand(shape)
    return problem_of(grad, grad.new_empty((dendrites, shape[axis], 0), device="meta"), Geometry())


def recompute_to_soma_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
    strategy: Strategy | None = None,
) -> Tensor:
    """Sum `dT_d = Σ_p g ⊙ a_d` from the inputs of the forward.

    Args:
        grad: g, `(*soma)`; its dtype is that of the computation.
        x: and the rest up to `geometry`: as of `reference.dendrites`.
        weight: likewise.
        bias: likewise.
        to_dendrite: likewise.
        activation: likewise.
        geometry: likewise.
        strategy: one that can compute this site, instead of the one that is chosen.

    Returns:
        `(D, N)`, float32, or float64 for float64 inputs.
    """
    dendrites = x, weight, bias, to_dendrite, activation

    def plain() -> Tensor:
        # The sum with the soma is not needed, nor its links: any finite ones do.
        links = to_dendrite.new_zeros(to_dendrite.shape[1:])
        _, activations = reference.dendrites(
            grad, x, weight, bias, links, to_dendrite, activation, geometry
        )
        return reference.dendrites_backward(grad, activations, geometry.channel_axis)

    if strategy is not None:
        if strategy is Strategy.REFERENCE:
            return plain()
        return _launch_gradient(strategy, grad, *dendrites, geometry)
    problem = problem_of(grad, weight, geometry)
    chosen = choose(problem)
    if chosen is Strategy.REFERENCE:
        return plain()
    return or_reference(
        problem, lambda: _launch_gradient(chosen, grad, *dendrites, geometry), plain
    )


def _launch_gradient(
    strategy: Strategy,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
) -> Tensor:
    """Sum the gradient with kernels of ours, which compute the activations again."""
    if strategy is Strategy.SPLIT and geometry.spatial == 0:
        from pbfx_kernels.fused_linear import fused_linear_gradient

        return fused_linear_gradient(grad, x, weight, bias, to_dendrite, activation)
    if strategy is Strategy.SPLIT:
        from pbfx_kernels.fused_conv2d import fused_conv2d_gradient

        return fused_conv2d_gradient(grad, x, weight, bias, to_dendrite, activation, geometry)
    from pbfx_kernels.packed import packed_to_soma_gradient

    return packed_to_soma_gradient(grad, x, weight, bias, to_dendrite, activation, geometry)
