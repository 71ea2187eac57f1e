"""How the compatibility layer talks to a script: hints, warnings, and the story of its run."""

from __future__ import annotations

import difflib
import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pbfx import ConfigError


class UnknownNameError(ConfigError, AttributeError):
    """A script asks for a name that `perforatedai` never had, or that means nothing here."""


# The one logger of this layer: what `perforatedai` would have printed goes here.
narration = logging.getLogger("pbfx.compat")

_FOLDER = str(Path(__file__).parent)
_warned: set[str] = set()


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint that names the choice closest to `name`, or a few if none is close."""
    choices = sorted(valid)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join(choices[:8])}{', ...' if len(choices) > 8 else ''}"


def refusing(module: str, valid: Iterable[str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module of a dialect, which names the nearest thing it has."""
    names = [name for name in valid if not name.startswith("_")]

    def __getattr__(name: str) -> Any:
        raise UnknownNameError(
            f"module {module!r} has no attribute {name!r}; {nearest(name, names)}"
        )

    return __getattr__


def warn_once(name: str, reason: str) -> None:
    """Warn, at the script's own line, that `name` does nothing here; once in a process."""
    if name in _warned:
        return
    _warned.add(name)
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_FOLDER):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"pbfx.compat: {name} changes nothing here: {reason}", stacklevel=level)


def forget_warnings() -> None:
    """Warn about everything anew."""
    _warned.clear()


class _LastResort(logging.Handler):
    """Write to stderr for as long as the program has set up no logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, unless somebody else shows it."""
        if not logging.getLogger().handlers:
            sys.stderr.write(f"pbfx: {record.getMessage()}\n")


def speak() -> None:
    """Let a script that knows nothing of logging see the narration.

    These scripts expect to be told how their run goes, and most of them set up no logging.
    """
    if not any(isinstance(handler, _LastResort) for handler in narration.handlers):
        narration.addHandler(_LastResort())
    if narration.level == logging.NOTSET:
        narration.setLevel(logging.INFO)
