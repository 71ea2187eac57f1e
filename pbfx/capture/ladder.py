"""The capture ladder: the largest graphs that a model allows, down to a single op.

    whole        the model's own forward is one graph
    submodule    it is not, but that of a module inside is
    op           a linear or conv that code outside of any graph calls
    export       on request: the whole model is one graph, as torch.export sees it

A module keeps its own forward when tracing refuses it, or when a graph could not take its class's
place: then methods such as `generate` go on to call its children, and the children carry the
dendrites. A module that hooks wait on, or that keeps its own forward, stays one node in the graph
around it, and is climbed by itself.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Callable, Iterator
from types import FunctionType

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pbfx.capture.clone import shared_clone
from pbfx.capture.exported import Example, export
from pbfx.capture.guards import check_modules
from pbfx.capture.trace import is_torch_layer
from pbfx.capture.trace import trace as symbolic_trace
from pbfx.errors import CaptureError
from pbfx.paths import join
from pbfx.sites import graph_of_cell, is_cell

logger = logging.getLogger(__name__)

# Torch's own classes that call their children as modules.
_TORCH_CALLERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.AdaptiveLogSoftmaxWithLoss,
)


class Rung(enum.StrEnum):
    """How a part of a model was captured."""

    WHOLE = "whole"
    SUBMODULE = "submodule"
    OP = "op"
    EXPORT = "export"


@dataclasses.dataclass(frozen=True)
class Captured:
    """One graph of a model: the module whose forward it is (a clone), and how it came about.

    `reason` says why no graph around it could be had; it is empty for the whole model. `example` is
    what it was exported with, None for others.
    """

    root: nn.Module
    graph: fx.Graph
    rung: Rung
    reason: str
    example: Example | None = None

    @property
    def absorbed(self) -> tuple[str, ...]:
        """Return the paths of the modules whose forwards run in this graph, beside the root's."""
        inside: dict[str, None] = {}
        for node in self.graph.nodes:
            for name, _ in node.meta.get("nn_module_stack", {}).values():
                inside[name] = None
        called = {str(n.target) for n in self.graph.nodes if n.op == "call_module"}
        return tuple(name for name in inside if name and name not in called)


@dataclasses.dataclass(frozen=True)
class Capture:
    """A model as graphs.

    Attributes:
        root: the clone of the model.
        parts: the graphs by path; a graph may call modules that are parts of their own.
        kept: the modules that keep their own forward, by path, and why.
        left: the modules that are left as they are, with all that is inside, and why.
    """

    root: nn.Module
    parts: dict[str, Captured]
    kept: dict[str, str]
    left: dict[str, str]


def capture(
    model: nn.Module,
    is_op: Callable[[nn.Module], bool] = lambda _: False,
    hides: Callable[[nn.Module], str | None] = lambda _: None,
    example: Example | None = None,
) -> Capture:
    """Capture `model` as the largest graphs that it allows.

    Args:
        model: the user's model; it is read and not changed.
        is_op: whether a module is an op that can carry dendrites; it stays one node.
        hides: why a graph module could not take a module's place, or None.
        example: given to have the whole model exported, whatever methods its classes offer.

    Raises:
        CaptureError: if the model holds what no clone can stand for, such as lazy modules, or
            cannot be exported as asked.
    """
    check_modules(model, type(model).__name__)
    apart: frozenset[str] = frozenset()
    while True:
        captured = capture_clone(shared_clone(model), is_op, hides, apart, example=example)
        shared = _shared_ops(captured, is_op) - apart
        if not shared:
            return captured
        apart |= shared


