"""What a benchmark raises for the runner to turn into an exit code."""

from __future__ import annotations


class UsageError(Exception):
    """The options cannot be honoured; exit 2."""


class GateError(Exception):
    """An output is wrong, so no time may be reported; exit 1."""
