"""A graph as plain data, the form in which it survives pickling.

fx pickles a graph module as generated code and traces that again when it is loaded, which turns
`self.training` into a constant. Here a graph is the sequence of its nodes: a node's arguments name
other nodes by number, and functions are looked up by name. What else a node holds (dtypes, numbers,
slices) is pickled as it is. The user's lines, which tracing notes on each node, stay behind: they
are paths on the machine that traced.
"""

from __future__ import annotations

import dataclasses
import importlib
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from pbfx.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Named:
    """A function, class or operator by name: `path` is looked up in the module `module`."""

    module: str
    path: str

    def find(self) -> Any:
        """Return what the name stands for.

        Raises:
            CheckpointError: if there is no such thing here.
        """
        try:
            return _look_up(self.module, self.path)
        except (ImportError, AttributeError) as error:
            hint = (
                "; import the module that registers it first"
                if self.module == "torch.ops"
                else f" ({error})"
            )
            raise CheckpointError(
                f"the pickled model calls {self.module}.{self.path}, which is not here{hint}"
            ) from error


@dataclasses.dataclass(frozen=True)
class PlainNode:
    """One node; its arguments hold `Numbered` in place of nodes and `Named` for functions."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    annotation: Any


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A node by its place in the graph."""

    index: int


def plain_nodes(graph: fx.Graph, owner: str) -> tuple[PlainNode, ...]:
    """Return `graph` as plain data that can be pickled.

    Args:
        graph: read, not changed.
        owner: what the errors call the model.

    Raises:
        CheckpointError: naming every node that refers to what pickle cannot find again, such as a
            local function.
    """
    numbers = {node: Numbered(index) for index, node in enumerate(graph.nodes)}

    def plain(value: Any) -> Any:
        return numbers[value] if isinstance(value, fx.Node) else named(value) or value

    nodes, faults = [], []
    for node in graph.nodes:
        target = plain(node.target) if node.op == "call_function" else node.target
        args, kwargs = map_aggregate(node.args, plain), map_aggregate(node.kwargs, plain)
        fault = _fault((target, args, kwargs))
        if fault:
            called = getattr(node.target, "__qualname__", node.target)
            faults.append(f"{node.name!r} calls {called}: {fault}")
        # Annotations change nothing that the graph computes.
        annotation = None if _fault(node.type) else node.type
        nodes.append(PlainNode(node.op, node.name, target, args, kwargs, annotation))
    if faults:
        raise CheckpointError(
            f"{owner} cannot be pickled, because its forward refers to what only this process "
            f"knows: {'; '.join(faults)}. Move that to the top level of a module, or save with "
            "pbfx.save(model, path) or torch.save(model.state_dict(), path)"
        )
    return tuple(nodes)


def graph_of(nodes: Sequence[PlainNode]) -> fx.Graph:
    """Return the graph that `plain_nodes` described.

    Raises:
        CheckpointError: if a function is not to be found here.
    """
    graph = fx.Graph()
    made: list[fx.Node] = []

    def live(value: Any) -> Any:
        if isinstance(value, Numbered):
            return made[value.index]
        return value.find() if isinstance(value, Named) else value

    for node in nodes:
        args, kwargs = map_aggregate(node.args, live), map_aggregate(node.kwargs, live)
        made.append(
            graph.create_node(
                node.op,
                live(node.target),
                args,  # pyright: ignore[reportArgumentType]
                kwargs,  # pyright: ignore[reportArgumentType]
                node.name,
                node.annotation,
            )
        )
    return graph


def named(value: Any) -> Named | None:
    """Return the name under which another process finds `value`, a callable; None if none is."""
    if isinstance(value, torch._ops.OpOverloadPacket):
        return Named("torch.ops", str(value).replace("::", "."))
    if isinstance(value, torch._ops.OpOverload):
        return Named("torch.ops", str(value))
    if not callable(value):
        return None
    # Torch's dispatching functions (F.max_pool2d) have a local `__qualname__` and a true
    # `__name__`; its builtins have no module at all.
    for module in (getattr(value, "__module__", None), "torch"):
        for path in (getattr(value, "__qualname__", None), getattr(value, "__name__", None)):
            try:
                if module and path and _look_up(module, path) is value:
                    return Named(module, path)
            except (ImportError, AttributeError):
                continue
    return None


def _look_up(module: str, path: str) -> Any:
    # `torch.ops` is an object that makes its namespaces as they are asked for, not a module.
    found: Any = torch.ops if module == "torch.ops" else importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _fault(value: Any) -> str | None:
    """Return why `value` cannot be pickled, or None."""
    try:
        pickle.dumps(value)
    # Pickling runs the code of whatever a graph may hold.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
