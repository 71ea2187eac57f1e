"""Do a site's candidates correlate with the error on batches that they do not learn from?

The batch is the unit: positions within a map, and examples within a batch, share what is peculiar
to it. For the b-th measuring batch of the phase, with sums over its P positions,

    t_b = Σ_{c,n} s_cn (Σ a g - Σ a Σ g / P)_cn           s = sign(Cov) / σ_g

where s comes from the running moments of the batches that learnt before. Given those, s and the
candidates are fixed, so that under the null hypothesis (on fresh data a and g do not correlate)
each t_b has expectation 0, whatever the neurons have in common and however many candidates there
are: nothing is chosen by what it is tested on. The t_b are martingale differences, and

    t̄ / sqrt(Σ (t_b - t̄)² / (B (B - 1)))

is compared with Student's t of B - 1 degrees of freedom, one-sided.

In the phase's first epoch the data is fresh. From the second on the measuring batches hold examples
that the candidates have learnt from before, and what they have overfitted there looks like
correlation: the test then errs towards growing. A site that is at chance all the same has nothing.

Source: Student 1908; de la Peña, Lai and Shao, *Self-Normalized Processes*, 2009.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pbfx.copies import Filling
from pbfx.learning.epoch import numbers
from pbfx_kernels import Moment

# From here on Student's t is the normal distribution to three digits of its tail at 5 %.
_NORMAL = 500


class Evidence:
    """Collects t_b on the device.

    Args:
        like: the candidates' `moments`, for device and dtype.
        filling: writes the first zeros, with those of others; here if None.
    """

    sums: Tensor

    def __init__(self, like: Tensor, filling: Filling | None = None) -> None:
        memory = Filling() if filling is None else filling
        # B, Σ t, Σ t², Σ P
        memory.place(vars(self), "sums", like, (4,))
        if filling is None:
            memory.fill()


def judge(
    evidence: Sequence[Evidence], spreads: Sequence[float]
) -> list[tuple[float | None, int, float | None]]:
    """Return of each site the mean signed correlation, B, and the p-value. Waits for the device.

    Args:
        evidence: of each site.
        spreads: Σ σ_a over its candidates and neurons, on measuring batches.

    Returns:
        None for what cannot be said yet: the correlation without a batch, the p-value with fewer
        than two.
    """
    verdicts = []
    for sums, spread in zip(numbers([each.sums for each in evidence]), spreads, strict=True):
        batches, total, squares, positions = sums
        number, scale = round(batches), positions * spread
        correlation = total / scale if scale > 0 else 0.0
        verdicts.append((correlation if number else None, number, p_value(number, total, squares)))
    return verdicts


class Weighed(NamedTuple):
    """A batch at S sites, before it is booked: t_b, P and the number of batches measured, (S,)."""

    products: Tensor
    positions: Tensor
    measured: Tensor


def weigh(batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Weighed:
    """Return what a batch says at several sites of one device and dtype; it is still to be booked.

    Few operations, because they come on top of every step of a dendrite phase.

    Args:
        batches: for each site the batch's sums (6 * C, N), the direction (C, N) from the batches
            before, and how many batches have been measured, ().
    """
    products, positions = [], []
    for sums, direction, _ in batches:
        moments = sums.detach().view(len(Moment), *direction.shape)
        count = moments[Moment.COUNT]
        levels = moments[Moment.A] * moments[Moment.G]
        inner = torch.addcdiv(moments[Moment.AG], levels, count, value=-1)
        products.append((inner * direction).sum())
        positions.append(count[0, 0])
    measured = torch.stack([measured for *_, measured in batches])
    return Weighed(torch.stack(products), torch.stack(positions), measured)


def collect(evidence: Sequence[Evidence], weighed: Weighed, measured: Sequence[Tensor]) -> None:
    """Take a batch in at the sites where it was finite and only measured.

    Args:
        evidence: of each site.
        weighed: from `weigh`.
        measured: how many batches have been measured now that it is booked, () each.
    """
    products, positions, before = weighed
    tested = torch.stack(list(measured)) - before
    # What no batch, or one that overflowed, has left is not a number; it does not count.
    rows = torch.stack((torch.ones_like(products), products, products**2, positions), 1)
    rows = rows.nan_to_num(0, 0, 0) * tested[:, None]
    _foreach_add_([each.sums for each in evidence], list(rows.unbind()))


# It has no public name.
_foreach_add_: Any = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]


def p_value(number: int, total: float, squares: float) -> float | None:
    """Return the chance of so large a mean of `number` values whose expectation is 0.

    Args:
        number: how many; with fewer than two nothing can be said.
        total: their sum.
        squares: the sum of their squares.
    """
    if number < 2:
        return None
    mean = total / number
    rest = squares - number * mean**2
    if rest <= 1e-12 * squares:
        # They are all the same: all zero, or as clear as can be.
        return 1.0 if mean <= 0 else 0.0
    # The root first: of values whose squares are next to nothing, the quotient would be nothing.
    return survival(mean * math.sqrt(number * (number - 1)) / math.sqrt(rest), number - 1)


def survival(t: float, freedom: int) -> float:
    """Return P(T > t) for Student's T with `freedom` degrees of freedom.

    Source: Abramowitz and Stegun, *Handbook of Mathematical Functions*, 26.7.3 and 26.7.4.
    """
    if freedom > _NORMAL:
        return 0.5 * math.erfc(t / math.sqrt(2))
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    # The sum of the series, term by term: the ratio of each to the one before is k / (k + 1) cos².
    term, series = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        series += term
        term *= k / (k + 1) * cosine**2
    within = 2 / math.pi * (angle + sine * series) if odd else sine * series
    tail = max(0.0, (1 - within) / 2)
    return tail if t >= 0 else 1 - tail
