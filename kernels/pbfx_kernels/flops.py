"""FLOP formulas of the ops, for `torch.utils.flop_counter`.

They are registered by importing this module, which is not part of `import pbfx_kernels`: torch's
counter imports triton. As torch's own formulas, they count the multiply-adds of GEMMs and
convolutions, two each, and nothing element-wise.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# They register their ops and those of `pbfx_kernels.ops`.
import pbfx_kernels.conv_neuron_op
import pbfx_kernels.depthwise_op
import pbfx_kernels.frozen
import pbfx_kernels.neuron_op  # noqa: F401
from pbfx_kernels.geometry import Geometry


def stacked_flops(
    soma: Sequence[int], x: Sequence[int], weight: Sequence[int], transposed: bool = False
) -> int:
    """Count `V_d x` for all d.

    Args:
        soma: shape of the soma's output.
        x: shape of the soma's input.
        weight: `(D, N, K)`, `(D, N, channels / groups, *kernel)` or, transposed, `(D, channels,
            N / groups, *kernel)`.
        transposed: of the soma's geometry.
    """
    dendrites, _, *inputs = weight
    # Each output has so many inputs, or, transposed, each input so many outputs.
    return 2 * dendrites * math.prod(x if transposed else soma) * math.prod(inputs)


@register_flop_formula(torch.ops.pbfx.dendrites)
def dendrites_flops(
    soma: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any
) -> int:
    """Count `pbfx::dendrites`; its backward by saved activations has no GEMM."""
    # bias, to_soma, to_dendrite, activation, stride, padding, dilation, groups, transposed
    return stacked_flops(soma, x, weight, rest[8])


@register_flop_formula(torch.ops.pbfx.full_dendrites)
def full_dendrites_flops(
    soma: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any
) -> int:
    """Count `pbfx::full_dendrites`."""
    # bias, to_soma, to_dendrite, activation, stride, padding, dilation, groups, transposed
    return stacked_flops(soma, x, weight, rest[8])


@register_flop_formula(torch.ops.pbfx.full_dendrites_backward)
def full_dendrites_backward_flops(
    grad: Sequence[int],
    z: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    *rest: Any,
    **_: Any,
) -> int:
    """Count `pbfx::full_dendrites_backward`: a product each for the input and for the weights."""
    # bias, to_soma, to_dendrite, activation, stride, padding, dilation, groups, transposed,
    # output_padding, frozen, wants_x, wants_weight
    transposed, frozen, wants_x, wants_weight = rest[8], *rest[10:13]
    count = weight[0]
    # What is frozen is left out where no error has to go through it.
    learning = count if wants_x else count - frozen
    products = wants_x + (wants_weight and frozen < count)
    return products * stacked_flops(grad, x, (learning, *weight[1:]), transposed)


@register_flop_formula(torch.ops.pbfx.perforated_linear)
def perforated_linear_flops(
    x: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    dendrite_weight: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """Count `pbfx::perforated_linear`: its soma and its dendrites; its backward is plain ops."""
    return 2 * math.prod(x) * weight[0] * (1 + dendrite_weight[0])


@register_flop_formula(torch.ops.pbfx.perforated_conv2d)
def perforated_conv2d_flops(
    x: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    dendrite_weight: Sequence[int],
    *rest: Any,
    **_: Any,
) -> int:
    """Count `pbfx::perforated_conv2d`: its soma and its dendrites."""
    # dendrite_bias, to_soma, to_dendrite, activation, stride, padding, dilation, groups, keep
    stride, padding, dilation, groups = rest[4:8]
    return _convolution_flops(x, weight, dendrite_weight, stride, padding, dilation, groups)


@register_flop_formula(torch.ops.pbfx.perforated_depthwise)
def perforated_depthwise_flops(
    x: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    dendrite_weight: Sequence[int],
    *rest: Any,
    **_: Any,
) -> int:
    """Count `pbfx::perforated_depthwise`: its soma and its dendrites."""
    # dendrite_bias, to_soma, to_dendrite, activation, stride, padding, dilation
    stride, padding, dilation = rest[4:7]
    return _convolution_flops(x, weight, dendrite_weight, stride, padding, dilation, weight[0])


@register_flop_formula(torch.ops.pbfx.perforated_depthwise_backward)
def perforated_depthwise_backward_flops(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    dendrite_weight: Sequence[int],
    *rest: Any,
    **_: Any,
) -> int:
    """Count `pbfx::perforated_depthwise_backward`: dx, dW, and the dendrites computed again."""
    # dendrite_bias, to_dendrite, activation, stride, padding, dilation, needs_x, needs_weight,
    # needs_links
    needs_x, needs_weight, needs_links = rest[6:9]
    products = needs_x + needs_weight + needs_links * dendrite_weight[0]
    return 2 * products * math.prod(grad) * math.prod(weight[1:])


def _convolution_flops(
    x: Sequence[int],
    weight: Sequence[int],
    dendrite_weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> int:
    form = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    return stacked_flops(form.output_shape(x, weight), x, (1 + dendrite_weight[0], *weight))


@register_flop_formula(torch.ops.pbfx.frozen_neurons)
def frozen_neurons_flops(
    x: Sequence[int],
    weights: Sequence[int],
    bias: Sequence[int] | None,
    to_soma: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """Count `pbfx::frozen_neurons`, without the rows of zeros."""
    dendrites, neurons = to_soma
    return 2 * math.prod(x) * neurons * (1 + dendrites)


@register_flop_formula(torch.ops.pbfx.dendrites_recompute)
def dendrites_recompute_flops(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any
) -> int:
    """Count `pbfx::dendrites_recompute`."""
    # bias, to_dendrite, activation, stride, padding, dilation, groups, transposed
    return stacked_flops(grad, x, weight, rest[7])


@register_flop_formula(torch.ops.pbfx.candidates)
def candidates_flops(
    neuron: Sequence[int],
    x: Sequence[int],
    activations: Sequence[int],
    weight: Sequence[int],
    *rest: Any,
    **_: Any,
) -> int:
    """Count `pbfx::candidates`."""
    # bias, to_dendrite, moments, direction, error_mean, regression, activation, stride, padding,
    # dilation, groups, transposed
    return stacked_flops(neuron, x, weight, rest[11])


@register_flop_formula(torch.ops.pbfx.candidate_preactivations)
def candidate_preactivations_flops(
    neuron: Sequence[int],
    x: Sequence[int],
    activations: Sequence[int],
    weight: Sequence[int],
    *rest: Any,
    **_: Any,
) -> int:
    """Count `pbfx::candidate_preactivations`."""
    # bias, to_dendrite, stride, padding, dilation, groups, transposed
    return stacked_flops(neuron, x, weight, rest[6])


@register_flop_formula(torch.ops.pbfx.candidates_backward)
def candidates_backward_flops(
    grad: Sequence[int],
    z: Sequence[int],
    x: Sequence[int],
    activations: Sequence[int],
    direction: Sequence[int],
    error_mean: Sequence[int],
    regression: Sequence[int] | None,
    weight_shape: Sequence[int],
    *rest: Any,
    **_: Any,
) -> int:
    """Count `pbfx::candidates_backward`: one weight gradient for all candidates."""
    # activation, stride, padding, dilation, groups, transposed
    return stacked_flops(grad, x, weight_shape, rest[5])
