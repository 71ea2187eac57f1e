"""How many dendrites and candidates each site has, as plain data.

A structure can be read off a live module or off the keys and shapes of a state dict, so that a
checkpoint says by itself what has to be grown before it can be loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pbfx.errors import CheckpointError
from pbfx.phase import Phase
from pbfx.sites import Site, why_no_subset


@dataclasses.dataclass(frozen=True)
class Counts:
    """D accepted dendrites and C candidates per neuron of one site.

    `channels` are the neurons that have them, in increasing order, None for all of the op's.
    """

    dendrites: int = 0
    candidates: int = 0
    channels: tuple[int, ...] | None = None


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
            {
                name: Counts(c.dendrites, channels=c.channels)
                for name, c in self.sites.items()
                if c.dendrites
            }
        )


def structure_of_keys(
    state_dict: Mapping[str, Any], prefix: str, sites: Iterable[Site]
) -> Structure | None:
    """Return the structure that the keys under `prefix` describe; None without any dendrites.

    Raises:
        CheckpointError: if channels are listed that a site does not have, or that its dendrites
            cannot be on.
    """

    def rows(key: str) -> int:
        value = state_dict.get(key)
        return 0 if value is None else int(value.shape[0])

    found = {}
    for site in sites:
        path = f"{prefix}{site.dendrites}"
        if f"{path}.weight" in state_dict:
            key, channels = f"{path}.channels", None
            if key in state_dict:
                channels = channels_of(state_dict[key], key)
                fault = why_no_subset(site, channels)
                if fault or len(channels) == site.neurons:
                    fault = fault or "it is absent where dendrites are on all channels"
                    raise CheckpointError(f"{key} does not fit the site {site.name!r}: {fault}")
            found[site.name] = Counts(
                rows(f"{path}.weight"), rows(f"{path}.candidates.weight"), channels
            )
    return Structure(found) if found else None


def channels_of(value: Any, key: str) -> tuple[int, ...]:
    """Return the channels that a state dict lists.

    Averages over state dicts leave whole numbers slightly off, so that these are rounded.

    Args:
        value: (n,), a tensor of any dtype, increasing.
        key: its name in the state dict.

    Raises:
        CheckpointError: if it does not list whole, increasing numbers.
    """
    given = value.flatten().tolist() if isinstance(value, torch.Tensor) else []
    channels = tuple(round(number) for number in given)
    exact = all(abs(number - whole) < 0.01 for number, whole in zip(given, channels, strict=True))
    if not channels or not exact or list(channels) != sorted(set(channels)):
        shown = given if given else repr(value)
        raise CheckpointError(
            f"{key} must list channels as increasing whole numbers, got {shown}; half precision "
            "has none above 2048: leave the dtype of this key as it is"
        )
    return channels
