"""Run a site by the strategy that `pbfx_kernels.strategy` chooses: what the ops call."""

from torch import Tensor

from pbfx_kernels import reference
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.layout import stack_like, writable
from pbfx_kernels.strategy import Strategy, choose, problem_of


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
    strategy = strategy or choose(problem_of(soma, weight, geometry))
    if strategy is Strategy.REFERENCE:
        out, activations = reference.dendrites(
            soma, x, weight, bias, to_soma, to_dendrite, activation, geometry
        )
        return out, activations if keep else activations[:0]
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
    axis = grad.dim() + channel_axis
    # The same rules as for a forward whose weight has no more to say than its shape.
    weight = activations.new_empty((activations.shape[0], grad.shape[axis], 0), device="meta")
    geometry = Geometry()
    if choose(problem_of(grad, weight, geometry)) is Strategy.REFERENCE:
        return reference.dendrites_backward(grad, activations, channel_axis)
    from pbfx_kernels.to_soma_gradient import to_soma_gradient

    return to_soma_gradient(grad, activations, channel_axis)


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
    strategy = strategy or choose(problem_of(grad, weight, geometry))
    if strategy is Strategy.SPLIT and geometry.spatial == 0:
        from pbfx_kernels.fused_linear import fused_linear_gradient

        return fused_linear_gradient(grad, x, weight, bias, to_dendrite, activation)
    if strategy is Strategy.SPLIT:
        from pbfx_kernels.fused_conv2d import fused_conv2d_gradient

        return fused_conv2d_gradient(grad, x, weight, bias, to_dendrite, activation, geometry)
    if strategy is Strategy.PACKED:
        from pbfx_kernels.packed import packed_to_soma_gradient

        return packed_to_soma_gradient(grad, x, weight, bias, to_dendrite, activation, geometry)
    # The sum with the soma is not needed, nor its links: any finite ones do.
    links = to_dendrite.new_zeros(to_dendrite.shape[1:])
    _, activations = reference.dendrites(
        grad, x, weight, bias, links, to_dendrite, activation, geometry
    )
    return reference.dendrites_backward(grad, activations, geometry.channel_axis)
