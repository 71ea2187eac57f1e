"""From the tutorial's camelCase to 3.x's snake_case, and back."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any


def snake(name: str) -> str:
    """Return `name` in snake_case, with `pai` where the tutorial's dialect said PB.

    `doingPB` becomes `doing_pai`, `addValidationScore` `add_validation_score`.
    """
    words = re.sub(r"([a-z0-9])([A-Z])|([A-Z]+)([A-Z][a-z])", r"\1\3_\2\4", name).lower()
    return re.sub(r"(^|_)pb($|_)", r"\1pai\2", words)


def camel(name: str) -> str:
    """Return `name`, which is in snake_case, in camelCase, with PB where 3.x says `pai`."""
    first, *rest = ("PB" if word == "pai" else word for word in name.split("_"))
    return first + "".join(word if word == "PB" else word.capitalize() for word in rest)


def spoken_in_camel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with keyword arguments in camelCase."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{snake(name): value for name, value in kwargs.items()})

    return call
