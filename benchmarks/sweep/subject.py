"""What a sweep is made of: the model's name before it is built, and the model ready to run."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

LIBRARIES = ("torchvision", "timm", "transformers")
# float32 parameters that a model may have: sixteen processes hold two copies each at times.
MAX_PARAMETERS = 150_000_000


class NotBuilt(Exception):
    """The library could not build the model, or the plain model did not run; pbfx had no part."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A model of a library, and the family that it belongs to."""

    library: str
    model: str
    family: str


@dataclasses.dataclass(frozen=True)
class Subject:
    """A plain model that has run.

    Attributes:
        model: with its own random weights.
        settings: how it was built and fed, in a few words.
        train: positional and named arguments of a forward in training mode.
        eval: those of evaluation.
    """

    model: nn.Module
    settings: str
    train: tuple[tuple[Any, ...], dict[str, Any]]
    eval: tuple[tuple[Any, ...], dict[str, Any]]


def check_size(parameters: int) -> None:
    """Refuse a model that is too large for a sweep.

    Raises:
        NotBuilt: with the number.
    """
    if parameters > MAX_PARAMETERS:
        raise NotBuilt(
            f"too large for the sweep: {parameters / 1e6:.0f} M parameters, limit "
            f"{MAX_PARAMETERS / 1e6:.0f} M"
        )
