"""Which of pbfx's activations a script means by a function, a module or a word."""

from __future__ import annotations

from typing import Any

from torch import nn

from pbfx import ConfigError

ACTIVATIONS = ("sigmoid", "tanh", "relu", "gelu", "silu")


def activation_name(value: Any, setting: str) -> str:
    """Return the name of an activation, such as `"sigmoid"` for `torch.sigmoid`.

    Args:
        value: a function of torch, an activation module or its class, or a string.
        setting: the name that an error should call it by.

    Raises:
        ConfigError: if pbfx has no such activation.
    """
    if isinstance(value, str):
        name = value
    elif isinstance(value, nn.Module):
        name = type(value).__name__
    else:
        name = getattr(value, "__name__", repr(value))
    name = name.rpartition(".")[2].lower()
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"pbfx.compat: {setting} is no activation that dendrites can have, got {value!r}; "
            f"there are {', '.join(ACTIVATIONS)}"
        )
    return name
