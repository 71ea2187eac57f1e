"""Compute anew what a graph writes over one of its own tensors, where nobody could tell.

    out += x                 ->  out = out + x
    relu(y, inplace=True)    ->  relu(y, inplace=False)

Work in place binds all that has to do with a tensor to one region, and a residual addition would
bind a whole block. Compilers compute such work anew themselves, so that it costs nothing.

Safe where the memory is the graph's own, neither an input's nor a constant's, where nothing reads
it afterwards but through what the work returns, and where the result has the same shape, strides
and dtype. It does not fire otherwise, nor while the graph has gradients or autocast switched.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from pbfx.passes.lower_dendrites import ACTIVATIONS, value_of

_AUGMENTED: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast
_SWITCHES = frozenset((torch._C._set_grad_enabled, _ENTER, _EXIT))
# What `x.word_()` and `torch.word_(x)` do, `x.word()` and `torch.word(x)` return.
_WORDS = ACTIVATIONS | frozenset(("add", "sub", "mul", "div", "clamp", "neg", "exp", "square"))


def put_out_of_place(gm: fx.GraphModule, _: Any) -> int:
    """Rewrite work in place of `gm`, whose nodes carry example values; return how many."""
    memory = _memory_of(gm.graph)
    if memory is None:
        return 0
    place = {node: index for index, node in enumerate(gm.graph.nodes)}
    holders: dict[int, list[fx.Node]] = {}
    for node, held in memory.items():
        for storage in held:
            holders.setdefault(storage, []).append(node)
    rewrites, switched = 0, set()
    for node in gm.graph.nodes:
        _note_switch(node, switched)
        tensor = None if switched else written(node)
        if tensor is None or len(memory[tensor]) != 1:
            continue
        (storage,) = memory[tensor]
        before = [other for other in holders[storage] if place[other] < place[node]]
        own = all(other.op not in ("placeholder", "get_attr") for other in before)
        last = all(place[user] <= place[node] for other in before for user in other.users)
        if own and last and (call := _out_of_place(node)) and _agrees(node, *call):
            node.target, node.args, node.kwargs = call
            rewrites += 1
    return rewrites


def is_switch(node: fx.Node) -> bool:
    """Return whether a node only switches gradients or autocast on or off."""
    return node.target in _SWITCHES


def _note_switch(node: fx.Node, switched: set[Any]) -> None:
    """Add to `switched` what differs after `node` from how the graph began, and drop what does not.

    Autocast that is entered is left through the node that entered it.
    """
    if node.target is _ENTER:
        switched.add(node)
    elif node.target is _EXIT:
        switched.discard(node.args[0])
    elif is_switch(node):
        begun = torch.is_grad_enabled()
        (switched.discard if node.args == (begun,) else switched.add)(node.target)


def word_of(node: fx.Node) -> str:
    """Return the name of what a node calls, without an overload's."""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def written(node: fx.Node) -> fx.Node | None:
    """Return the tensor that a node works on in place, None if on none."""
    if node.op not in ("call_function", "call_method"):
        return None
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    word = word_of(node)
    in_place = (
        (word.endswith("_") and not word.endswith("__"))
        or node.target in _AUGMENTED
        or word == "setitem"
        or _says_so(node) is not None
    )
    return node.all_input_nodes[0] if in_place and node.all_input_nodes else None


def _says_so(node: fx.Node) -> int | str | None:
    """Return where a call has `inplace=True`: its place among the arguments, or the name."""
    if node.kwargs.get("inplace") is True:
        return "inplace"
    place = _place_of_inplace(node.target) if node.op == "call_function" else None
    given = place is not None and place < len(node.args) and node.args[place] is True
    return place if given else None


@functools.cache
def _place_of_inplace(function: Callable[..., Any]) -> int | None:
    """Return which argument of a function is `inplace`."""
    try:
        names = list(inspect.signature(function).parameters)
    # Builtin ones have no signature, and none of those that Dynamo leaves in a graph has a flag.
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _memory_of(graph: fx.Graph) -> dict[fx.Node, set[int]] | None:
    """Return the storages that each node's value is in; None where the graph does not tell."""
    memory: dict[fx.Node, set[int]] = {}
    for node in graph.nodes:
        value = value_of(node)
        if value is None and node.op != "output" and not is_switch(node):
            return None
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        if any(tensor.layout is not torch.strided for tensor in tensors):
            return None
        memory[node] = {tensor.untyped_storage()._cdata for tensor in tensors}
    return memory


_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _out_of_place(node: fx.Node) -> _Call | None:
    """Return target and arguments of a call that returns what this one writes, if there is one."""
    args, kwargs = tuple(node.args), dict(node.kwargs)
    if node.target in _AUGMENTED:
        return _AUGMENTED[node.target], args, kwargs
    said = _says_so(node)
    if isinstance(said, str):
        return node.target, args, kwargs | {said: False}
    if said is not None:
        return node.target, (*args[:said], False, *args[said + 1 :]), kwargs
    word = word_of(node).removesuffix("_")
    if "out" in kwargs or word not in _WORDS:
        return None
    if node.op == "call_method":
        return word, args, kwargs
    for owner in (torch, F):
        if getattr(owner, f"{word}_", None) is node.target and hasattr(owner, word):
            return getattr(owner, word), args, kwargs
    return None


def _agrees(node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the call gives what looks like the value of `node`."""
    value = value_of(node)
    arguments, named = fx.map_arg((args, kwargs), value_of)
    if not isinstance(value, Tensor):
        return False
    with getattr(value, "fake_mode", None) or contextlib.nullcontext():
        if node.op == "call_method":
            found = getattr(arguments[0], target)(*arguments[1:], **named)
        else:
            found = target(*arguments, **named)
    return (
        isinstance(found, Tensor)
        and (found.shape, found.stride()) == (value.shape, value.stride())
        and (found.dtype, found.requires_grad) == (value.dtype, value.requires_grad)
    )
