"""Means with their intervals: what a handful of paired runs allows to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its two-sided Student-t interval; one value alone has no interval (NaN)."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        """Return what stands after ± (NaN for one value)."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """The paired difference treated - control, also as a share of the control's mean."""

    difference: Estimate
    relative: float

    @property
    def verdict(self) -> str:
        """Return `lower` or `higher` where the interval excludes zero, else `undecided`."""
        if self.difference.high < 0:
            return "lower"
        if self.difference.low > 0:
            return "higher"
        return "undecided"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of `values` with mean ± t(0.975, n-1)·s/√n.

    Raises:
        ValueError: there are no values.
    """
    count = len(values)
    if count == 0:
        raise ValueError("an estimate needs at least one value, got none")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, math.nan, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half, count)


def compare(treated: Sequence[float], control: Sequence[float]) -> Comparison:
    """Compare two series pair by pair; their i-th values must come from the same seed.

    Raises:
        ValueError: the series differ in length.
    """
    if len(treated) != len(control):
        raise ValueError(
            f"pairs are needed, got {len(treated)} treated and {len(control)} controls"
        )
    difference = estimate([left - right for left, right in zip(treated, control, strict=True)])
    base = math.fsum(control) / len(control)
    return Comparison(difference, difference.mean / base if base else math.nan)
