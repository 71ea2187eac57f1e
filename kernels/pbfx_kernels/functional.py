"""The functions that users call: thin, traceable names for the ops."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import pbfx_kernels.conv_neuron_op
import pbfx_kernels.neuron_op  # noqa: F401  registers its op and those of `pbfx_kernels.ops`
from pbfx_kernels import candidate_autograd, dendrite_autograd, neuron_autograd
from pbfx_kernels.depthwise_op import runs_depthwise
from pbfx_kernels.geometry import LINEAR, Geometry
from pbfx_kernels.problem import Problem, conv2d_problem, linear_problem
from pbfx_kernels.strategy import fuses, recomputes, route, streams


def dendrites(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str = "tanh",
    geometry: Geometry = LINEAR,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Add the D dendrites of a site to its soma's output, in one op.

        z_d = V_d x + c_d + Σ_{e<d} U_{d,e} ⊙ a_e        a_d = f(z_d)        out = soma + Σ_d T_d ⊙
        a_d

    The backward is perforated: the error goes on to `soma` unchanged and to `to_soma`, and to
    nothing else.

    Args:
        soma: the soma's output, `(..., N)` or `(B, N, *spatial)`, the batch optional. Its dtype is
            the dtype of the computation, so autocast decides once, at the soma.
        x: the soma's input, `(..., K)` or `(B, channels, *spatial)`, any float dtype.
        weight: V, `(D, N, K)` or `(D, N, channels / groups, *kernel)`, any float dtype; D may be 0.
            Of a transposed convolution `(D, channels, N / groups, *kernel)`.
        bias: c, `(D, N)`, or None.
        to_soma: T, `(D, N)`. Zeros leave the output bit-identical to `soma`.
        to_dendrite: U, `(D, D, N)`; only the strictly lower triangle `e < d` is read.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma; linear if left out.
        keep: whether the caller wants the activations. Without them nothing is written but the
            output, and the backward computes them again where that is the cheaper way.

    Returns:
        out: shape, dtype and layout of `soma`.
        activations: a, `(D, *soma)`, dtype of `soma`, without gradient. Without `keep` unspecified.

    Raises:
        ArgumentError: shapes, dtypes, devices or names do not fit; when the op runs, not when it is
            traced.

    Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
    """
    keep = keep or _backward_wants_activations(soma, weight, to_soma, geometry)
    tensors = soma, x, weight, bias, to_soma, to_dendrite
    if candidate_autograd.runs_eagerly(*tensors):
        return dendrite_autograd.apply(*tensors, activation, geometry, keep)
    return torch.ops.pbfx.dendrites.default(
        *tensors,
        activation,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        geometry.transposed,
        geometry.output_padding,
        keep,
    )


