"""Run a site by the strategy that `pbfx_kernels.strategy` chooses: what the ops call.

Inside `pbfx_kernels.measure`, by the way that was the fastest here; see `ways`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pbfx_kernels import reference
from pbfx_kernels.fallback import or_reference
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.layout import stack_like, writable
from pbfx_kernels.problem import Problem, problem_of
from pbfx_kernels.strategy import Route, Strategy, choose, choose_again, route
from pbfx_kernels.walking import REMEMBERED
from pbfx_kernels.ways import Way, fastest_way, ways_of


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
        return _launch(Way(strategy), soma, x, *links, geometry, keep)
    problem = problem_of(soma, weight, geometry)
    chosen = choose(problem)
    if chosen is Strategy.REFERENCE:
        return plain()

    def run(way: Way) -> tuple[Tensor, Tensor]:
        return _launch(way, soma, x, *links, geometry, keep)

    way = _fastest("dendrites", soma, problem, chosen, activation, keep, run)
    return or_reference(problem, lambda: run(way), plain)


def _fastest(
    op: str,
    tensor: Tensor,
    problem: Problem,
    chosen: Strategy,
    activation: str,
    keep: bool,
    run: Callable[[Way], object],
) -> Way:
    ways = ((way.name, way) for way in ways_of(problem))
    return fastest_way(op, tensor, problem, activation, keep, ways, Way(chosen), run)


def _launch(
    way: Way,
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
    if way.strategy is Strategy.PACKED:
        from pbfx_kernels.packed import packed_dendrites

        packed_dendrites(soma, x, *links, geometry, out, kept)
    elif way.strategy is Strategy.DEPTHWISE:
        from pbfx_kernels.fused_depthwise import fused_depthwise

        fused_depthwise(soma, x, *links, geometry, out, kept, way.strips)
    elif geometry.spatial == 0:
        from pbfx_kernels.fused_linear import fused_linear

        fused_linear(soma, x, *links, out, kept, way.blocks)
    elif (read := _route(soma, x, weight, geometry, way)) is not None:
        from pbfx_kernels.fused_convolution import fused_convolution, laid_out

        weights, kernel = (
            laid_out(read, None, weight, soma.dtype),
            (weight.shape[3], weight.shape[4]),
        )
        form = *links[1:], geometry
        fused_convolution(read, x.to(soma.dtype), weights, kernel, soma, *form, out, kept)
    else:
        from pbfx_kernels.fused_conv2d import fused_conv2d

        fused_conv2d(soma, x, *links, geometry, out, kept, way.blocks)
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


def sum_links_and_bias(
    grad: Tensor, activations: Tensor, links: torch.dtype, bias: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum `dT_d = Σ_p g ⊙ a_d` and `db = Σ_p g` of a linear op.

    Args:
        grad: g, `(..., N)`.
        activations: a, `(D, *grad)`; D may be 0.
        links: dtype of dT.
        bias: dtype of db.

    Returns:
        `(D, N)` and `(N,)`.
    """
    dendrites, neurons = activations.shape[0], grad.shape[-1]
    problem = _problem_of_sum(grad.shape, grad.dtype, grad.device, dendrites, grad.dim() - 1)

    def plain() -> tuple[Tensor, Tensor]:
        sums = reference.dendrites_backward(grad, activations, -1)
        return sums.to(links), grad.sum_to_size(neurons).to(bias, copy=True)

    def kernel() -> tuple[Tensor, Tensor]:
        from pbfx_kernels.link_and_bias_gradient import link_and_bias_gradients

        rows = grad.reshape(-1, neurons)
        return link_and_bias_gradients(rows, activations.flatten(1, -2), links, bias)

    known = choose(problem) is not Strategy.REFERENCE and grad.dim() > 1
    return or_reference(problem, kernel, plain) if known else plain()


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
        return _launch_gradient(Way(strategy), grad, *dendrites, geometry)
    problem = problem_of(grad, weight, geometry)
    chosen = choose_again(problem)
    if chosen is Strategy.REFERENCE:
        return plain()

    def run(way: Way) -> Tensor:
        return _launch_gradient(way, grad, *dendrites, geometry)

    way = _fastest("gradient", grad, problem, chosen, activation, False, run)
    return or_reference(problem, lambda: run(way), plain)


def _launch_gradient(
    way: Way,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
) -> Tensor:
    """Sum the gradient with kernels of ours, which compute the activations again."""
    dendrites = grad, x, weight, bias, to_dendrite, activation
    if way.strategy is Strategy.DEPTHWISE:
        from pbfx_kernels.depthwise_gradient import fused_depthwise_gradient

        return fused_depthwise_gradient(*dendrites, geometry, way.strips)
    if way.strategy is Strategy.SPLIT and geometry.spatial == 0:
        from pbfx_kernels.fused_linear import fused_linear_gradient

        return fused_linear_gradient(*dendrites, way.blocks)
    read = _route(grad, x, weight, geometry, way) if way.strategy is Strategy.SPLIT else None
    if read is not None:
        from pbfx_kernels.fused_convolution import fused_convolution_gradient, laid_out

        weights, kernel = (
            laid_out(read, None, weight, grad.dtype),
            (weight.shape[3], weight.shape[4]),
        )
        links = bias, to_dendrite, activation, geometry
        return fused_convolution_gradient(read, grad, x.to(grad.dtype), weights, kernel, *links)
    if way.strategy is Strategy.SPLIT:
        from pbfx_kernels.fused_conv2d import fused_conv2d_gradient

        return fused_conv2d_gradient(*dendrites, geometry, way.blocks)
    from pbfx_kernels.packed import packed_to_soma_gradient

    return packed_to_soma_gradient(*dendrites, geometry)


def _route(soma: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, way: Way) -> Route | None:
    """Return how the *fused* kernel reads the input of dendrites alone, if it is to compute them.

    A way with blocks of its own asks for the kernel that has such blocks.
    """
    batched = way.blocks is None and geometry.spatial == 2 and x.dim() == 4
    return route(problem_of(soma, weight, geometry), x.shape) if batched else None