def capture_clone(
    root: nn.Module,
    is_op: Callable[[nn.Module], bool],
    hides: Callable[[nn.Module], str | None],
    apart: frozenset[str],
    done: Callable[[nn.Module], bool] = lambda _: False,
    reason: str = "",
    example: Example | None = None,
) -> Capture:
    """Capture a clone.

    Args:
        root: the clone; its graphs run over it.
        is_op: as for `capture`.
        hides: as for `capture`.
        apart: paths of modules that graphs have to call as modules.
        done: modules that have been captured before; they stay one node and are not entered.
        reason: why the modules of `apart` are called as modules.
        example: as for `capture`.
    """
    reason = reason or "several graphs call it"
    ladder = _Ladder(root, is_op, hides, apart, done, reason, example)
    ladder.climb(root, "", "")
    return Capture(root, ladder.parts, ladder.kept, ladder.left)


class _Ladder:
    def __init__(
        self,
        root: nn.Module,
        is_op: Callable[[nn.Module], bool],
        hides: Callable[[nn.Module], str | None],
        apart: frozenset[str],
        done: Callable[[nn.Module], bool],
        reason: str,
        example: Example | None,
    ) -> None:
        self._is_op, self._hides, self._done, self._example = is_op, hides, done, example
        self._apart = dict.fromkeys((id(root.get_submodule(path)) for path in apart), reason)
        self.parts: dict[str, Captured] = {}
        self.kept: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self._seen: set[int] = set()
        # What has to be called as a module, by a graph too.
        self._boundaries = self._apart.keys() | {
            id(m)
            for m in root.modules()
            if m is not root
            and not is_op(m)
            and (
                done(m)
                or _left(m)
                or _hooked(m)
                # An export goes through modules that keep their forward.
                or (example is None and (_keeps_forward(m) or hides(m)))
            )
        }

    def climb(self, module: nn.Module, path: str, above: str) -> None:
        """Capture `module`, or what is inside; `above` says why the module around it was not."""
        if id(module) in self._seen or self._done(module):
            return
        self._seen.add(id(module))
        why_left = _left(module)
        if why_left:
            self.left[path] = why_left
            return
        if self._example and not path:
            self._export(module, self._example)
            return
        why = _keeps_forward(module) or self._hides(module)
        if not why and not _only_holds(module):
            self._climb_inside(module, path)
            try:
                graph = self._trace(module)
            except CaptureError as error:
                why = str(error)
            else:
                op = self._is_op(module)
                rung = Rung.OP if op else Rung.SUBMODULE if path else Rung.WHOLE
                self.parts[path] = Captured(module, graph, rung, above)
                # Tracing may have found more that it cannot enter.
                self._climb_inside(module, path)
                return
        if why:
            self.kept[path] = why
        for name, child in module.named_children():
            if self._is_op(child) or _left(child) or _may_hold_ops(child):
                self.climb(child, join(path, name), why or above)

    def _export(self, root: nn.Module, example: Example) -> None:
        name, why = type(root).__name__, _own_call(root) or self._hides(root)
        if why:
            raise CaptureError(f"cannot capture {name} as one graph: {why}")
        offered = sorted(_methods(type(root)))
        if offered:
            logger.warning(
                "%s is one graph: layers that %s calls by itself compute without dendrites",
                name,
                ", ".join(offered),
            )
        # Torch's own layers that call others are taken apart below.
        callers = {id(m) for m in root.modules() if isinstance(m, _TORCH_CALLERS)}
        self._boundaries |= callers - {id(root)}
        self._climb_inside(root, "")
        graph = self._trace(root, lambda module, whole: export(module, whole, example))
        self.parts[""] = Captured(root, graph, Rung.EXPORT, "", example)
        self._climb_inside(root, "")

    def _climb_inside(self, module: nn.Module, path: str) -> None:
        """Climb to what a graph of `module` has to call as a module."""
        for name, inner in module.named_modules():
            if inner is not module and id(inner) in self._boundaries:
                why = "hooks wait for its call" if _hooked(inner) else ""
                self.climb(inner, join(path, name), self._apart.get(id(inner), why))

    def _trace(
        self,
        module: nn.Module,
        trace: Callable[[nn.Module, Callable[[nn.Module], bool]], fx.Graph] | None = None,
    ) -> fx.Graph:
        """Trace `module` around those inside that cannot be traced."""
        if trace is None and is_cell(module):
            return graph_of_cell(module)

        def symbolically(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> fx.Graph:
            return symbolic_trace(module, is_leaf, self._may_return_none)

        while True:
            try:
                return (trace or symbolically)(
                    module,
                    lambda m: m is not module and (self._is_op(m) or id(m) in self._boundaries),
                )
            except CaptureError as error:
                if error.culprit is None or error.culprit is module:
                    raise
                # What one layer of a class does, the others will. The culprit itself may be one of
                # a clone's.
                alike = {id(m) for m in module.modules() if type(m) is type(error.culprit)}
                alike -= {id(module), *self._boundaries}
                if not alike:
                    raise
                self._boundaries |= alike

    def _may_return_none(self, module: nn.Module) -> bool:
        """Return whether something in what `module` returns may be None, as in attention's."""
        if self._is_op(module) or self._done(module):
            return False
        for part in self.parts.values():
            if part.root is module:
                (output,) = (node for node in part.graph.nodes if node.op == "output")
                return None in pytree.tree_leaves(output.args, is_leaf=lambda leaf: leaf is None)
        return isinstance(module, nn.MultiheadAttention) or not is_torch_layer(module)


def _shared_ops(captured: Capture, is_op: Callable[[nn.Module], bool]) -> frozenset[str]:
    """Return the ops that several graphs call: each has to be a part of its own."""
    callers: dict[int, list[str]] = {}
    for path, part in captured.parts.items():
        called = {str(n.target) for n in part.graph.nodes if n.op == "call_module"}
        names = {id(part.root.get_submodule(name)): name for name in called}
        for op, name in names.items():
            callers.setdefault(op, []).append(join(path, name))
        if part.rung is Rung.OP:
            callers.setdefault(id(part.root), []).append(path)
    return frozenset(
        names[0]
        for names in callers.values()
        if len(names) > 1 and is_op(captured.root.get_submodule(names[0]))
    )


def _hooked(module: nn.Module) -> bool:
    """Return whether hooks wait for a call of `module`; a layer that stays one node is called."""
    registries = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(registries) and not is_torch_layer(module)


def _left(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript, which hides its Python code"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, and may hold on to other modules"
    return None


def _only_holds(module: nn.Module) -> bool:
    """Return whether `module` has no forward at all, as a ModuleList."""
    return type(module).forward is nn.Module.forward


def _keeps_forward(module: nn.Module) -> str | None:
    """Return why a graph could not take the place of the class of `module`, or None."""
    if isinstance(module, _TORCH_CALLERS):
        return "torch's own forward chooses its way by its arguments"
    if is_torch_layer(module) or _only_holds(module):
        return None
    why = _own_call(module)
    if why:
        return why
    offered = sorted(_methods(type(module)))
    if offered:
        return f"its class offers more than forward ({', '.join(offered[:3])}" + (
            ", ...)" if len(offered) > 3 else ")"
        )
    return None


def _own_call(module: nn.Module) -> str | None:
    """Return that the class of `module` changes what a call does, which no graph would, or None."""
    own = type(module).__call__ is not nn.Module.__call__
    if own and not isinstance(module, fx.GraphModule):
        return "its class has a __call__ of its own"
    return None


def _methods(cls: type) -> Iterator[str]:
    """Yield the public methods that a user's class adds to those of a module."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, value in vars(base).items():
            known = name.startswith("_") or name == "forward" or hasattr(nn.Module, name)
            if isinstance(value, FunctionType) and not known:
                yield name


def _may_hold_ops(module: nn.Module) -> bool:
    """Return whether anything inside `module` could carry dendrites."""
    if isinstance(module, _TORCH_CALLERS):
        return True
    return not is_torch_layer(module) and next(module.parameters(), None) is not None
