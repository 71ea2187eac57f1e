"""Symbolic tracing of one module's `forward`, over a shared clone of it."""

from __future__ import annotations

import dataclasses
import linecache
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils._device import DeviceContext

from pbfx.capture.clone import python_modules, shared_clone
from pbfx.capture.guards import (
    CONSTANT,
    attributes_kept,
    contexts_refused,
    functions_refused,
    modes,
    questions_refused,
    random_streams_kept,
)
from pbfx.capture.stand_ins import StandIn, asks_for_none
from pbfx.errors import CaptureError

TRAINING = "training"
# What stands between a model's code and the call of a module, while it is traced.
_NOT_THE_MODEL = ("torch.fx.", "torch.nn.modules.module", "pbfx.capture.")


@dataclasses.dataclass(frozen=True)
class _TrainingFlag:
    """What a traced module holds as its `training`: the name of the node that reads it."""

    target: str


class SourceTracer(fx.Tracer):
    """Trace into user modules; keep what torch itself computes, and subclasses of linear and conv,
    whole.

    Args:
        is_leaf: modules for which this is true stay one node, beside those that fx keeps whole.
        may_return_none: whether something in what such a module returns may be None.
        absent: names of inputs that are to be None, as if the caller had left them out.
    """

    # Arithmetic on a buffer must stay arithmetic, not become its value at the moment of tracing.
    proxy_buffer_attributes = True

    def __init__(
        self,
        is_leaf: Callable[[nn.Module], bool],
        may_return_none: Callable[[nn.Module], bool] = lambda _: False,
        absent: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self._is_leaf, self._absent, self._modes = is_leaf, absent, modes()
        self._may_return_none = may_return_none
        # What a forward makes without input is a constant of the graph, and has to have its numbers
        # also while a model without any is made, under `torch.device("meta")`.
        on_meta = torch.get_default_device().type == "meta"
        self.real = DeviceContext("cpu") if on_meta else None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether `m` stays one node."""
        return self._is_leaf(m) or is_torch_layer(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record or enter a submodule, and note where tracing failed."""
        if self.is_leaf_module(m, ""):
            if self._may_return_none(m) and asks_for_none(_asker().f_code):
                raise CaptureError(
                    f"forward compares something with None and calls {self.path_of_module(m)!r} "
                    f"({type(m).__name__}), whose result may be None; a graph has one answer only"
                )
            return super().call_module(m, forward, args, kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        # Whatever the user's forward raises: the innermost module is the one that cannot be traced.
        except Exception as error:
            if not hasattr(error, "culprit"):
                error.culprit = m  # pyright: ignore[reportAttributeAccessIssue]
            raise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a stand-in that refuses to answer for the value that it stands for."""
        return StandIn(node, self)

    def create_arg(self, a: Any) -> Any:
        """Record a value; refuse containers of a class of their own, which would come out plain."""
        kind = type(a)
        named = issubclass(kind, tuple) and hasattr(kind, "_fields")
        own = not named and not kind.__module__.startswith(("torch.", "builtins"))
        if own and issubclass(kind, (dict, list, tuple)):
            plain = "dict" if issubclass(kind, dict) else "tuple or list"
            raise CaptureError(
                f"forward hands on a {kind.__name__}, which a graph would turn into a plain {plain}"
            )
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record a node with the user's lines that it came from, for errors and pictures."""
        node = super().create_node(*args, **kwargs)
        node.stack_trace = _lines()
        return node

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Record a node; refuse one under a `with` block that the graph would not enter again."""
        if modes() != self._modes:
            raise CaptureError(
                f"cannot capture {type(self.root).__name__}: forward computes inside torch.no_grad "
                "or torch.autocast, which the graph would not enter again; use detach() in place "
                "of no_grad, and put autocast around the whole model"
            )
        if self.real and len(args) > 1 and args[1].get("device") is self.real.device:
            # That one is for constants; what depends on the input is made where it will be.
            args = (args[0], {k: v for k, v in args[1].items() if k != "device"}, *args[2:])
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


def trace(
    root: nn.Module,
    is_leaf: Callable[[nn.Module], bool] = lambda _: False,
    may_return_none: Callable[[nn.Module], bool] = lambda _: False,
) -> fx.Graph:
    """Trace the `forward` of `root` and return its graph.

    Args:
        root: a shared clone. It may gain buffers, for the constants that tracing finds loose; they
            stay out of the state dict.
        is_leaf: modules for which this is true stay one node, beside those that torch made.
        may_return_none: whether something in what such a module returns may be None.

    Raises:
        CaptureError: with the reason, when `forward` cannot be traced or would not survive it
            unchanged. `root` is then as it was, and the error's `culprit`, if it has one, is the
            innermost module that was being traced.
    """
    name = type(root).__name__
    graph = _trace(root, name, SourceTracer(is_leaf, may_return_none))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    optional = frozenset(str(node.target) for node in inputs if node.args == (None,))
    if optional:
        twin = shared_clone(root)
        # By path, because leaves are told by identity.
        leaves = {id(twin.get_submodule(p)) for p, m in root.named_modules() if is_leaf(m)}
        absent = _trace(twin, name, SourceTracer(lambda m: id(m) in leaves, absent=optional))
        if _steps(graph, optional) != _steps(absent, optional):
            _forget_constants(root, frozenset())
            raise CaptureError(
                f"cannot capture {name}: forward asks whether {' or '.join(sorted(optional))} is "
                "None, and a graph has only one of the answers; give it an argument that is always "
                "there, or wrap the model so that forward takes only what you pass"
            )
    _register_constants(root, name)
    for node in graph.nodes:
        # fx names a value after the module that gives it. One called `self`, as in pretrained
        # BERTs, would hide the module itself from the generated code.
        if node.name == "self":
            node._rename("self_value")
    return graph


def is_torch_layer(module: nn.Module) -> bool:
    """Return whether torch itself, or code that it wrote, computes what `module` does.

    Containers are none, since what they call may hold sites, nor is a user's class that only
    inherits one's forward; nor are linear and conv, which `pbfx.sites` tells apart.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return True
    forward = type(module).forward
    if isinstance(module, nn.Sequential) or forward is nn.Module.forward:
        return False
    inherits = (getattr(forward, "__module__", None) or "").startswith("torch.nn.")
    if type(module).__module__.startswith(("torch.nn.", "torch.ao.")):
        return True
    return (
        inherits
        # A helper that a user's conv overrides may hold anything.
        and not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    )


def _asker() -> FrameType:
    """Return the frame of the model's code that is calling a module."""
    return next(_model_frames(sys._getframe(1)), sys._getframe(1))


def _lines() -> str:
    """Return the lines of the model's code that are running, the innermost last.

    fx can do this, but its way imports Inductor, which takes seconds.
    """
    frames = reversed(list(_model_frames(sys._getframe(1))))
    return "\n".join(
        f'File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}\n'
        f"    {linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()}"
        for frame in frames
    )


def _model_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames of the model's code that is being traced, the innermost first."""
    while frame is not None and frame.f_code is not _trace.__code__:
        if not frame.f_globals.get("__name__", "").startswith(_NOT_THE_MODEL):
            yield frame
        frame = frame.f_back


def _trace(clone: nn.Module, name: str, tracer: SourceTracer) -> fx.Graph:
    before = frozenset(clone.__dict__)
    try:
        with ExitStack() as guards:
            guards.enter_context(random_streams_kept(name))
            guards.enter_context(attributes_kept(clone, name))
            guards.enter_context(functions_refused(name))
            guards.enter_context(contexts_refused(name))
            guards.enter_context(questions_refused(name))
            guards.enter_context(_training_recorded(clone))
            guards.enter_context(_output_padding_recorded(clone, tracer))
            guards.enter_context(tracer.real or nullcontext())
            return tracer.trace(clone)
    # Tracing runs the user's forward with stand-ins, so any exception at all can come out of it.
    except Exception as error:
        _forget_constants(clone, before)
        culprit = getattr(error, "culprit", None)
        if isinstance(error, CaptureError):
            failure = error
            if name not in str(error):
                failure = CaptureError(f"cannot capture {name}: {error}")
        else:
            failure = CaptureError(
                f"cannot capture {name} by symbolic tracing: {type(error).__name__}: {error}. "
                "Forward must not branch on values or shapes of its inputs, nor convert them to "
                "Python numbers"
            )
        failure.culprit = culprit
        raise failure from error


@contextmanager
def _training_recorded(clone: nn.Module) -> Iterator[None]:
    """Send every read of `module.training` in the tree through the tracer."""
    modules = python_modules(clone)
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


def output_padding(default: Any, *arguments: Any) -> list[int]:
    """Return what a transposed convolution adds to its output so that it has the size asked for.

    Args:
        default: its own output padding, which holds where no size is asked for.
        arguments: of `nn.ConvTranspose2d._output_padding`, which computes the rest.
    """
    layer: Any = types.SimpleNamespace(output_padding=default)
    return nn.ConvTranspose2d._output_padding(layer, *arguments)


@contextmanager
def _output_padding_recorded(clone: nn.Module, tracer: SourceTracer) -> Iterator[None]:
    """Keep whole what a transposed convolution, traced by itself, computes from shapes."""
    if not isinstance(clone, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        yield
        return

    def record(*arguments: Any) -> Any:
        given = clone.output_padding, *arguments
        return tracer.create_proxy("call_function", output_padding, given, {})

    clone.__dict__["_output_padding"] = record
    try:
        yield
    finally:
        del clone.__dict__["_output_padding"]


def _steps(graph: fx.Graph, absent: frozenset[str]) -> list[tuple[Any, ...]]:
    """Return what `graph` does when the inputs named in `absent` are None, in comparable form."""
    names: dict[fx.Node, str | None] = {n: f"%{index}" for index, n in enumerate(graph.nodes)}
    names |= {n: None for n in graph.nodes if n.op == "placeholder" and n.target in absent}

    def written(arguments: Any) -> str:
        return repr(map_arg(arguments, names.__getitem__))

    return [(n.op, n.target, written(n.args), written(n.kwargs)) for n in graph.nodes]


def _forget_constants(clone: nn.Module, before: frozenset[str]) -> None:
    """Drop what a failed trace has put away on `clone`."""
    for key in [key for key in clone.__dict__ if CONSTANT.fullmatch(key) and key not in before]:
        del clone.__dict__[key]


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
