"""How many dendrites and candidates each site has, as plain data.

A structure can be read off a live module or off the keys and shapes of a state dict, so that a
checkpoint says by itself what has to be grown before it can be loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from pbfx.phase import Phase
from pbfx.sites import Site


@dataclasses.dataclass(frozen=True)
class Counts:
    """D accepted dendrites and C candidates per neuron of one site."""

    dendrites: int = 0
    candidates: int = 0


@dataclasses.dataclass(frozen=True)
class Structure:
    """Counts by the name of the site; sites that have nothing are left out."""

    sites: dict[str, Counts]

    @property
    def phase(self) -> Phase:
        """The phase that this structure is in: candidates exist in the dendrite phase only."""
        return (
            Phase.DENDRITE
            if any(counts.candidates for counts in self.sites.values())
            else Phase.NEURON
        )

    @property
    def dendrites(self) -> int:
        """D of the most grown site."""
        return max((counts.dendrites for counts in self.sites.values()), default=0)

    def without_candidates(self) -> Structure:
        """Return the structure of the network alone."""
        return Structure(
            {name: Counts(c.dendrites) for name, c in self.sites.items() if c.dendrites}
        )


def structure_of_keys(
    state_dict: Mapping[str, Any], prefix: str, sites: Iterable[Site]
) -> Structure | None:
    """Return the structure that the keys under `prefix` describe; None without any dendrites."""

    def rows(key: str) -> int:
        value = state_dict.get(key)
        return 0 if value is None else int(value.shape[0])

    found = {}
    for site in sites:
        path = f"{prefix}{site.dendrites}"
        if f"{path}.weight" in state_dict:
            found[site.name] = Counts(rows(f"{path}.weight"), rows(f"{path}.candidates.weight"))
    return Structure(found) if found else None