def candidates(
    neuron: Tensor,
    x: Tensor,
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    moments: Tensor,
    direction: Tensor,
    error_mean: Tensor,
    activation: str = "tanh",
    geometry: Geometry = LINEAR,
    regression: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pass the neuron's output through, and teach C candidates per neuron from the error.

        z_c = V_c x + c_c + Σ_{e<D} U_{c,e} ⊙ a_e        dz_c = -direction_c ⊙ (g - ḡ) ⊙ f'(z_c) / P

    The error g goes on to `neuron` unchanged. `weight`, `bias` and `to_dendrite` get the gradients
    whose *descent* raises the covariance of `f(z_c)` with g, and `moments` gets the batch sums of
    `Moment` as its gradient. With a `regression`, what the candidate explains of the error already
    is taken from it, `g - ḡ - β_c (a_c - ā_c)`, and descent raises the correlation.

    Args:
        neuron: the site's output, `(..., N)` or `(B, N, *spatial)`, the batch optional.
        x: the soma's input, `(..., K)` or `(B, channels, *spatial)`, any float dtype.
        activations: a, `(D, *neuron)`, of the accepted dendrites; D may be 0.
        weight: V, `(C, N, K)` or `(C, N, channels / groups, *kernel)`, any float dtype. Of a
            transposed convolution `(C, channels, N / groups, *kernel)`.
        bias: c, `(C, N)`, or None.
        to_dendrite: U, `(C, D, N)`.
        moments: `(6 * C, N)`, float32 or float64. Its value is never read.
        direction: `(C, N)`, such as `sign(Cov) / σ_g`. Read in the backward, so the caller may
            overwrite it there.
        error_mean: ḡ, `(N,)`, the running mean of the error; likewise.
        activation: f, one of `ACTIVATIONS`.
        geometry: the form of the soma; linear if left out.
        regression: β and ā, `(2, C, N)`: the slope `Cov / σ_a²` of the error over the activation,
            and the running mean of the activation. Likewise read in the backward.

    Returns:
        out: `neuron`, bit for bit. In eager mode it is the same memory, so work in place on one of
            them is work on both, as if nothing stood between; in a graph it is a copy.
        z: the candidates' preactivations, `(C, *neuron)`, dtype of `neuron`, without gradient.

    Raises:
        ArgumentError: shapes, dtypes, devices or names do not fit; when the op runs, not when it is
            traced.

    Source: Fahlman and Lebiere, *The Cascade-Correlation Learning Architecture*, 1990.
    """
    tensors = (
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
    )
    if candidate_autograd.runs_eagerly(*tensors):
        return candidate_autograd.apply(*tensors, activation, geometry)
    return torch.ops.pbfx.candidates.default(
        *tensors,
        activation,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        geometry.transposed,
        geometry.output_padding,
    )


def perforated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dendrite_weight: Tensor,
    dendrite_bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str = "tanh",
) -> Tensor:
    """Evaluate a linear op with dendrites: `W x + b + Σ_d T_d ⊙ a_d`.

    Args:
        x: `(..., K)`.
        weight: W, `(N, K)`.
        bias: b, `(N,)`, or None.
        dendrite_weight: V, `(D, N, K)`.
        dendrite_bias: c, `(D, N)`, or None.
        to_soma: T, `(D, N)`.
        to_dendrite: U, `(D, D, N)`, strictly lower triangle.
        activation: f, one of `ACTIVATIONS`.

    Returns:
        `(..., N)`, the dtype of `torch.nn.functional.linear(x, weight, bias)`.

    Raises:
        ArgumentError: the dendrites do not fit the soma (see `dendrites`).

    Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
    """
    if not len(dendrite_weight):
        return F.linear(x, weight, bias)
    if _may_fuse(x) and _wins(linear_problem(x, weight, dendrite_weight)):
        keep = torch.is_grad_enabled() and to_soma.requires_grad
        tensors = x, weight, bias, dendrite_weight, dendrite_bias, to_soma, to_dendrite
        eager = candidate_autograd.runs_eagerly(*tensors)
        op = neuron_autograd.apply if eager else torch.ops.pbfx.perforated_linear.default
        return op(*tensors, activation, keep)[0]
    soma = F.linear(x, weight, bias)
    return dendrites(
        soma, x, dendrite_weight, dendrite_bias, to_soma, to_dendrite, activation, LINEAR, False
    )[0]


def perforated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dendrite_weight: Tensor,
    dendrite_bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str = "tanh",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Evaluate a two-dimensional convolution with dendrites: `W * x + b + Σ_d T_d ⊙ a_d`.

    Args:
        x: `(B, channels, H, W)`, the batch optional.
        weight: W, `(N, channels / groups, kH, kW)`.
        bias: b, `(N,)`, or None.
        dendrite_weight: V, `(D, N, channels / groups, kH, kW)`.
        dendrite_bias: c, `(D, N)`, or None.
        to_soma: T, `(D, N)`.
        to_dendrite: U, `(D, D, N)`, strictly lower triangle.
        activation: f, one of `ACTIVATIONS`.
        stride: one step, or one per spatial dimension.
        padding: zeros on both sides, likewise.
        dilation: distance between kernel taps, likewise.
        groups: blocks of channels that do not see one another.

    Returns:
        `(B, N, H', W')`, the dtype of `torch.nn.functional.conv2d(x, weight, bias, ...)`.

    Raises:
        ArgumentError: the dendrites do not fit the soma (see `dendrites`).

    Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
    """
    geometry = Geometry.convolution(2, stride, padding, dilation, groups)
    form = geometry.stride, geometry.padding, geometry.dilation
    links = dendrite_bias, to_soma, to_dendrite, activation
    if _may_fuse(x) and runs_depthwise(x, weight, dendrite_weight, geometry):
        keep = _backward_wants_activations(x, dendrite_weight, to_soma, geometry)
        op = torch.ops.pbfx.perforated_depthwise.default
        return op(x, weight, bias, dendrite_weight, *links, *form, keep)[0]
    if _may_fuse(x) and _wins(conv2d_problem(x, weight, dendrite_weight, geometry), x.shape):
        keep = _backward_wants_activations(x, dendrite_weight, to_soma, geometry)
        op = torch.ops.pbfx.perforated_conv2d.default
        return op(x, weight, bias, dendrite_weight, *links, *form, geometry.groups, keep)[0]
    soma = F.conv2d(x, weight, bias, *form, geometry.groups)
    return dendrites(
        soma, x, dendrite_weight, dendrite_bias, to_soma, to_dendrite, activation, geometry, False
    )[0]


def _may_fuse(x: Tensor) -> bool:
    """Return whether it may be decided here that a soma is computed with its dendrites.

    A compiler decides for itself, with what follows in view, and autocast casts at the soma.
    """
    return x.is_cuda and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"))


def _wins(problem: Problem | None, shape: Sequence[int] = ()) -> bool:
    """Return whether soma and dendrites had better be one kernel, for a convolution of `shape`."""
    if problem is None:
        return False
    return streams(problem) or (fuses(problem) and (not shape or bool(route(problem, shape))))


def _backward_wants_activations(
    soma: Tensor, weight: Tensor, to_soma: Tensor, geometry: Geometry
) -> bool:
    """Return whether a backward follows that had better not compute the activations again."""
    return (
        torch.is_grad_enabled() and to_soma.requires_grad and not recomputes(soma, weight, geometry)
    )
