"""A network kept aside: what the tracker returns to before it grows, and at the end."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pbfx.copies import are_plain, copies_of, copy_alike, copy_into
from pbfx.parts import Walk, Walked, adopt, network_state, structure_of, walk
from pbfx.structure import Counts, Structure


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A network as it was: its score, the dendrites of each site, and a copy of its tensors."""

    score: float
    structure: Structure
    tensors: dict[str, Tensor]
    origin: _Origin | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def take(cls, model: Walked, score: float) -> Snapshot:
        """Copy the network of `model`."""
        found = walk(model)
        state = network_state(found)
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        copies = iter(copies_of(tensors))
        # A module's extra state can be anything.
        kept = {
            name: next(copies) if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in state.items()
        }
        origin = _Origin.of(list(found.modules.values()), state, kept)
        return cls(score, structure_of(found).without_candidates(), kept, origin)

    def renewed(self, model: Walked, score: float) -> Snapshot:
        """Copy the network of `model`, which has the structure that it had here.

        What this snapshot holds is overwritten: many small copies in one call, and no new memory.

        Args:
            model: in a neuron phase.
            score: of its network.
        """
        found = walk(model)
        modules = list(found.modules.values())
        if self.origin is not None and self.origin.copy(modules):
            return dataclasses.replace(self, score=score)
        state = network_state(found)
        if not self._fits(state):
            return Snapshot.take(found, score)
        copy_into(list(self.tensors.values()), list(state.values()))
        # It may have come from a file.
        origin = _Origin.of(modules, state, self.tensors)
        return dataclasses.replace(self, score=score, origin=origin)

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

    def restore(self, model: Walked) -> Walk:
        """Prune or grow `model` to this structure and copy the tensors back.

        Returns:
            A walk over what it is then.
        """
        found = walk(model)
        if adopt(found, self.structure):
            found = walk(found.model)
        state = network_state(found)
        if self._fits(state) and _loads_plainly(found, state):
            copy_into(list(state.values()), list(self.tensors.values()))
        else:
            found.model.load_state_dict(self.tensors)
        return found


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where in a model the tensors of a snapshot come from, so that no name is asked for again.

    Attributes:
        owners: identities of the modules and their tensors, in the order of a walk.
        columns: of tensors that are copied in one call: places in that order, the snapshot's own
            tensors, and what those of the model look like.
    """

    owners: list[int]
    columns: list[tuple[list[int], list[Tensor], _Looks]]

    @classmethod
    def of(
        cls, modules: Sequence[nn.Module], state: dict[str, Any], kept: dict[str, Any]
    ) -> _Origin | None:
        """Return where `state` comes from, None if it is not made of the modules' own tensors."""
        held = _held_by(modules)
        places = {id(tensor): place for place, tensor in enumerate(held)}
        tensors = list(state.values())
        if not are_plain(tensors) or not all(id(tensor) in places for tensor in tensors):
            return None
        columns: dict[Any, tuple[list[int], list[Tensor]]] = {}
        for tensor, copied in zip(tensors, kept.values(), strict=True):
            where, targets = columns.setdefault((tensor.dtype, tensor.device), ([], []))
            where.append(places[id(tensor)])
            targets.append(copied)
        return cls(
            _identities(modules, held),
            [
                (where, targets, _looks_of([held[place] for place in where]))
                for where, targets in columns.values()
            ],
        )

    def copy(self, modules: Sequence[nn.Module]) -> bool:
        """Copy what `modules` hold now; return whether it was done, which it is not for others."""
        held = _held_by(modules)
        if _identities(modules, held) != self.owners:
            return False
        sources = [[held[place] for place in places] for places, _, _ in self.columns]
        # A tensor may have moved, or have another dtype now, and be the same object.
        if any(
            _looks_of(column) != expected
            for column, (_, _, expected) in zip(sources, self.columns, strict=True)
        ):
            return False
        for (_, targets, _), column in zip(self.columns, sources, strict=True):
            copy_alike(targets, column)
        return True


_Looks = tuple[list[torch.Size], list[torch.dtype], list[torch.device]]


def _looks_of(tensors: Sequence[Tensor]) -> _Looks:
    """Return shapes, dtypes and devices, without a call for each of many tensors."""
    return [t.shape for t in tensors], [t.dtype for t in tensors], [t.device for t in tensors]


def _held_by(modules: Sequence[nn.Module]) -> list[Any]:
    """Return parameters and buffers, None among them, in the order of `modules`."""
    held: list[Any] = []
    for module in modules:
        held.extend(module._parameters.values())
        held.extend(module._buffers.values())
    return held


def _identities(modules: Sequence[nn.Module], held: Sequence[Any]) -> list[int]:
    return [*map(id, modules), *map(id, held)]


def _loads_plainly(found: Walk, state: dict[str, Tensor]) -> bool:
    """Return whether to load a state dict is to copy into `state`, and nothing else happens."""
    modules = found.modules.values()
    own = {id(t) for m in modules for held in (m._parameters, m._buffers) for t in held.values()}
    return (
        type(found.model).load_state_dict is nn.Module.load_state_dict
        and all(id(tensor) in own for tensor in state.values())
        and not any(map(_has_ways_of_loading, modules))
    )


def _has_ways_of_loading(module: nn.Module) -> bool:
    method: Any = type(module)._load_from_state_dict
    hooked = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
    return bool(hooked) or not method.__module__.startswith(("torch.nn.", "pbfx."))
