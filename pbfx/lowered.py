"""The module that `pbfx.lower` puts in the place of a perforated one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import Tensor, fx, nn

from pbfx.capture import REGISTRIES
from pbfx.errors import CheckpointError
from pbfx.kinds import GRAPH_MODULE_STATE, mixed_with
from pbfx.neurons import Neurons
from pbfx.pipeline import PassRecord
from pbfx.plain_graph import graph_of, named, plain_nodes

_HOOKS = tuple(name for name in REGISTRIES if "hook" in name)
# Ours, beside what fx keeps.
_OURS = frozenset({"records", "notes", "kind"})


class LoweredModule(fx.GraphModule):
    """A graph for inference, with packed weights and nothing that it does not read.

    `train()` has no effect on it. It is copied and pickled as a list of nodes.

    Attributes:
        records: what the passes of `pbfx.lower` did.
        notes: sites whose soma stays an op of its own, and why, by name.
        kind: the user's class that it is an instance of too, None for a whole model.
    """

    records: tuple[PassRecord, ...]
    notes: Mapping[str, str]
    kind: type[nn.Module] | None

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        class_name: str,
        kind: type[nn.Module] | None,
        records: tuple[PassRecord, ...] = (),
        notes: Mapping[str, str] | None = None,
    ) -> None:
        # Of modules and tensors, it takes over those that the graph reads.
        super().__init__(root, graph, class_name)
        self.records, self.notes, self.kind = records, dict(notes or {}), kind
        for name in _HOOKS:
            self.__dict__[name] = copy.copy(root.__dict__[name])
        if kind is not None:
            for name, value in root.__dict__.items():
                if name not in GRAPH_MODULE_STATE | REGISTRIES | _OURS and _is_plain(value):
                    self.__dict__.setdefault(name, value)
        if isinstance(self._modules.get("neurons"), Neurons):
            _answer_for_soma(type(self))
        LoweredModule.train(self)

    @staticmethod
    def over(
        root: nn.Module,
        graph: fx.Graph,
        class_name: str,
        kind: type[nn.Module] | None,
        records: tuple[PassRecord, ...],
        notes: Mapping[str, str],
    ) -> LoweredModule:
        """Return a lowered module over `root`, an instance of `kind` too if that is given."""
        return _class_of(kind)(root, graph, class_name, kind, records, notes)

    def train(self, mode: bool = True) -> LoweredModule:
        """Stay in eval, whatever the mode."""
        for module in self.modules():
            if module.training:
                module.training = False
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LoweredModule:
        kind = type(self)
        twin = memo[id(self)] = kind.__new__(kind)
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        _fill(twin, kind.__name__, graph, copy.deepcopy(_attributes(self), memo))
        return twin

    def __copy__(self) -> LoweredModule:
        tensors = [*self.parameters(), *self.buffers()]
        return copy.deepcopy(self, {id(tensor): tensor for tensor in tensors})

    def __reduce__(self) -> tuple[Any, ...]:
        name = type(self).__name__
        if self.kind is not None and named(self.kind) is None:
            raise CheckpointError(
                f"a lowered {name} cannot be pickled: its class {self.kind.__module__}."
                f"{self.kind.__qualname__} cannot be imported by that name; define it at the top "
                "level of a module, or export it (torch.export.export)"
            )
        nodes = plain_nodes(self.graph, f"the lowered {name}")
        return _blank, (self.kind,), (name, nodes, _attributes(self)), None, None, _restore


def _class_of(kind: type[nn.Module] | None) -> type[LoweredModule]:
    return LoweredModule if kind is None else mixed_with(LoweredModule, kind)


def _attributes(module: LoweredModule) -> dict[str, Any]:
    return {k: v for k, v in module.__dict__.items() if k not in GRAPH_MODULE_STATE}


def _blank(kind: type[nn.Module] | None) -> LoweredModule:
    """Return a module without any state, for `_restore`."""
    made = _class_of(kind)
    return made.__new__(made)


def _restore(module: LoweredModule, state: tuple[str, Any, dict[str, Any]]) -> None:
    name, nodes, attributes = state
    _fill(module, name, graph_of(nodes), attributes)


def _fill(module: LoweredModule, name: str, graph: fx.Graph, attributes: dict[str, Any]) -> None:
    shell = nn.Module()
    shell.__dict__.update(attributes)
    kind, records, notes = (attributes[key] for key in ("kind", "records", "notes"))
    LoweredModule.__init__(module, shell, graph, name, kind, records, notes)


def _is_plain(value: Any) -> bool:
    """Return whether an attribute holds no part of the model, which may have been taken apart."""
    if isinstance(value, (nn.Module, Tensor, MethodType)):
        return False
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return True


def _answer_for_soma(own: type[LoweredModule]) -> None:
    """Let a layer that was lowered by itself answer for the weight and bias of its soma.

    Forwards outside of graphs ask for these (`self.wo.weight.dtype`). fx gives each graph module a
    class of its own, and this is that of one layer.
    """
    for role in ("weight", "bias"):
        reader = property(lambda layer, role=role: layer._modules["neurons"].soma(role))
        setattr(own, role, reader)
