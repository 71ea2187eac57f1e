"""Copies that an `AveragedModel` made of a perforated module follow its structure."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Protocol

import torch
from torch.optim.swa_utils import AveragedModel

from pbfx.dendrites import Dendrites
from pbfx.paths import join
from pbfx.perforation import Perforation
from pbfx.structure import Counts, Structure


class Part(Protocol):
    """What is asked of a perforated module."""

    perforation: Perforation

    def structure(self) -> Structure:
        """Return how many dendrites and candidates each site has."""
        ...

    def adopt(self, structure: Structure) -> None:
        """Take on `structure`."""
        ...

    def grown(self) -> dict[str, Dendrites]:
        """Return the dendrites modules that exist now, by the name of their site."""
        ...


Parts = Mapping[str, Part]


@torch.no_grad()
def imitate(twins: Parts, parts: Parts) -> None:
    """Give `twins` the structure of `parts`, and the values of what is new there.

    What they compute changes only if they lose dendrites: new ones have no weight yet. Parts inside
    count as well, since hooks may have split one of the two.

    Args:
        twins: the perforated modules in a copy, by path.
        parts: those in the module that it was copied from.
    """
    theirs = _dendrites(parts)
    known = {name: module.counts for name, module in _dendrites(twins).items()}
    changed = False
    for path, twin in twins.items():
        names = {site.name: join(path, site.name) for site in twin.perforation.sites}
        wanted = {n: theirs[full].counts for n, full in names.items() if full in theirs}
        if twin.structure() != Structure(wanted):
            twin.adopt(Structure(wanted))
            changed = True
    for name, mine in _dendrites(twins).items() if changed else ():
        before = known.get(name, Counts())
        first = before.dendrites if before.channels == mine.site.channels else 0
        for role, values in theirs[name].named_parameters(recurse=False):
            mine.get_parameter(role)[first:].copy_(values[first:])
        pool = theirs[name].candidates
        if mine.candidates is not None and pool is not None:
            mine.candidates.load_state_dict(pool.state_dict())


def _dendrites(parts: Parts) -> dict[str, Dendrites]:
    """Return the dendrites modules of `parts`, by the full path of the site."""
    return {
        join(path, name): module
        for path, part in parts.items()
        for name, module in part.grown().items()
    }


def is_averaging() -> bool:
    """Return whether an `AveragedModel` is being made, and this copy is the one that it keeps."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is AveragedModel.__init__.__code__:
            return True
        frame = frame.f_back
    return False
