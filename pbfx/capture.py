"""Capture a model's graph without touching the model.

The captured graph runs over a *shared clone*: the same module classes, the very same parameters and
buffers, but new module objects, so that dendrites can nest under the op that owns a weight
(`fc1.dendrites`) while the user's own module keeps exactly the keys, hooks and attributes that it
had.

Symbolic tracing runs `forward` once with stand-ins for its inputs, and whatever is not a stand-in
becomes a constant of the graph. Each way in which that could change the meaning unnoticed is closed
here, by recording it or by an error:

- `self.training` is recorded as a node, so `F.dropout(x, training=self.training)` follows `train()`
  and `eval()`;
- buffers are recorded, so arithmetic on them is not folded;
- random numbers drawn while tracing, attributes assigned while tracing, and hooks on modules that
  are traced into are errors, because the graph would hold on to one draw, drop the assignment, or
  bake in the hook.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from pbfx.errors import CaptureError

TRAINING = "training"
# What every nn.Module keeps in its __dict__: the registries of parameters, buffers and hooks, and a
# few flags.
_REGISTRIES = frozenset(nn.Module().__dict__)
# Under such names fx keeps the constants that it meets while tracing.
_CONSTANT = re.compile(r"_\w*_constant_?\d+")


def shared_clone(module: nn.Module) -> nn.Module:
    """Return new module objects over the same parameters, buffers and attributes.

    Sharing inside the tree is kept: a module registered twice is one clone registered twice. Hooks
    are carried over, into registries of the clone's own.
    """
    clones: dict[int, nn.Module] = {}

    def clone(original: nn.Module) -> nn.Module:
        if id(original) in clones:
            return clones[id(original)]
        twin = original.__class__.__new__(original.__class__)
        clones[id(original)] = twin
        # The clone gets registries (parameters, buffers, hooks) of its own over the very same
        # tensors and hooks.
        for name, value in original.__dict__.items():
            twin.__dict__[name] = copy.copy(value) if name in _REGISTRIES else value
        twin.__dict__["_modules"] = {
            name: None if child is None else clone(child)
            for name, child in original._modules.items()
        }
        return twin

    return clone(module)


@dataclasses.dataclass(frozen=True)
class _TrainingFlag:
    """What a traced module holds in place of its `training` attribute: the name of the node that
    reads it."""

    target: str


class SourceTracer(fx.Tracer):
    """Trace into user modules, keep torch's own modules and subclasses of linear and conv whole."""

    # Arithmetic on a buffer must stay arithmetic, not become its value at the moment of tracing.
    proxy_buffer_attributes = True

    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._is_leaf = is_leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether `m` stays one node."""
        return self._is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record or enter a submodule; refuse one whose hooks would be baked into the graph."""
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path) and (m._forward_hooks or m._forward_pre_hooks):
            raise CaptureError(
                f"cannot capture {path!r} ({type(m).__name__}): it has forward hooks, which "
                f"tracing would run once and "
                "bake into the graph; remove them before pbfx.transform and register them on the "
                "result"
            )
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Record a read of `self.training` as a node; leave the rest to fx."""
        if isinstance(attr_val, _TrainingFlag):
            if attr_val.target not in parameter_proxy_cache:
                parameter_proxy_cache[attr_val.target] = self.create_proxy(
                    "get_attr", attr_val.target, (), {}
                )
            return parameter_proxy_cache[attr_val.target]
        return super().getattr(attr, attr_val, parameter_proxy_cache)


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


@contextmanager
def _nothing_frozen(clone: nn.Module, name: str) -> Iterator[None]:
    """Refuse what tracing would freeze unseen: random draws and attribute writes."""
    before = {path: dict(module.__dict__) for path, module in clone.named_modules()}
    stream = torch.get_rng_state()
    try:
        yield
        drew = not torch.equal(stream, torch.get_rng_state())
    finally:
        torch.set_rng_state(stream)
    if drew:
        raise CaptureError(
            f"cannot capture {name}: forward draws random numbers from sizes that do not depend "
            f"on its input, which "
            "the graph would repeat at every call; draw them like an input instead "
            "(torch.rand_like, x.new_empty)"
        )
    for path, module in clone.named_modules():
        old = before.get(path, {})
        changed = sorted(
            key
            for key, value in module.__dict__.items()
            if not _CONSTANT.fullmatch(key) and (key not in old or old[key] is not value)
        )
        if changed:
            where = f"{name}.{path}".rstrip(".")
            raise CaptureError(
                f"cannot capture {where}: forward assigns self.{changed[0]}, which the graph "
                f"would not do again; "
                "return the value instead, or keep it in a buffer that is updated in place"
            )


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
    clone = shared_clone(module)
    tracer = SourceTracer(is_leaf)
    try:
        with _nothing_frozen(clone, name), _training_recorded(clone):
            graph = tracer.trace(clone)
    except CaptureError:
        raise
    # Tracing runs the user's forward with stand-ins, so any exception at all can come out of it.
    except Exception as error:
        raise CaptureError(
            f"cannot capture {name} by symbolic tracing: {type(error).__name__}: {error}. "
            f"Forward must not branch on "
            "values or shapes of its inputs, nor convert them to Python numbers; move such code "
            "out of the model or "
            "apply pbfx.transform to the submodules that hold the linear and conv layers"
        ) from error
    _register_constants(clone)
    return clone, graph


def _register_constants(clone: nn.Module) -> None:
    """Make tensors that tracing found loose into buffers that stay out of the state dict."""
    loose = [
        key
        for key, value in clone.__dict__.items()
        if _CONSTANT.fullmatch(key) and isinstance(value, torch.Tensor)
    ]
    for key in loose:
        clone.register_buffer(key, clone.__dict__.pop(key), persistent=False)
