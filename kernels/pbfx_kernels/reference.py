"""The specification: what a site with dendrites computes, in plain differentiable torch.

    z_d = V_d x + c_d + Σ_{e<d} U_{d,e} ⊙ a_e        a_d = f(z_d)        out = soma + Σ_d T_d ⊙ a_d

Shapes: P positions (batch x space), K inputs, N neurons, D dendrites, C candidates per neuron.
`(*soma)` is the shape of the soma's output, `(..., N)` for a linear op and `(B, N, *spatial)` for a
convolution, the batch optional. Dendrites and candidates are stacked on a leading axis, so one GEMM
or convolution evaluates all of a site. The weight of a transposed convolution is `(D, channels,
N / groups, *kernel)`.

Precision: GEMMs and convolutions run in the dtype of the soma's output; links, activations and sums
run in float32, or in float64 where the soma is float64. A kernel has to match these functions
within the tolerance table of its tests.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018; Fahlman and Lebiere, 1990.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pbfx_kernels.activations import ACTIVATIONS, activate, activation_derivative
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.moments import Moment

__all__ = [
    "ACTIVATIONS",
    "accumulation_dtype",
    "activate",
    "activation_derivative",
    "candidate_preactivations",
    "candidates_backward",
    "dendrites",
    "dendrites_backward",
    "join",
    "preactivations",
    "product",
    "weight_gradient",
]

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for links and sums: float32, or float64 where `dtype` is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def preactivations(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Evaluate `V_d x + c_d` for all d in one GEMM or convolution.

    Args:
        x: `(..., K)` or `(B, channels, *spatial)`, the batch optional.
        weight: `(D, N, K)`, `(D, N, channels / groups, *kernel)` or, transposed, `(D, channels,
            N / groups, *kernel)`, dtype of `x`.
        bias: `(D, N)`, dtype of `x`, or None.
        geometry: the form of the soma.

    Returns:
        `(D, *soma)`, dtype of `x`.
    """
    stacked, neurons = weight.shape[0], geometry.neurons(weight.shape[1:])
    if stacked == 0:
        # A convolution without output channels is an error in torch.
        return x.new_empty((0, *geometry.output_shape(x.shape, weight.shape[1:])))
    weight = flatten_weight(weight, geometry)
    bias = None if bias is None else flatten_stack(bias, -1, geometry.groups)
    flat = product(x, weight, bias, geometry)
    return unflatten_stack(flat, geometry.channel_axis, geometry.groups, stacked, neurons)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Evaluate one GEMM or convolution: `weight` is that of one op, of any number of neurons."""
    if geometry.spatial == 0:
        return F.linear(x, weight, bias)
    if geometry.transposed:
        return _TRANSPOSED[geometry.spatial - 1](
            x,
            weight,
            bias,
            geometry.stride,
            geometry.padding,
            geometry.output_padding,
            geometry.groups,
            geometry.dilation,
        )
    convolution = _CONVOLUTIONS[geometry.spatial - 1]
    return convolution(
        x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )


def dendrites(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Evaluate the dendrites of a site and add them to its soma's output.

    Args:
        soma: `W x + b`, the soma's output; its dtype is the dtype of the computation.
        x: the soma's input, `(..., K)` or `(B, channels, *spatial)`; cast to the dtype of `soma`.
        weight: V, `(D, N, K)` or `(D, N, channels / groups, *kernel)`; D may be 0.
        bias: c, `(D, N)`, or None.
        to_soma: T, `(D, N)`.
        to_dendrite: U, `(D, D, N)`, of which only the strictly lower triangle is read.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma.

    Returns:
        out: `(*soma)`, dtype of `soma`; where T is zero and `a` finite, it is bit-identical to
            `soma`, signed zeros included.
        activations: a, `(D, *soma)`, dtype of `soma`.
    """
    z = _preactivations_in(soma.dtype, x, weight, bias, geometry)
    out, activations = join(soma, z.unbind(), to_soma, to_dendrite, activation, geometry)
    if not activations:
        # An op may not hand back its argument.
        return soma.clone(), soma.new_empty((0, *soma.shape))
    return out, torch.stack([a.to(soma.dtype) for a in activations])


