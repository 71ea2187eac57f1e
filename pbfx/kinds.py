"""Classes of graph modules that are instances of the user's class too, and what that allows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import fx, nn

# What fx.GraphModule itself keeps on an instance; everything else belongs to the user, `meta` too,
# which fx starts empty and only carries along.
GRAPH_MODULE_STATE = (
    frozenset(fx.GraphModule(nn.Module(), fx.Graph()).__dict__)
    - frozenset(nn.Module().__dict__)
    - {"meta"}
)

Graph = TypeVar("Graph", bound=fx.GraphModule)


class _Start(nn.Module):
    """Ends the chain of constructors: the state of a user's class is copied, not made anew."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def mixed_with(ours: type[Graph], own: type[nn.Module]) -> type[Graph]:
    """Return a class of graph modules of `ours`, instances of `own` too where that can be."""
    if issubclass(own, fx.GraphModule) or _customises_access(own):
        return ours
    # Methods of our own first; everything else is the user's.
    bases = (ours, _Start, own)
    mixed: Any = type(own.__name__, bases, {"__module__": own.__module__})
    return mixed


def own_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return what is the user's of the attributes of a graph module."""
    ours = GRAPH_MODULE_STATE | {"perforation"}
    return {name: value for name, value in state.items() if name not in ours}


def clash(ours: type[fx.GraphModule], more: Iterable[str], module: nn.Module) -> str | None:
    """Return why an instance of `ours` cannot take the place of `module`, or None.

    Args:
        ours: a class of graph modules.
        more: names of attributes that its instances have.
        module: a user's.
    """
    own = {*module.__dict__, *module._modules, *module._parameters, *module._buffers}
    for base in type(module).__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            own |= vars(base).keys()
    taken = {*more, *dir(ours)} - set(dir(nn.Module))
    if isinstance(module, fx.GraphModule):
        taken -= set(dir(fx.GraphModule)) | set(GRAPH_MODULE_STATE)
    hidden = sorted(own & taken)
    return (
        f"its attribute {hidden[0]!r} would hide behind {ours.__name__}.{hidden[0]}"
        if hidden
        else None
    )


def _customises_access(cls: type) -> bool:
    """Return whether a user's class watches its attributes, which a graph module's would upset."""
    watched = ("__setattr__", "__getattr__", "__delattr__")
    return cls.__getattribute__ is not object.__getattribute__ or any(
        getattr(cls, name) is not getattr(nn.Module, name) for name in watched
    )
