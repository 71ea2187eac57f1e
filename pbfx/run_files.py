"""The files that a run leaves in its directory."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from pbfx import checkpoint
from pbfx.checkpoint import Resumable
from pbfx.errors import TrackerError
from pbfx.history import Epoch, write_history


def made(directory: str | os.PathLike[str]) -> Path:
    """Return `directory`, made with all above it if it was not there.

    Raises:
        TrackerError: if it cannot be made.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackerError(f"directory {folder} cannot be made: {error}") from error
    return folder


def write_best(directory: Path | None, model: nn.Module) -> None:
    """Write `best.safetensors`; nothing without a directory."""
    if directory is not None:
        checkpoint.save(model, directory / "best.safetensors")


def write_last(
    directory: Path | None, model: nn.Module, tracker: Resumable, history: tuple[Epoch, ...]
) -> None:
    """Write `last.safetensors`, to resume from, and the tables; nothing without a directory."""
    if directory is not None:
        checkpoint.save(model, directory / "last.safetensors", tracker)
        write_history(history, directory)
