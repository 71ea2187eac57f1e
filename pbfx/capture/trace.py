"""Symbolic tracing of a whole model, over a shared clone of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from pbfx.capture.clone import shared_clone
from pbfx.capture.guards import (
    CONSTANT,
    attributes_kept,
    check_hooks,
    check_modules,
    functions_refused,
    modes,
    random_streams_kept,
)
from pbfx.errors import CaptureError

TRAINING = "training"


@dataclasses.dataclass(frozen=True)
class _TrainingFlag:
    """What a traced module holds as its `training`: the name of the node that reads it."""

    target: str


class SourceTracer(fx.Tracer):
    """Trace into user modules; keep what torch itself computes, and subclasses of linear and conv,
    whole.

    Args:
        is_leaf: modules for which this is true stay one node, beside those that fx keeps whole.
        absent: names of inputs that are to be None, as if the caller had left them out.
    """

    # Arithmetic on a buffer must stay arithmetic, not become its value at the moment of tracing.
    proxy_buffer_attributes = True

    def __init__(
        self, is_leaf: Callable[[nn.Module], bool], absent: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self._is_leaf, self._absent, self._modes = is_leaf, absent, modes()
        # Errors and pictures point to the user's line.
        self.record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether `m` stays one node."""
        return (
            self._is_leaf(m)
            or super().is_leaf_module(m, module_qualified_name)
            or _runs_torch_code(m)
        )

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record or enter a submodule; refuse one whose hooks would be lost."""
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            check_hooks(m, path)
        return super().call_module(m, forward, args, kwargs)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Record a node; refuse one under a `with` block that the graph would not enter again."""
        if modes() != self._modes:
            raise CaptureError(
                f"cannot capture {type(self.root).__name__}: forward computes inside torch.no_grad "
                "or torch.autocast, which the graph would not enter again; use detach() in place "
                "of no_grad, and put autocast around the whole model"
            )
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        return None if kind == "placeholder" and target in self._absent else proxy

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Record a read of `self.training` as a node; leave the rest to fx."""
        if isinstance(attr_val, _TrainingFlag):
            if attr_val.target not in parameter_proxy_cache:
                parameter_proxy_cache[attr_val.target] = self.create_proxy(
                    "get_attr", attr_val.target, (), {}
                )
            return parameter_proxy_cache[attr_val.target]
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def capture(
    module: nn.Module, is_leaf: Callable[[nn.Module], bool] = lambda _: False
) -> tuple[nn.Module, fx.Graph]:
    """Trace `module` whole and return a shared clone with the graph of its `forward`.

    Args:
        module: the user's model; it is read and not changed.
        is_leaf: modules for which this is true stay one node, beside those that fx keeps whole.

    Returns:
        The clone, which owns every module that the graph calls, and the graph.

    Raises:
        CaptureError: with the reason, when `forward` cannot be traced or would not survive it
            unchanged.
    """
    name = type(module).__name__
    check_modules(module, name)
    clone = shared_clone(module)
    graph = _trace(clone, name, SourceTracer(is_leaf))
    optional = frozenset(
        str(node.target)
        for node in graph.nodes
        if node.op == "placeholder" and node.args == (None,)
    )
    if optional:
        absent = _trace(shared_clone(module), name, SourceTracer(is_leaf, optional))
        if _steps(graph, optional) != _steps(absent, optional):
            raise CaptureError(
                f"cannot capture {name}: forward asks whether {' or '.join(sorted(optional))} is "
                "None, and a graph has only one of the answers; give it an argument that is always "
                "there, or wrap the model so that forward takes only what you pass"
            )
    _register_constants(clone, name)
    return clone, graph


def _runs_torch_code(module: nn.Module) -> bool:
    """Return whether a user's class inherits its forward from a layer of torch's."""
    forward = type(module).forward
    return (
        (getattr(forward, "__module__", None) or "").startswith("torch.nn.")
        and forward is not nn.Module.forward
        # What these call may hold sites: children, or a helper that a user's conv overrides.
        and not isinstance(module, (nn.Sequential, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    )


def _trace(clone: nn.Module, name: str, tracer: SourceTracer) -> fx.Graph:
    try:
        with ExitStack() as guards:
            guards.enter_context(random_streams_kept(name))
            guards.enter_context(attributes_kept(clone, name))
            guards.enter_context(functions_refused(name))
            guards.enter_context(_training_recorded(clone))
            return tracer.trace(clone)
    except CaptureError:
        raise
    # Tracing runs the user's forward with stand-ins, so any exception at all can come out of it.
    except Exception as error:
        raise CaptureError(
            f"cannot capture {name} by symbolic tracing: {type(error).__name__}: {error}. "
            "Forward must not branch on values or shapes of its inputs, nor convert them to Python "
            "numbers; move such code out of the model or apply pbfx.transform to the submodules "
            "that hold the linear and conv layers"
        ) from error


@contextmanager
def _training_recorded(clone: nn.Module) -> Iterator[None]:
    """Send every read of `module.training` in the tree through the tracer."""
    modules = dict(clone.named_modules())
    flags = {path: module.__dict__.pop(TRAINING) for path, module in modules.items()}
    for path, module in modules.items():
        # nn.Module.__getattr__ is what the tracer intercepts; it looks in the buffers.
        module._buffers[TRAINING] = _TrainingFlag(f"{path}.{TRAINING}".lstrip("."))  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for path, module in modules.items():
            del module._buffers[TRAINING]
            module.__dict__[TRAINING] = flags[path]


def _steps(graph: fx.Graph, absent: frozenset[str]) -> list[tuple[Any, ...]]:
    """Return what `graph` does when the inputs named in `absent` are None, in comparable form."""
    names: dict[fx.Node, str | None] = {n: f"%{index}" for index, n in enumerate(graph.nodes)}
    names |= {n: None for n in graph.nodes if n.op == "placeholder" and n.target in absent}

    def written(arguments: Any) -> str:
        return repr(map_arg(arguments, names.__getitem__))

    return [(n.op, n.target, written(n.args), written(n.kwargs)) for n in graph.nodes]


def _register_constants(clone: nn.Module, name: str) -> None:
    """Make tensors that tracing found loose into buffers that stay out of the state dict."""
    loose = [
        key
        for key, value in clone.__dict__.items()
        if CONSTANT.fullmatch(key) and isinstance(value, torch.Tensor)
    ]
    for key in loose:
        if clone.__dict__[key].requires_grad:
            raise CaptureError(
                f"cannot capture {name}: forward computes with parameters that it reads in bulk "
                "(self.parameters()), which the graph would hold on to as one value; read them as "
                "attributes (self.weight)"
            )
        clone.register_buffer(key, clone.__dict__.pop(key), persistent=False)
