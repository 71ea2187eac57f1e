"""Which models to sweep over, and in which order: every family before any second member."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest

from benchmarks.sweep.language import transformers_names
from benchmarks.sweep.subject import Name
from benchmarks.sweep.vision import timm_names, torchvision_names

NAMES: dict[str, Callable[[], list[Name]]] = {
    "torchvision": torchvision_names,
    "timm": timm_names,
    "transformers": transformers_names,
}


def names_of(libraries: Sequence[str]) -> tuple[dict[str, list[Name]], list[str]]:
    """Return the models of the libraries that are installed, and a note for each that is not."""
    missing = [library for library in libraries if importlib.util.find_spec(library) is None]
    found = {library: NAMES[library]() for library in libraries if library not in missing}
    return found, [f"{library}: skipped, not installed here" for library in missing]


def choose(names: Sequence[Name], limit: int | None) -> list[Name]:
    """Return at most `limit` names: the first of every family, then the second of every family.

    With more families than `limit`, they are taken at even distances, so that no letter of the
    alphabet is left out.
    """
    families: dict[str, list[Name]] = {}
    for name in names:
        families.setdefault(name.family, []).append(name)
    if limit is not None and limit < len(families):
        every = len(families) / limit
        keys = list(families)
        families = {keys[int(i * every)]: families[keys[int(i * every)]] for i in range(limit)}
    turns = zip_longest(*families.values())
    ordered = [name for name in chain.from_iterable(turns) if name is not None]
    return ordered[:limit]


def interleave(groups: Sequence[Sequence[Name]]) -> list[Name]:
    """Return all names, each group spread evenly, so that an early end leaves none of them out."""
    placed = [
        ((place + 0.5) / len(group), number, name)
        for number, group in enumerate(groups)
        for place, name in enumerate(group)
    ]
    return [name for _, _, name in sorted(placed, key=lambda item: item[:2])]
