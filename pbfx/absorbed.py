"""Modules whose forward a graph has absorbed: still the user's objects, and never out of step.

The graph of a model calls its layers and not the containers around them, so a hook on a container
would wait in vain, a call of the container by itself would miss the dendrites inside, and a flag
that its forward reads would have been read already. An absorbed module notices each of these:

- registering a hook, or calling it by itself, gives it a graph of its own, which the graph around
  it then calls as a module;
- assigning to an attribute that it had when it was captured captures the graph anew.

Its class is a subclass of the user's, of the same name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from pbfx.capture import REGISTRIES
from pbfx.kept import ATTRIBUTE

_BY = "absorbed_by"
_NOT_OF_FORWARD = REGISTRIES | {_BY, ATTRIBUTE, "perforation", "meta"}
_MISSING = object()
_classes: dict[type[nn.Module], type[nn.Module]] = {}


class Absorbed(nn.Module):
    """What an absorbed module does instead of what its class does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with its dendrites."""
        return _by_itself(self, "it is called by itself")(*args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Register a hook on the module, which becomes a graph of its own."""
        return _hooked(self).register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Register a hook on the module, which becomes a graph of its own."""
        return _hooked(self).register_forward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Register a hook on the module, which becomes a graph of its own."""
        return _hooked(self).register_full_backward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Register a hook on the module, which becomes a graph of its own."""
        return _hooked(self).register_full_backward_pre_hook(*args, **kwargs)

    def register_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Register a hook on the module, which becomes a graph of its own."""
        return _hooked(self).register_backward_hook(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        part, path = self.__dict__[_BY]
        successor = part.get_submodule(path)
        if successor is self:
            assign(self, name, value, super().__setattr__, part)
        else:
            setattr(successor, name, value)

    def _replicate_for_data_parallel(self) -> nn.Module:
        # A replica lives for one forward, in which nobody hooks it; it is the user's module.
        own = own_class(self)
        replica = object.__new__(own)
        state = {key: value for key, value in self.__dict__.items() if key != _BY}
        object.__setattr__(replica, "__dict__", state)
        return own._replicate_for_data_parallel(replica)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Whoever unpickles the graph absorbs again; by itself this is the user's module.
        state = self.__getstate__()
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key != _BY}
        return object.__new__, (own_class(self),), state


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the user's class of a module, be it absorbed or not."""
    return type(module).__mro__[2] if isinstance(module, Absorbed) else type(module)


def absorb(part: nn.Module, paths: Iterable[str]) -> None:
    """Let the modules of `part` at `paths` notice what its graph would miss."""
    for path in paths:
        lead(part.get_submodule(path), part, path)


def lead(module: nn.Module, part: nn.Module, path: str) -> None:
    """Lead whoever calls or hooks `module` to what is at `path` in `part`."""
    own = own_class(module)
    if own not in _classes:
        _classes[own] = type(own.__name__, (Absorbed, own), {"__module__": own.__module__})
    # Not registered: it is no child.
    module.__dict__[_BY] = part, path
    object.__setattr__(module, "__class__", _classes[own])


def release(part: nn.Module, paths: Iterable[str]) -> None:
    """Give the modules at `paths` the user's classes back."""
    for path in paths:
        module = part.get_submodule(path)
        module.__dict__.pop(_BY, None)
        object.__setattr__(module, "__class__", own_class(module))


def assign(module: nn.Module, name: str, value: Any, write: Any, part: Any) -> None:
    """Assign an attribute; if a forward in the graph of `part` may have read it, capture anew.

    Raises:
        CaptureError: if the graph cannot be captured with the new value; the old one is back.
    """
    old = module.__dict__.get(name, _MISSING)
    write(name, value)
    known = old is not _MISSING and name not in _NOT_OF_FORWARD and name != "training"
    if not known or isinstance(value, (Tensor, nn.Module)) or _equal(old, value):
        return
    try:
        part.perforation.recapture(part, frozenset(), "")
    except BaseException:
        module.__dict__[name] = old
        raise


def _equal(one: Any, other: Any) -> bool:
    # Containers may have been changed in place since.
    plain = (bool, int, float, str, type(None))
    return one is other if not isinstance(one, plain) else type(one) is type(other) and one == other


def _hooked(module: nn.Module) -> nn.Module:
    return _by_itself(module, "hooks wait for its call")


def _by_itself(module: nn.Module, reason: str) -> nn.Module:
    """Return what stands in the place of `module` once it has been split off its graph."""
    part, path = module.__dict__[_BY]
    if part.get_submodule(path) is module:
        part.perforation.recapture(part, frozenset({path}), reason)
    return part.get_submodule(path)
