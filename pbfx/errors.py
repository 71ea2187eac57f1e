"""Everything pbfx raises on purpose.

One base class to catch, one subclass per kind of mistake. Subclasses also derive from the builtin
that a PyTorch user would expect (`ValueError` for a bad argument, `RuntimeError` for a bad state),
so code that already catches those keeps working. Messages say what, where (the module path), why,
and what to do now.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PbfxError(Exception):
    """Catch every error that pbfx raises on purpose."""


class ConfigError(PbfxError, ValueError):
    """An argument or setting has a value that pbfx cannot honour."""


class CaptureError(PbfxError, RuntimeError):
    """The model cannot be captured as a graph, or holds nothing that can carry dendrites.

    Attributes:
        culprit: the innermost module whose forward could not be traced, if it is known.
    """

    culprit: object = None


class PassError(PbfxError, RuntimeError):
    """A graph pass failed or broke its contract; the model's graph is as it was before."""


class RestructureError(PbfxError, RuntimeError):
    """Dendrites could not be added or removed; model, optimizer and scheduler are as they were."""


class ScoreError(PbfxError, ValueError):
    """A validation score is not a finite number; the tracker has not moved."""


class TrackerError(PbfxError, RuntimeError):
    """The tracker was given parts that do not belong together, or is used out of turn."""


class CheckpointError(PbfxError, RuntimeError):
    """A file cannot be read as a pbfx checkpoint, or does not fit the model."""


class DependencyError(PbfxError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint that names the valid choices, the closest to `name` first.

    Args:
        name: what was given.
        valid: what would have been accepted.

    Returns:
        `"did you mean 'fc1'? valid: 'conv1', 'fc1'"`, at most twelve choices long.
    """
    choices = sorted(valid)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.4)
    shown = ", ".join(repr(choice) for choice in choices[:12])
    rest = f", and {len(choices) - 12} more" if len(choices) > 12 else ""
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}valid: {shown}{rest}"
