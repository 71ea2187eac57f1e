"""The ops of sites whose dendrites learn by backpropagation.

    pbfx::full_dendrites             out, a, z = soma + Σ_d T_d ⊙ a_d, (D, *soma), V x
    pbfx::full_dendrites_backward    dx, dV, and dT, dc, dU in one tensor

They are what `pbfx::dendrites` is with the true gradient: the error goes on through the dendrites
to what they read, and everything they are made of learns, but for the weights of the oldest
`frozen`. Whoever does not want an error to reach the input detaches it. `z` is for the backward
alone. The backward is an op of its own, so that graphs hold it. Eager mode does without them:
`full_autograd`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pbfx_kernels.full_autograd import (
    check_full,
    differentiate,
    differentiated,
    evaluated,
    no_sums,
    remember,
    saved_like,
)
from pbfx_kernels.geometry import geometry_of, with_geometry
from pbfx_kernels.layout import stack_strides
from pbfx_kernels.once import in_graphs
from pbfx_kernels.registering import op
from pbfx_kernels.tape import float32_precision


@op("full_dendrites")
def full_dendrites_op(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    frozen: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Match `reference.dendrites`; arguments and errors are those of `pbfx_kernels.full_dendrites`.

    Without `keep`, the activations that come back are `(0, *soma)`.
    """
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    tensors = soma, x, weight, bias, to_soma, to_dendrite
    return evaluated(tensors, activation, geometry, frozen, keep, True, float32_precision(soma))


@full_dendrites_op.register_fake
def _(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    frozen: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    check_full(soma, x, weight, bias, to_soma, to_dendrite, activation, geometry, frozen)
    count = weight.shape[0]
    kept = (count if keep else 0, *soma.shape)
    return (
        torch.empty_like(soma),
        soma.new_empty_strided(kept, stack_strides(soma)),
        saved_like(soma, x, count, geometry, soma.device),
    )


@op("full_dendrites_backward")
def full_dendrites_backward_op(
    grad: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    frozen: int,
    wants_x: bool,
    wants_weight: bool,
    wants_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `pbfx::full_dendrites`; see `full_gradient.differentiate_full`.

    What is not wanted is empty, `(0,)`.
    """
    geometry = geometry_of(stride, padding, dilation, groups, transposed, output_padding)
    tensors = grad, z, x, weight, bias, to_soma, to_dendrite
    wants = wants_x, wants_weight, wants_sums
    rest = activation, geometry, frozen, wants, True, float32_precision(grad)
    return differentiated(tensors, *rest)


@full_dendrites_backward_op.register_fake
def _(
    grad: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    frozen: int,
    wants_x: bool,
    wants_weight: bool,
    wants_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count, neurons = to_soma.shape
    nothing = no_sums(grad)
    return (
        torch.empty_like(x, dtype=grad.dtype) if wants_x else grad.new_empty(0),
        grad.new_empty(weight.shape) if wants_weight else grad.new_empty(0),
        nothing.new_empty((2 * count + count * count, neurons)) if wants_sums else nothing,
    )


in_graphs(full_dendrites_op, remember, differentiate, with_geometry)
