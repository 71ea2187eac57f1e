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

import pbfx_kernels.ops  # noqa: F401  registers the ops


def stacked_flops(soma: Sequence[int], weight: Sequence[int]) -> int:
    """Count `V_d x` for all d.

    Args:
        soma: shape of the soma's output.
        weight: `(D, N, K)` or `(D, N, channels / groups, *kernel)`.
    """
    dendrites, _, *inputs = weight
    return 2 * dendrites * math.prod(soma) * math.prod(inputs)


@register_flop_formula(torch.ops.pbfx.dendrites)
def dendrites_flops(
    soma: Sequence[int], x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any
) -> int:
    """Count `pbfx::dendrites`; its backward by saved activations has no GEMM."""
    return stacked_flops(soma, weight)


@register_flop_formula(torch.ops.pbfx.dendrites_recompute)
def dendrites_recompute_flops(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any
) -> int:
    """Count `pbfx::dendrites_recompute`."""
    return stacked_flops(grad, weight)


@register_flop_formula(torch.ops.pbfx.candidates)
def candidates_flops(
    neuron: Sequence[int],
    x: Sequence[int],
    activations: Sequence[int],
    weight: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """Count `pbfx::candidates`."""
    return stacked_flops(neuron, weight)


@register_flop_formula(torch.ops.pbfx.candidates_backward)
def candidates_backward_flops(
    grad: Sequence[int],
    z: Sequence[int],
    x: Sequence[int],
    activations: Sequence[int],
    direction: Sequence[int],
    error_mean: Sequence[int],
    weight_shape: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """Count `pbfx::candidates_backward`: one weight gradient for all candidates."""
    return stacked_flops(grad, weight_shape)
