"""Argument types that several benchmarks share."""

from __future__ import annotations

import argparse
import math


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _whole(text, 0)


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, got {text!r}"
        )
    return value
