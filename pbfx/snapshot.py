"""A network kept aside: what the tracker returns to before it grows, and at the end."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor, nn

from pbfx.parts import network_state, parts_of
from pbfx.structure import Counts, Structure


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A network as it was: its score, the dendrites of each part, and a copy of its tensors."""

    score: float
    structures: dict[str, Structure]
    tensors: dict[str, Tensor]

    @classmethod
    def take(cls, model: nn.Module, score: float) -> Snapshot:
        """Copy the network of `model`."""
        return cls(
            score,
            {path: part.structure().without_candidates() for path, part in parts_of(model).items()},
            {name: _copied(value) for name, value in network_state(model).items()},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshot as plain data and tensors."""
        structures = {
            path: {name: counts.dendrites for name, counts in structure.sites.items()}
            for path, structure in self.structures.items()
        }
        return {"score": self.score, "structures": structures, "tensors": self.tensors}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Snapshot:
        """Return the snapshot that `state_dict` described."""
        structures = {
            path: Structure({name: Counts(count) for name, count in sites.items()})
            for path, sites in state["structures"].items()
        }
        return cls(state["score"], structures, dict(state["tensors"]))

    def restore(self, model: nn.Module) -> None:
        """Prune or grow `model` to this structure and copy the tensors back."""
        for path, part in parts_of(model).items():
            if part.structure() != self.structures[path]:
                part.adopt(self.structures[path])
        model.load_state_dict(self.tensors)


def _copied(value: Any) -> Any:
    # A module's extra state can be anything.
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
