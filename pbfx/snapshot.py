"""A network kept aside: what the tracker returns to before it grows, and at the end."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor, nn

from pbfx.copies import copies_of, copy_into
from pbfx.parts import adopt, network_state, structure_of
from pbfx.paths import modules_in
from pbfx.structure import Counts, Structure


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A network as it was: its score, the dendrites of each site, and a copy of its tensors."""

    score: float
    structure: Structure
    tensors: dict[str, Tensor]

    @classmethod
    def take(cls, model: nn.Module, score: float) -> Snapshot:
        """Copy the network of `model`."""
        state = network_state(model)
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        copies = iter(copies_of(tensors))
        # A module's extra state can be anything.
        kept = {
            name: next(copies) if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in state.items()
        }
        return cls(score, structure_of(model).without_candidates(), kept)

    def renewed(self, model: nn.Module, score: float) -> Snapshot:
        """Copy the network of `model`, which has the structure that it had here.

        What this snapshot holds is overwritten: many small copies in one call, and no new memory.
        """
        state = network_state(model)
        if not self._fits(state):
            return Snapshot.take(model, score)
        copy_into(list(self.tensors.values()), list(state.values()))
        return dataclasses.replace(self, score=score)

    def _fits(self, state: dict[str, Any]) -> bool:
        """Return whether `state` is of the tensors that are held here, no others, and only them."""
        return state.keys() == self.tensors.keys() and all(
            isinstance(new, Tensor)
            and isinstance(old, Tensor)
            and (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)
            for new, old in zip(state.values(), self.tensors.values(), strict=True)
        )

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
        state = network_state(model)
        if self._fits(state) and _loads_plainly(model, state):
            copy_into(list(state.values()), list(self.tensors.values()))
        else:
            model.load_state_dict(self.tensors)


def _loads_plainly(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Return whether to load a state dict is to copy into `state`, and nothing else happens."""
    modules = modules_in(model).values()
    own = {id(t) for m in modules for held in (m._parameters, m._buffers) for t in held.values()}
    return (
        type(model).load_state_dict is nn.Module.load_state_dict
        and all(id(tensor) in own for tensor in state.values())
        and not any(map(_has_ways_of_loading, modules))
    )


def _has_ways_of_loading(module: nn.Module) -> bool:
    method: Any = type(module)._load_from_state_dict
    hooked = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
    return bool(hooked) or not method.__module__.startswith(("torch.nn.", "pbfx."))