def join(
    soma: Tensor,
    z: Sequence[Tensor],
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
) -> tuple[Tensor, list[Tensor]]:
    """Evaluate what follows the products: the cascade, the activations, and the sum with the soma.

    Args:
        soma: `(*soma)`; its dtype is the dtype of the computation.
        z: `V_d x + c_d`, D tensors `(*soma)`.
        to_soma: T, `(D, N)`.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma.

    Returns:
        out: `(*soma)`, dtype of `soma`; see `dendrites`.
        activations: a, D tensors `(*soma)`, in `accumulation_dtype`.
    """
    wide = accumulation_dtype(soma.dtype)
    to_soma = per_channel(_cast(to_soma, wide), soma.dim(), geometry)
    to_dendrite = per_channel(_cast(to_dendrite, wide), soma.dim(), geometry)
    activations: list[Tensor] = []
    # Added one by one, as the equation stands, and each as `s - (0 - T a)`: `0 - T a` is never
    # -0.0, and `s - 0.0` is s for either zero, while `-0.0 + 0.0` is +0.0. So an untrained dendrite
    # leaves every bit of what it is added to as it is.
    zero, out = soma.new_zeros((), dtype=wide), _cast(soma, wide)
    for d, z_d in enumerate(z):
        z_d = _cast(z_d, wide)
        for e, a_e in enumerate(activations):
            z_d = z_d + to_dendrite[d, e] * a_e
        a_d = activate(activation, z_d)
        out = out - (zero - to_soma[d] * a_d)
        activations.append(a_d)
    return _cast(out, soma.dtype), activations


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast where there is something to cast, so that exported graphs hold no idle casts."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def dendrites_backward(grad: Tensor, activations: Tensor, channel_axis: int) -> Tensor:
    """Sum the gradient of the to-soma links: `dT_d = Σ_p g ⊙ a_d`.

    It is the only gradient that a perforated dendrite passes on, besides `g` itself to the soma.

    Args:
        grad: g, the error at the site's preactivation, `(*soma)`.
        activations: a, `(D, *soma)`.
        channel_axis: axis of the neurons in `grad`, negative (`Geometry.channel_axis`).

    Returns:
        `(D, N)`, summed and returned in float32, or float64 for float64 inputs.
    """
    wide = accumulation_dtype(grad.dtype)
    return sum_positions(grad.to(wide) * activations.to(wide), channel_axis)


def candidate_preactivations(
    x: Tensor,
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    geometry: Geometry,
) -> Tensor:
    """Evaluate `z_c = V_c x + c_c + Σ_{e<D} U_{c,e} ⊙ a_e`; candidates do not feed one another.

    Args:
        x: the soma's input, `(..., K)` or `(B, channels, *spatial)`; cast to the dtype of
            `activations`.
        activations: a, `(D, *soma)`, of the accepted dendrites; D may be 0. Its dtype, the soma's,
            is that of the computation.
        weight: V, `(C, N, K)` or `(C, N, channels / groups, *kernel)`.
        bias: c, `(C, N)`, or None.
        to_dendrite: U, `(C, D, N)`.
        geometry: the form of the soma.

    Returns:
        z, `(C, *soma)`, dtype of `activations`.
    """
    wide = accumulation_dtype(activations.dtype)
    z = _preactivations_in(activations.dtype, x, weight, bias, geometry).to(wide)
    to_dendrite = per_channel(to_dendrite.to(wide), z.dim() - 1, geometry)
    for e in range(activations.shape[0]):
        z = z + to_dendrite[:, e] * activations[e].to(wide)
    return z.to(activations.dtype)


