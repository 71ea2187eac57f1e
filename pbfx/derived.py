"""Graphs that have been derived before: a model that goes through its phases again has the same.

    neuron phase -> dendrite phase -> neuron phase -> dendrite phase
       derived         derived         derived        taken up

What the passes make of a source graph depends on where dendrites and candidates are and not on how
many, and on what the passes read of the modules in the graph. Where all of that is as it was, the
graph and its forward are taken up: the forward under a code object of its own, by which Dynamo
sees that there is something to compile.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import fx, nn

from pbfx.dendrites import Dendrites
from pbfx.paths import module_at
from pbfx.phase import Phase
from pbfx.pipeline import PassRecord, content_of, is_same
from pbfx.sites import Site

# What passes read of a module beside its class, its hooks and which of its tensors there are.
_PLAIN = frozenset((bool, int, float, str, tuple, type(None)))
# What `fx.GraphModule.recompile` leaves on the module, beside the forward of its class.
_COMPILED = ("_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec")
# A growth at some sites only is a graph of its own.
_MOST = 8


# The graph that others are derived from, and where dendrites may grow.
Origin = tuple[fx.Graph, tuple[Site, ...]]


class Derived(NamedTuple):
    """A graph, and what belongs to it."""

    graph: fx.Graph
    content: list[Any]
    records: tuple[PassRecord, ...]
    compiled: dict[str, Any]
    forward: Callable[..., Any]


class DerivedGraphs:
    """The graphs derived from one source graph and its sites, those used last at the end."""

    def __init__(self) -> None:
        self._origin: Origin | None = None
        self._known: dict[Hashable, Derived] = {}

    def take_up(self, gm: fx.GraphModule, origin: Origin, key: Hashable) -> Derived | None:
        """Let `gm` run the graph that was derived of `origin` under this key.

        Args:
            gm: edited in place if there is one.
            origin: source graph and sites.
            key: see `key_of`.

        Returns:
            What was taken up; None if there is none, or someone has edited it since.
        """
        known = self._known.pop(key, None) if self._is_of(origin) else None
        if known is None or not is_same(content_of(known.graph), known.content):
            return None
        self._known[key] = known
        gm._graph = known.graph
        vars(gm).update(known.compiled)
        old: Any = known.forward
        new = types.FunctionType(
            old.__code__.replace(), old.__globals__, old.__name__, old.__defaults__, old.__closure__
        )
        new.__annotations__, new.__kwdefaults__ = old.__annotations__, old.__kwdefaults__
        type(gm).forward = new
        return known

    def keep(
        self,
        gm: fx.GraphModule,
        origin: Origin,
        key: Hashable,
        records: tuple[PassRecord, ...],
    ) -> None:
        """Remember the graph that `gm` runs now.

        Args:
            gm: just recompiled.
            origin: source graph and sites.
            key: see `key_of`.
            records: what the passes did.
        """
        if not self._is_of(origin):
            self._origin = origin
            self._known.clear()
        compiled = {name: vars(gm)[name] for name in _COMPILED if name in vars(gm)}
        graph = gm._graph
        self._known[key] = Derived(graph, content_of(graph), records, compiled, type(gm).forward)
        while len(self._known) > _MOST:
            del self._known[next(iter(self._known))]

    def _is_of(self, origin: Origin) -> bool:
        known = self._origin
        return known is not None and all(map(operator.is_, known, origin))


def key_of(gm: fx.GraphModule, origin: Origin, phase: Phase) -> Hashable | None:
    """Return what the graph that passes derive depends on beside its origin.

    Args:
        gm: over whose modules the graph runs.
        origin: source graph, and sites that may have dendrites.
        phase: that it is for.

    Returns:
        None where that cannot be said.
    """
    source, sites = origin
    seen: list[Any] = [phase]
    for site in sites:
        owner, _, name = site.dendrites.rpartition(".")
        grown = module_at(gm, owner)._modules.get(name)
        held = isinstance(grown, Dendrites) and grown.candidates is not None
        seen.append((grown is not None, held))
    for node in source.nodes:
        if node.op == "call_module":
            _look_at(module_at(gm, str(node.target)), seen)
    key = tuple(seen)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _look_at(module: nn.Module, seen: list[Any]) -> None:
    """Add to `seen` what passes may read of `module`, and of those inside it."""
    held = vars(module)
    tables = module._parameters, module._buffers
    seen += (
        id(module),
        type(module),
        "forward" in held,
        bool(module._forward_hooks or module._forward_pre_hooks),
        tuple([name for table in tables for name, t in table.items() if t is not None]),
        tuple([v for n, v in held.items() if type(v) in _PLAIN and n != "training"]),
    )
    for child in module._modules.values():
        if child is not None and not isinstance(child, Dendrites):
            _look_at(child, seen)
