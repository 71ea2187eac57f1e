"""The function that users call where dendrites learn: the op, or what does the same elsewhere."""

import torch
from torch import Tensor

import pbfx_kernels.full_op  # noqa: F401  registers its ops
from pbfx_kernels import candidate_autograd, full_autograd
from pbfx_kernels.full_gradient import has_kernels, may_have_kernels
from pbfx_kernels.functional import dendrites
from pbfx_kernels.geometry import LINEAR, Geometry


def full_dendrites(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str = "tanh",
    geometry: Geometry = LINEAR,
    keep: bool = True,
    frozen: int = 0,
) -> tuple[Tensor, Tensor]:
    """Add the D dendrites of a site to its soma's output, and let everything learn.

    Computes what `dendrites` does. The backward is the true gradient: the error goes on to `soma`,
    through the dendrites to `x`, and to all that they are made of. Detach `x` to keep errors from
    the layers before. On a GPU with kernels it is one op; elsewhere, and under function transforms,
    it is the reference.

    Args:
        soma: as of `dendrites`, and likewise all up to `geometry`.
        x: likewise.
        weight: likewise.
        bias: likewise.
        to_soma: likewise.
        to_dendrite: likewise.
        activation: likewise.
        geometry: likewise.
        keep: whether the caller wants the activations.
        frozen: how many dendrites, the oldest, do not learn: the gradients of their weights, biases
            and to-dendrite links are zero. Their to-soma links learn, and errors pass through them.

    Returns:
        out: shape, dtype and layout of `soma`.
        activations: a, `(D, *soma)`, dtype of `soma`; without `keep` unspecified. Do not
            differentiate them: whether they carry a gradient depends on where they were computed.

    Raises:
        ArgumentError: shapes, dtypes, devices or names do not fit; when the op runs, not when it is
            traced. The reference raises torch's own errors.

    Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
    """
    tensors = soma, x, weight, bias, to_soma, to_dendrite
    compiling = torch.compiler.is_compiling()
    if compiling:
        kernels = may_have_kernels(soma, weight)
    else:
        kernels = candidate_autograd.runs_eagerly(*tensors) and has_kernels(soma, weight, geometry)
    if not kernels:
        return full_autograd.full_reference(*tensors, activation, geometry, frozen)
    if not torch.is_grad_enabled():
        return dendrites(*tensors, activation, geometry, keep)
    if not compiling:
        return full_autograd.apply(*tensors, activation, geometry, frozen, keep)[:2]
    return torch.ops.pbfx.full_dendrites.default(
        *tensors,
        activation,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        geometry.transposed,
        geometry.output_padding,
        frozen,
        keep,
    )[:2]