def candidates_backward(
    grad: Tensor,
    z: Tensor,
    x: Tensor,
    activations: Tensor,
    direction: Tensor,
    error_mean: Tensor,
    regression: Tensor | None,
    weight_shape: Sequence[int],
    activation: str,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate the candidates' covariance with the error, and sum its moments.

    `dz_c = -direction_c ⊙ (g - ḡ) ⊙ f'(z_c) / P`: the minus makes an optimiser that minimises
    maximise the covariance. From there on it is the ordinary weight gradient; none reaches the
    input.

    With a regression, `(g - ḡ) - β_c ⊙ (a_c - ā_c)` takes the place of `g - ḡ`. For β = Cov/σ_a²
    and direction = sign(Cov)/σ_g that is the gradient of the correlation |Cov| / (σ_a σ_g) times
    σ_a, which only scales it: the error that the candidate does not explain yet.

    Args:
        grad: g, the error at the site's preactivation, `(*soma)`.
        z: the candidates' preactivations, `(C, *soma)`.
        x: the soma's input; cast to the dtype of `z`.
        activations: a, `(D, *soma)`, of the accepted dendrites.
        direction: `(C, N)`, the caller's choice, such as `sign(Cov) / σ_g`.
        error_mean: ḡ, `(N,)`, the caller's running mean.
        regression: β and ā, `(2, C, N)`, the caller's running figures, or None.
        weight_shape: shape of the candidates' weight, `(C, N, K)` or `(C, N, channels / groups,
            *kernel)`.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma.

    Returns:
        All in float32, or float64 where `z` is float64; autograd casts them to the parameters'
        dtypes.
        grad_weight: `(C, N, K)` or `(C, N, channels / groups, *kernel)`.
        grad_bias: `(C, N)`.
        grad_to_dendrite: `(C, D, N)`.
        moments: `(6 * C, N)`, sums over this batch's positions; `moments.view(6, C, N)[Moment.AG]`
            is Σag.
    """
    wide = accumulation_dtype(z.dtype)
    axis = geometry.channel_axis
    error, wide_z = grad.to(wide), z.to(wide)
    a = activate(activation, wide_z)
    neurons = error.shape[axis]
    positions = error.numel() // neurons if neurons else 0

    # 1/P is applied in two halves, before and after the sums: 1/P on its own is below fp16's
    # smallest number for the P of a convolution, and the sum of P terms without it is above the
    # largest.
    half = max(positions, 1) ** -0.5
    direction = per_channel(direction.to(wide), grad.dim(), geometry)
    residual = error - per_channel(error_mean.to(wide), grad.dim(), geometry)
    if regression is not None:
        trend, mean_a = per_channel(regression.to(wide), grad.dim(), geometry)
        residual = residual - trend * (a - mean_a)
    grad_z = direction * residual * activation_derivative(activation, wide_z) * -half

    grad_weight = weight_gradient(grad_z.to(z.dtype), x.to(z.dtype), weight_shape, geometry)
    grad_bias = sum_positions(grad_z, axis)
    grad_to_dendrite = grad_bias.new_empty((z.shape[0], activations.shape[0], neurons))
    if activations.shape[0]:
        products = [sum_positions(grad_z * a_e.to(wide), axis) for a_e in activations]
        grad_to_dendrite = torch.stack(products, dim=1)
    return (
        grad_weight.to(wide) * half,
        grad_bias * half,
        grad_to_dendrite * half,
        _batch_moments(a, error, positions, axis),
    )


def _batch_moments(a: Tensor, g: Tensor, positions: int, axis: int) -> Tensor:
    """Sum the `(6 * C, N)` moments of the activations `(C, *soma)` and the error `(*soma)`."""
    sum_a = sum_positions(a, axis)
    rows = {
        Moment.COUNT: torch.full_like(sum_a, positions),
        Moment.A: sum_a,
        Moment.AA: sum_positions(a * a, axis),
        Moment.G: sum_positions(g[None], axis).expand_as(sum_a),
        Moment.GG: sum_positions((g * g)[None], axis).expand_as(sum_a),
        Moment.AG: sum_positions(a * g, axis),
    }
    return torch.cat([rows[row] for row in Moment])


def _preactivations_in(
    dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    bias = None if bias is None else bias.to(dtype)
    return preactivations(x.to(dtype), weight.to(dtype), bias, geometry)


def weight_gradient(
    grad_z: Tensor, x: Tensor, weight_shape: Sequence[int], geometry: Geometry
) -> Tensor:
    """Compute the gradient of stacked weights from that of their preactivations, in one op."""
    stacked = weight_shape[0]
    flat = flatten_stack(grad_z, geometry.channel_axis, geometry.groups)
    if geometry.spatial == 0:
        rows, (neurons, inputs) = math.prod(x.shape[:-1]), weight_shape[1:]
        grad = flat.reshape(rows, stacked * neurons).t() @ x.reshape(rows, inputs)
    else:
        form = list(weight_shape[1:])
        form[geometry.neuron_axis] *= stacked
        batched = x.dim() == geometry.spatial + 2
        grad = torch.ops.aten.convolution_backward(
            flat if batched else flat[None],
            x if batched else x[None],
            # Only its shape is read, as the mask asks for no gradient to the input.
            x.new_empty(1).expand(form),
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.transposed,
            geometry.output_padding or (0,) * geometry.spatial,
            geometry.groups,
            (False, True, False),
        )[1]
    return unflatten_weight(grad, geometry, stacked)


def flatten_weight(weight: Tensor, geometry: Geometry) -> Tensor:
    """Make one weight of D, `(D, *W)` to `(*W)` with D times the neurons."""
    if geometry.transposed:
        # A transposed convolution's groups lie on the channels' axis, so its neurons merge freely.
        return weight.movedim(0, 1).flatten(1, 2)
    return flatten_stack(weight, -(geometry.spatial + 2), geometry.groups)


def unflatten_weight(flat: Tensor, geometry: Geometry, stacked: int) -> Tensor:
    """Undo `flatten_weight`: one weight with D times the neurons to `(D, *W)`."""
    if geometry.transposed:
        return flat.unflatten(1, (stacked, flat.shape[1] // stacked)).movedim(1, 0)
    axis = -(geometry.spatial + 2)
    return unflatten_stack(flat, axis, geometry.groups, stacked, flat.shape[axis] // stacked)


def flatten_stack(stacked: Tensor, axis: int, groups: int) -> Tensor:
    """Merge the leading axis into the channels: `(D, ..., N, ...)` to `(..., D * N, ...)`.

    A grouped convolution wants all channels of its first group first, so the order is (group, d,
    neuron of group).
    """
    if stacked.shape[0] == 1:
        # A stack of one is in any order; half of all calls, and five views saved.
        return stacked[0]
    neurons = stacked.shape[axis]
    split = stacked.unflatten(axis, (groups, neurons // groups))
    return split.movedim(0, axis - 1).flatten(axis - 2, axis)


def unflatten_stack(flat: Tensor, axis: int, groups: int, stacked: int, neurons: int) -> Tensor:
    """Undo `flatten_stack`: `(..., D * N, ...)` to `(D, ..., N, ...)`."""
    if stacked == 1:
        return flat[None]
    split = flat.unflatten(axis, (groups, stacked, neurons // groups))
    return split.movedim(axis - 1, 0).flatten(axis - 1, axis)


def per_channel(links: Tensor, soma_dim: int, geometry: Geometry) -> Tensor:
    """Line `(..., N)` up with the soma's output: `(..., 1, N, 1, 1)` for a batched conv2d."""
    *stacks, neurons = links.shape
    before = soma_dim - geometry.spatial - 1
    return links.reshape(*stacks, *(1,) * before, neurons, *(1,) * geometry.spatial)


def sum_positions(stacked: Tensor, channel_axis: int) -> Tensor:
    """Sum `(D, *soma)` over the positions, to `(D, N)`."""
    d, *shape = stacked.shape
    channel = len(shape) + channel_axis
    # Explicit sizes, not -1: an empty batch makes -1 ambiguous.
    before, after = math.prod(shape[:channel]), math.prod(shape[channel + 1 :])
    return stacked.reshape(d, before, shape[channel], after).sum((1, 3))
