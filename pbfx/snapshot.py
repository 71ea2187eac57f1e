"""A network kept aside: what the tracker returns to before it grows, and at the end."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pbfx.parts import adopt, network_state, structure_of
from pbfx.structure import Counts, Structure

# It has no public name.
_foreach_copy_: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A network as it was: its score, the dendrites of each site, and a copy of its tensors."""

    score: float
    structure: Structure
    tensors: dict[str, Tensor]

    @classmethod
    def take(cls, model: nn.Module, score: float) -> Snapshot:
        """Copy the network of `model`."""
        return cls(
            score,
            structure_of(model).without_candidates(),
            {name: _copied(value) for name, value in network_state(model).items()},
        )

    @torch.no_grad()
    def renewed(self, model: nn.Module, score: float) -> Snapshot:
        """Copy the network of `model`, which has the structure that it had here.

        What this snapshot holds is overwritten: many small copies in one call, and no new memory.
        """
        state = network_state(model)
        fits = state.keys() == self.tensors.keys() and all(
            isinstance(new, Tensor)
            and isinstance(old, Tensor)
            and (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)
            for new, old in zip(state.values(), self.tensors.values(), strict=True)
        )
        if not fits:
            return Snapshot.take(model, score)
        _foreach_copy_(list(self.tensors.values()), list(state.values()))
        return dataclasses.replace(self, score=score)

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshot as plain data and tensors."""
        sites = self.structure.sites
        return {
            "score": self.score,
            "dendrites": {name: counts.dendrites for name, counts in sites.items()},
            "channels": {n: list(c.channels) for n, c in sites.items() if c.channels is not None},
            "tensors": self.tensors,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Snapshot:
        """Return the snapshot that `state_dict` described."""
        channels = {name: tuple(numbers) for name, numbers in state.get("channels", {}).items()}
        sites = {
            name: Counts(count, channels=channels.get(name))
            for name, count in state["dendrites"].items()
        }
        return cls(state["score"], Structure(sites), dict(state["tensors"]))

    def restore(self, model: nn.Module) -> None:
        """Prune or grow `model` to this structure and copy the tensors back."""
        adopt(model, self.structure)
        model.load_state_dict(self.tensors)


def _copied(value: Any) -> Any:
    # A module's extra state can be anything.
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
