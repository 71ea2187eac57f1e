"""Write a picture to a file, with matplotlib, without a display or pyplot's state."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pbfx.errors import ConfigError, DependencyError
from pbfx.files import atomic_path

FORMATS = (".png", ".svg")
_DOTS_PER_INCH = 110


def save(path: str | os.PathLike[str], make: Callable[[], Any]) -> None:
    """Write a figure to `path`, all of it or nothing; equal figures give equal bytes.

    Args:
        path: where to; its suffix says what.
        make: returns the figure.

    Raises:
        ConfigError: if the file is neither PNG nor SVG, or cannot be written.
        DependencyError: if matplotlib is not installed.
    """
    target = Path(path)
    kind = target.suffix.lower()
    if kind not in FORMATS:
        raise ConfigError(
            f"Explanation.draw: the file must end in {' or '.join(FORMATS)}, got {str(target)!r}"
        )
    if not target.parent.is_dir():
        raise ConfigError(f"Explanation.draw: there is no folder {str(target.parent)!r}")
    try:
        import matplotlib
    except ImportError as error:
        raise DependencyError(
            "Explanation.draw needs matplotlib: pip install 'pbfx[plots]'"
        ) from error
    # Neither software nor date; ids in an SVG from a fixed salt, and text as text.
    options: dict[str, Any] = {"metadata": {"Date": None, "Creator": None}}
    if kind == ".png":
        options = {"metadata": {"Software": None}, "pil_kwargs": {"optimize": True}}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pbfx"}):
        figure = make()
        try:
            with atomic_path(target) as temporary:
                figure.savefig(temporary, format=kind[1:], dpi=_DOTS_PER_INCH, **options)
        except OSError as error:
            raise ConfigError(f"Explanation.draw: cannot write {str(target)!r}: {error}") from error
