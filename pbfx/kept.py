"""What pbfx remembers of a module that keeps its own forward."""

from __future__ import annotations

import dataclasses

from torch import nn

from pbfx.sites import Skipped

ATTRIBUTE = "pbfx_kept"


@dataclasses.dataclass(frozen=True)
class Kept:
    """Why no graph took the place of a module's forward, and its layers without dendrites.

    `reason` is empty for what has no forward to keep: a container, or a layer that cannot grow.
    """

    reason: str
    skipped: tuple[Skipped, ...] = ()


def kept_modules(model: nn.Module) -> dict[str, Kept]:
    """Return what is known of the modules of `model` that keep their own forward, by path."""
    return {
        path: module.__dict__[ATTRIBUTE]
        for path, module in model.named_modules()
        if ATTRIBUTE in module.__dict__
    }
