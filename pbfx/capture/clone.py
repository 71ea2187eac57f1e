"""New module objects over a user's parameters.

The captured graph runs over a *shared clone*: the same module classes, the very same parameters and
buffers, but new module objects, so that dendrites can nest under the op that owns a weight
(`fc1.dendrites`) while the user's own module keeps exactly the keys, hooks and attributes that it
had.
"""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

# What every nn.Module keeps in its __dict__: the registries of parameters, buffers and hooks, and a
# few flags.
REGISTRIES = frozenset(nn.Module().__dict__)


def shared_clone(module: nn.Module) -> nn.Module:
    """Return new module objects over the same parameters, buffers and attributes.

    Sharing inside the tree is kept: a module registered twice is one clone registered twice. Hooks
    are carried over, into registries of the clone's own. Attributes that lead back into the tree (a
    list of layers, a bound method) lead to the clones. TorchScript modules have no Python state to
    clone and stay the very objects.
    """
    clones: dict[int, nn.Module] = {}

    def clone(original: nn.Module) -> nn.Module:
        if isinstance(original, torch.jit.ScriptModule):
            return original
        if id(original) in clones:
            return clones[id(original)]
        # Not through the class's own __new__: that of a GraphModule makes a new class without its
        # forward.
        twin = object.__new__(type(original))
        clones[id(original)] = twin
        # The clone gets registries (parameters, buffers, hooks) of its own over the very same
        # tensors and hooks.
        for name, value in original.__dict__.items():
            twin.__dict__[name] = copy.copy(value) if name in REGISTRIES else value
        twin.__dict__["_modules"] = {
            name: None if child is None else clone(child)
            for name, child in original._modules.items()
        }
        return twin

    root = clone(module)
    redirect(clones.values(), clones)
    return root


def redirect(modules: Iterable[nn.Module], successors: Mapping[int, nn.Module]) -> None:
    """Let the attributes of `modules` lead to the successors of the modules they lead to now.

    Args:
        modules: edited in place: what is registered in them, and what their plain attributes hold
            (modules, bound methods, and lists, tuples and dicts of those).
        successors: what takes a module's place, by the `id` of that module.
    """

    def follow(value: Any, inside: tuple[int, ...] = ()) -> Any:
        if isinstance(value, nn.Module):
            return successors.get(id(value), value)
        if isinstance(value, types.MethodType):
            owner = successors.get(id(value.__self__))
            return value if owner is None else types.MethodType(value.__func__, owner)
        kind = type(value)
        if kind not in (list, tuple, dict) or id(value) in inside:
            return value
        old = list(value.values() if kind is dict else value)
        new = [follow(item, (*inside, id(value))) for item in old]
        # What leads nowhere new stays the very object that the user put there.
        if all(map(operator.is_, old, new)):
            return value
        return dict(zip(value, new, strict=True)) if kind is dict else kind(new)

    for module in modules:
        for name, value in module.__dict__.items():
            if name not in REGISTRIES:
                module.__dict__[name] = follow(value)
        children = module._modules
        for name, child in children.items():
            if child is not None:
                children[name] = successors.get(id(child), child)


def python_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Return the modules in `root` by path, without TorchScript, which has no Python state."""
    return {
        path: module
        for path, module in root.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    }
