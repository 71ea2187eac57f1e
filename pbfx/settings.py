"""Settings that may be one value, or a list of values indexed by the number of dendrites.

`patience=[10, 5]` is 10 before the first dendrite and 5 from then on: the last value stands for all
numbers of dendrites beyond the list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
PerDendrite: TypeAlias = T | Sequence[T]


def at(setting: T | Sequence[T], dendrites: int) -> T:
    """Return what `setting` is at so many dendrites."""
    if isinstance(setting, (list, tuple)):
        return setting[min(dendrites, len(setting) - 1)]
    return setting  # pyright: ignore[reportReturnType]  # no other sequence is a setting


def freeze_lists(owner: Any, *names: str) -> None:
    """Turn lists among the named fields of a frozen dataclass into tuples, which cannot change."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, list):
            object.__setattr__(owner, name, tuple(value))


def named_values(name: str, setting: Any) -> Iterator[tuple[str, Any]]:
    """Yield every value of a setting with the name that an error should call it by."""
    if isinstance(setting, (list, tuple)):
        yield from ((f"{name}[{index}]", value) for index, value in enumerate(setting))
    else:
        yield name, setting


def is_empty(setting: Any) -> bool:
    """Return whether `setting` is a list of nothing, which says nothing."""
    return isinstance(setting, (list, tuple)) and not setting


def number_faults(owner: Any, least: dict[str, float], optional: frozenset[str]) -> list[str]:
    """Return what is wrong with numeric settings.

    Args:
        owner: has them as attributes.
        least: the smallest value of each; whole numbers only where it is an int itself.
        optional: those that may also be None.
    """
    faults = []
    for setting, bound in least.items():
        if is_empty(getattr(owner, setting)):
            faults.append(f"{setting} must not be an empty list")
        for name, value in named_values(setting, getattr(owner, setting)):
            if value is None and setting in optional:
                continue
            if not _is_at_least(value, bound):
                kind = "a whole number" if isinstance(bound, int) else "a finite number"
                faults.append(f"{name} must be {kind} of at least {bound}, got {value!r}")
    return faults


def _is_at_least(value: Any, bound: float) -> bool:
    kinds = int if isinstance(bound, int) else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= bound
