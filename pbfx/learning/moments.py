"""From sums of activation and error to covariance, correlation and predicted gain.

    Cov = E[ag] - E[a]E[g]      r = Cov / (σ_a σ_g)      slope = Σ_p a g  per batch = ∂L/∂T at T = 0

Source: MATH of perforated backpropagation, arXiv 2501.18018; Fahlman and Lebiere 1990.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pbfx_kernels import Moment

# A variance below this share of E[a²] is rounding error: the unit is constant (a saturated tanh, a
# dead relu), its correlation would be noise divided by nothing.
from pbfx_kernels.booking import CONSTANT


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the moments of C candidates on N neurons say; each tensor is (C, N).

    Attributes:
        covariance: of activation and error, per position.
        correlation: in [-1, 1]; 0 where either is constant or nothing was measured.
        activation_variance: population variance of the activation.
        error_mean: mean error per position.
        error_variance: population variance of the error.
        total: Σ_p a g over all positions and batches; per batch it is ∂L/∂T at T = 0.
    """

    covariance: Tensor
    correlation: Tensor
    activation_variance: Tensor
    error_mean: Tensor
    error_variance: Tensor
    total: Tensor


def statistics(sums: Tensor) -> Statistics:
    """Return the statistics of `sums` (6, C, N), the rows in the order of `pbfx_kernels.Moment`.

    No value is read back to the host. Where nothing has been measured everything is 0.
    """
    count = sums[Moment.COUNT].clamp_min(1)
    mean_a, mean_g = sums[Moment.A] / count, sums[Moment.G] / count
    square_a, square_g = sums[Moment.AA] / count, sums[Moment.GG] / count
    covariance = sums[Moment.AG] / count - mean_a * mean_g
    variance_a = (square_a - mean_a**2).clamp_min(0)
    variance_g = (square_g - mean_g**2).clamp_min(0)
    varies = (variance_a > CONSTANT * square_a) & (variance_g > CONSTANT * square_g)
    # Errors of late layers can be 1e-8 and smaller: take the roots first, their product would
    # underflow.
    spread = torch.where(varies, variance_a.sqrt() * variance_g.sqrt(), torch.ones_like(covariance))
    correlation = torch.where(varies, covariance / spread, torch.zeros_like(covariance)).clamp(
        -1, 1
    )
    return Statistics(covariance, correlation, variance_a, mean_g, variance_g, sums[Moment.AG])
