"""`pbfx::perforated_linear` in eager mode, without the dispatcher.

A graph holds the op. Eager code needs no node, and of few rows, for which soma and dendrites are
one short kernel, the dispatcher and its autograd would be most of what a step costs. Both call
`neuron_op.evaluate`; see `dendrite_autograd`, which does likewise for dendrites alone.
"""

from typing import Any

import torch
from torch import Tensor

from pbfx_kernels import neuron_op


def apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dendrite_weight: Tensor,
    dendrite_bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Do what `pbfx::perforated_linear` does, where `candidate_autograd.runs_eagerly` only.

    Args:
        x: and the rest: as of the op.
        weight: likewise.
        bias: likewise.
        dendrite_weight: likewise.
        dendrite_bias: likewise.
        to_soma: likewise.
        to_dendrite: likewise.
        activation: likewise.
        keep: likewise.

    Raises:
        ArgumentError: the dendrites do not fit the soma (see `dendrites`).
    """
    run = _cxx_apply if torch.is_grad_enabled() else neuron_op.evaluate
    links = dendrite_weight, dendrite_bias, to_soma, to_dendrite, activation
    return run(x, weight, bias, *links, keep)


class _Neurons(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = neuron_op.evaluate(*inputs)
        neuron_op.remember(ctx, inputs, output, ctx.needs_input_grad)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Under `create_graph`, an op says that it has no derivative; a kernel would not.
        return neuron_op.differentiate(ctx, grads[0], torch.is_grad_enabled())


# The C++ half of `Function.apply`; the Python half looks for function transforms once more.
_cxx_apply: Any = super(torch.autograd.Function, _Neurons).apply  # pyright: ignore[reportAttributeAccessIssue]
