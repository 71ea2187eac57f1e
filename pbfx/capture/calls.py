"""Calls of whole modules inside an exported graph.

torch.export goes into every module. What it should keep whole calls `pbfx::call_module` instead,
one op that stands for the module: while exporting it runs the module's own forward on the fake
tensors to learn what comes out, and afterwards `restore` writes a call of the module in its place.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect

from pbfx.capture.structures import Structure, places, put_together, take_apart
from pbfx.errors import CaptureError


@dataclasses.dataclass
class Call:
    """One call of a module: its path, what it was given, and what came out."""

    path: str
    module: nn.Module
    forward: Any
    given: Structure
    result: Structure | None = None

    def run(self, leaves: Sequence[Any]) -> list[Tensor]:
        """Run the forward on fake tensors, and remember the structure of its result."""
        args, kwargs = put_together(self.given, leaves)
        training = self.module.training
        try:
            # With momentum=None a norm that trains reads its counter as a number.
            if isinstance(self.module, nn.modules.batchnorm._NormBase):
                self.module.__dict__["training"] = False
            result = self.forward(*args, **kwargs)
        finally:
            self.module.__dict__["training"] = training
        tensors: list[Any] = []
        self.result = take_apart(result, tensors, f"what {self.path!r} returns")
        if not all(isinstance(value, Tensor) for value in tensors):
            raise CaptureError(
                f"{self.path!r} returns sizes, which a call of a module cannot hand on"
            )
        # An op must not return what it was given.
        return [tensor.clone() for tensor in tensors]


class Calls:
    """The calls of one export, in order."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        # Whether the forward of a whole module is running.
        self.inside = False
        # What such forwards asked of sizes, by its place among the guards of the export.
        self.guards: set[int] = set()

    def keep_whole(self, module: nn.Module, path: str) -> None:
        """Let `module`, of a clone, call the op in place of its forward.

        Its hooks do not run: they will when the graph calls the module.
        """
        forward = module.forward

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            # A whole module inside of a whole module is none of the graph's business.
            if self.inside:
                return forward(*args, **kwargs)
            leaves: list[Any] = []
            given = take_apart((args, kwargs), leaves, f"an argument of {path!r}")
            call = Call(path, module, forward, given)
            self._calls.append(call)
            results = torch.ops.pbfx.call_module(
                len(self._calls) - 1,
                [value for value in leaves if isinstance(value, Tensor)],
                [value for value in leaves if not isinstance(value, Tensor)],
                [isinstance(value, Tensor) for value in leaves],
            )
            assert call.result is not None, "the op ran the forward"
            return put_together(call.result, results)

        module.__dict__["forward"] = stand_in

    def run(self, index: int, leaves: Sequence[Any]) -> list[Tensor]:
        """Run call number `index` on fake tensors."""
        tensors: list[Any] = [value for value in leaves if isinstance(value, Tensor)]
        guards = tensors[0].fake_mode.shape_env.guards if tensors else []
        self.inside, before = True, len(guards)
        try:
            return self._calls[index].run(leaves)
        finally:
            self.inside = False
            self.guards |= set(range(before, len(guards)))

    def restore(self, graph: fx.Graph) -> None:
        """Write a call of the module in the place of each op."""
        for node in list(graph.nodes):
            if node.target is not torch.ops.pbfx.call_module.default:
                continue
            index, tensors, sizes, kinds = node.args
            call = self._calls[index]
            assert call.result is not None
            args, kwargs = put_together(call.given, _merged(tensors, sizes, kinds))
            with graph.inserting_before(node):
                whole = graph.call_module(call.path, tuple(args), kwargs)
                whole.meta = dict(node.meta)
                where = places(call.result)
                for taken in list(node.users):
                    value = whole
                    for kind, key in where[taken.args[1]]:
                        value = _take(graph, value, kind, key)
                        value.meta = dict(taken.meta)
                    taken.replace_all_uses_with(value)
                    graph.erase_node(taken)
            graph.erase_node(node)


def _take(graph: fx.Graph, value: fx.Node, kind: type, key: Any) -> fx.Node:
    by_item = issubclass(kind, (tuple, list, dict))
    return graph.call_function(operator.getitem if by_item else getattr, (value, key))


def _merged(tensors: Any, sizes: Any, kinds: Any) -> list[Any]:
    tensors, sizes = iter(tensors), iter(sizes)
    return [next(tensors) if is_tensor else next(sizes) for is_tensor in kinds]


_CURRENT: ContextVar[Calls] = ContextVar("calls")


@contextmanager
def recording(calls: Calls) -> Iterator[None]:
    """Let the op run the forwards of `calls`."""
    token = _CURRENT.set(calls)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@torch.library.custom_op("pbfx::call_module", mutates_args=())
def _call_module(
    call: int, tensors: Sequence[Tensor], sizes: Sequence[int], kinds: Sequence[bool]
) -> list[Tensor]:
    raise AssertionError("stands in exported graphs only, until a call of the module replaces it")


@_call_module.register_fake
def _(
    call: int, tensors: Sequence[Tensor], sizes: Sequence[int], kinds: Sequence[bool]
) -> list[Tensor]:
    return _CURRENT.get().run(call, _merged(tensors, sizes, kinds))


# The module may write to its input or to its buffers, and nobody has to read what it returns.
has_side_effect(torch.ops.pbfx.call_module.default)
