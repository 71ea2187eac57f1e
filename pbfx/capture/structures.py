"""The shape of what goes into a forward and comes out of it: containers, constants, tensors.

`take_apart` lists the tensors of a value and describes the rest; `put_together` is its inverse, and
`follow` takes another value apart that has to be of the same structure. Containers are tuples,
lists, dicts, dataclasses, and whatever is registered with torch's pytrees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pbfx.errors import CaptureError


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor, or a size that depends on one: the entry `index` of the list."""

    index: int


@dataclasses.dataclass(frozen=True)
class Constant:
    """Anything that is neither tensor nor container."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Branch:
    """A container.

    `keys` are those of a dict or the names of a dataclass's fields, and positions otherwise; `spec`
    is that of a container that pytrees know, which is compared and rebuilt by it.
    """

    kind: type
    keys: tuple[Any, ...]
    parts: tuple[Structure, ...]
    spec: Any = None


Structure = Leaf | Constant | Branch


def take_apart(value: Any, leaves: list[Any], where: str = "") -> Structure:
    """Return the structure of `value`, and append its tensors to `leaves`.

    Args:
        value: anything.
        leaves: gains the tensors, and the sizes that depend on a tensor's.
        where: what to call `value` in an error.

    Raises:
        CaptureError: for numbers that are computed from a tensor's shape and are no whole ones.
    """
    if isinstance(value, (torch.Tensor, torch.SymInt)):
        leaves.append(value)
        return Leaf(len(leaves) - 1)
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        raise CaptureError(f"{where} is a {type(value).__name__}, computed from a tensor's shape")
    keys, children, spec = _open(value)
    if children is None:
        return Constant(value)
    parts = tuple(
        take_apart(child, leaves, _inside(where, key))
        for key, child in zip(keys, children, strict=True)
    )
    return Branch(type(value), keys, parts, spec)


def put_together(structure: Structure, leaves: Sequence[Any]) -> Any:
    """Return the value of `structure` whose tensors are `leaves`."""
    if isinstance(structure, Leaf):
        return leaves[structure.index]
    if isinstance(structure, Constant):
        return structure.value
    parts = [put_together(part, leaves) for part in structure.parts]
    if structure.spec is not None:
        return pytree.tree_unflatten(parts, structure.spec)
    if structure.kind is dict:
        return dict(zip(structure.keys, parts, strict=True))
    if structure.kind in (tuple, list):
        return structure.kind(parts)
    # A dataclass: as it was, without running its constructor again.
    twin = object.__new__(structure.kind)
    for name, part in zip(structure.keys, parts, strict=True):
        object.__setattr__(twin, name, part)
    return twin


def follow(structure: Structure, value: Any, leaves: list[Any], where: str) -> None:
    """Append to `leaves` the tensors of a value that has to have `structure`.

    Raises:
        CaptureError: naming the part that is of another kind, or another constant.
    """
    if isinstance(structure, Leaf):
        if not isinstance(value, torch.Tensor):
            raise _differs(where, "a tensor", value)
        leaves.append(value)
        return
    if isinstance(structure, Constant):
        if isinstance(value, torch.Tensor) or not _equal(value, structure.value):
            raise _differs(where, repr(structure.value), value)
        return
    keys, children, spec = _open(value) if type(value) is structure.kind else ((), None, None)
    if children is not None and structure.kind is dict and set(keys) == set(structure.keys):
        keys, children = structure.keys, [value[key] for key in structure.keys]
    if children is None or keys != structure.keys or spec != structure.spec:
        raise _differs(where, f"{structure.kind.__name__} of {list(structure.keys)}", value)
    for key, part, child in zip(keys, structure.parts, children, strict=True):
        follow(part, child, leaves, _inside(where, key))


def places(structure: Structure) -> dict[int, tuple[tuple[type, Any], ...]]:
    """Return for each leaf the containers around it, from the outside in, with the key in each."""
    if isinstance(structure, Leaf):
        return {structure.index: ()}
    if isinstance(structure, Constant):
        return {}
    return {
        index: ((structure.kind, key), *inner)
        for key, part in zip(structure.keys, structure.parts, strict=True)
        for index, inner in places(part).items()
    }


def _open(value: Any) -> tuple[tuple[Any, ...], list[Any] | None, Any]:
    """Return the keys of a container, what is under them, and its spec; children None for others.

    Everything by exact type: a subclass may hold more than its entries.
    """
    kind = type(value)
    if kind in (tuple, list):
        return tuple(range(len(value))), list(value), None
    if kind is dict:
        return tuple(value), list(value.values()), None
    children, spec = pytree.tree_flatten(value, is_leaf=lambda other: other is not value)
    if len(children) != 1 or children[0] is not value:
        keys = range(len(children))
        if isinstance(value, dict) and len(value) == len(children):
            return tuple(value), children, spec
        return tuple(keys), children, spec
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(value.__dict__) if hasattr(value, "__dict__") else None
        if names is not None:
            return names, [value.__dict__[name] for name in names], None
    return (), None, None


def _inside(where: str, key: Any) -> str:
    return f"{where}[{key!r}]" if where else str(key)


def _equal(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and bool(one == other))


def _differs(where: str, expected: str, value: Any) -> CaptureError:
    got = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
    return CaptureError(
        f"the graph was exported for {where} being {expected}, got {got}; call the model as the "
        "example_inputs of pbfx.transform did, or transform it again with the other ones"
    )
