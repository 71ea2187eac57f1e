"""A graph as networkx sees it, for questions about paths rather than about single nodes."""

from __future__ import annotations

import operator
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

_ASSIGNMENTS = frozenset(
    getattr(operator, name)
    for name in (
        *("setitem", "delitem", "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul"),
        *("imod", "imul", "ior", "ipow", "irshift", "isub", "itruediv", "ixor"),
    )
)
# Methods by which a list or a dict that was given as an input is filled.
_FILLS = frozenset({"append", "extend", "insert", "update", "setdefault"})


def dataflow(graph: fx.Graph) -> nx.DiGraph:
    """Return the data flow of `graph`: its nodes, and an edge from each value to each of its users.

    What a method in place (`y.add_(x)`) writes flows to those that read `y` afterwards.
    """
    flow: nx.DiGraph = nx.DiGraph()
    for node in graph.nodes:
        flow.add_node(node)
        flow.add_edges_from((source, node) for source in node.all_input_nodes)
        for written in _written(node):
            later = [user for user in written.users if node < user]
            flow.add_edges_from((node, user) for user in later)
    return flow


def reaches_output(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose value can influence what the graph returns.

    Only these can receive an error, so only these can teach a dendrite anything. What is written
    into an input is returned too: the caller has it.
    """
    flow = dataflow(graph)
    outputs = [
        node
        for node in graph.nodes
        if node.op == "output" or any(value.op == "placeholder" for value in _written(node))
    ]
    return {node for output in outputs for node in (output, *nx.ancestors(flow, output))}


def may_write(root: nn.Module, node: fx.Node) -> bool:
    """Return whether `node` may write into a tensor that it was given.

    Args:
        root: the module over which the graph runs.
        node: any node of it.
    """
    if node.op == "call_module":
        parts = root.get_submodule(str(node.target)).modules()
        return any(getattr(part, "inplace", False) for part in parts)
    if node.op != "call_function" or node.target in _ASSIGNMENTS:
        return node.op == "call_function" or _is_in_place(node)
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.is_mutable
    name = getattr(node.target, "__name__", "")
    # `inplace` may be given by its place, so any flag that is set counts.
    functional = getattr(node.target, "__module__", "") == "torch.nn.functional"
    flagged = functional and any(value is True for value in node.args)
    written = bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    return flagged or written or (name.endswith("_") and not name.endswith("__"))


def _written(node: fx.Node) -> list[fx.Node]:
    """Return the values that `node` writes to, and those that they are views of."""
    written: list[Any] = [node.all_input_nodes[0]] if _is_in_place(node) else []
    if isinstance(node.target, torch._ops.OpOverload):
        written = [
            value
            for value, argument in zip(node.args, node.target._schema.arguments, strict=False)
            if argument.is_write and isinstance(value, fx.Node)
        ]
    for value in written:
        if isinstance(value.target, torch._ops.OpOverload) and value.args:
            returns = value.target._schema.returns
            if returns and returns[0].alias_info is not None and isinstance(value.args[0], fx.Node):
                written.append(value.args[0])
    return written


def _is_in_place(node: fx.Node) -> bool:
    name = str(node.target)
    in_place = name.endswith("_") and not name.endswith("__")
    return node.op == "call_method" and (in_place or name in _FILLS)
