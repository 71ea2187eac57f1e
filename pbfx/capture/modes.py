"""Let an exported graph follow `train()` and `eval()`.

    train: dropout(x, 0.5, True)      ->    dropout(x, 0.5, self.training)
    eval:  dropout(x, 0.5, False)

    train: attention(q, k, v, m, 0.1)    ->    attention(q, k, v, m, (0.0, 0.1)[self.training])
    eval:  attention(q, k, v, m, 0.0)

    train: add_(batches, 1)           ->    add_(batches, self.training)
    eval:  nothing

torch.export asks for each training flag once and writes the answer into the graph. Here the graphs
of both answers are walked side by side; where a value differs, the graph reads the flag again, of
the innermost module that was running. Graphs that differ in anything else have no common form.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from pbfx.errors import CaptureError

# How a size that depends on the inputs reads, in the meta of the node that computes it.
SIZE = "pbfx_size"
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Difference:
    """A value that two graphs have at the same place.

    `where` is the place in the node's arguments, None for a count that only one of them takes.
    """

    node: fx.Node
    module: str
    where: tuple[Any, ...] | None
    ours: Any
    theirs: Any


def differences(ours: fx.Graph, theirs: fx.Graph, root: nn.Module) -> list[Difference]:
    """Return the values in which two exports of one model differ.

    Args:
        ours: exported in training mode.
        theirs: exported in another.
        root: the module over which both graphs run.

    Raises:
        CaptureError: if they differ in more than values. Its `culprit` is the module, if it is
            known, in which they part.
    """
    return list(_walk(ours, theirs, root))


def _walk(ours: fx.Graph, theirs: fx.Graph, root: nn.Module) -> Iterator[Difference]:
    same: dict[Any, fx.Node] = {}
    # Sizes are computed where they are first needed, attributes are read anywhere.
    mine, other = (
        [n for n in graph.nodes if n.op != "get_attr" and SIZE not in n.meta]
        for graph in (ours, theirs)
    )
    at, last = 0, None
    for node in mine:
        twin = other[at] if at < len(other) else None
        alike = twin is not None and (node.op, node.target) == (twin.op, twin.target)
        if _counts(root, node) and not (
            alike and _same(root, same, node.args[0], twin.args[0])  # pyright: ignore[reportOptionalMemberAccess]
        ):
            yield Difference(node, module_of(node), None, node.args[1], 0)
            continue
        if twin is None or not alike:
            raise _parted(root, last, node, twin)
        at += 1
        same[node] = twin
        for where, one, two in _arguments(node, twin):
            if isinstance(one, fx.Node) or isinstance(two, fx.Node):
                if not _same(root, same, one, two):
                    raise _parted(root, last, node, twin)
            elif type(one) is not type(two) or one != two:
                if not all(isinstance(v, (bool, int, float, str)) for v in (one, two)):
                    raise _parted(root, last, node, twin)
                yield Difference(node, module_of(node), where, one, two)
        last = node
    if at < len(other):
        raise _parted(root, last, other[at], None)


def _same(root: nn.Module, same: Mapping[Any, fx.Node], one: Any, two: Any) -> bool:
    """Return whether two nodes stand for one value: `same` holds what has been compared."""
    if not isinstance(one, fx.Node) or not isinstance(two, fx.Node):
        return False
    if SIZE in one.meta or SIZE in two.meta:
        return one.meta.get(SIZE) == two.meta.get(SIZE)
    # Whoever reads a counter after it has counted reads the counter.
    while one not in same and _counts(root, one):
        one = one.args[0]
    if one.op == two.op == "get_attr":
        return one.target == two.target
    return same.get(one) is two


def follow_modes(graph: fx.Graph, found: list[Difference]) -> None:
    """Let `graph`, exported in training mode, read the flags on which `found` depends.

    Args:
        graph: edited in place.
        found: what `differences` found to the graph of eval mode.
    """
    flags: dict[tuple[fx.Node, str], fx.Node] = {}
    for difference in found:
        node = difference.node
        with graph.inserting_before(node):
            key = (node, difference.module)
            if key not in flags:
                flags[key] = graph.get_attr(f"{difference.module}.training".lstrip("."))
                flags[key].meta = dict(node.meta)
            value = flags[key]
            pair = (difference.theirs, difference.ours)
            counts = difference.where is None and pair == (0, 1)
            if not counts and not (pair[0] is False and pair[1] is True):
                value = graph.call_function(operator.getitem, (pair, value))
                value.meta = dict(node.meta)
        if difference.where is None:
            node.args = (node.args[0], value)
        else:
            _complete(node)
            _put(node, difference.where, value)


def check_modules_of_flags(
    found: list[Difference], mixed: list[Difference], training: Mapping[str, bool]
) -> None:
    """Check that each flag is that of the module which it was taken for.

    Args:
        found: the differences between training mode and eval mode.
        mixed: those between training mode and `training`.
        training: by path, which modules train and which do not.

    Raises:
        CaptureError: if a value follows the flag of another module.
    """
    changed = {(d.node, d.where) for d in mixed}
    for difference in found:
        follows = (difference.node, difference.where) in changed
        if follows == training.get(difference.module, True):
            raise CaptureError(
                f"{difference.node.target} in {difference.module or 'the root'!r} depends on the "
                "training flag of another module, which the graph cannot tell; read self.training "
                "in the module that computes with it"
            )


def module_of(node: fx.Node) -> str:
    """Return the path of the innermost module that was running when `node` was recorded."""
    stack = [path for path in node.meta.get("nn_module_stack", {}) if path != node.target]
    return stack[-1] if stack else ""


def _counts(root: nn.Module, node: Any) -> bool:
    """Return whether all that `node` does is to add a whole number to a counter of the model."""
    if not isinstance(node, fx.Node) or node.target is not torch.ops.aten.add_.Tensor:
        return False
    counter, step = node.args
    if node.kwargs or type(step) is not int:
        return False
    if not isinstance(counter, fx.Node) or counter.op != "get_attr":
        return _counts(root, counter)
    owner, _, name = str(counter.target).rpartition(".")
    buffer = root.get_submodule(owner)._buffers.get(name)
    return buffer is not None and not buffer.is_floating_point() and not buffer.is_complex()


def _arguments(node: fx.Node, twin: fx.Node) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Yield place and values of the arguments of two nodes, down to the entries of containers."""
    ours, theirs = _filled(node), _filled(twin)
    for key in ours | theirs:
        yield from _entries((key,), ours.get(key, _MISSING), theirs.get(key, _MISSING))


def _entries(where: tuple[Any, ...], one: Any, two: Any) -> Iterator[tuple[Any, Any, Any]]:
    containers = (tuple, list)
    if isinstance(one, containers) and isinstance(two, containers) and len(one) == len(two):
        for index, pair in enumerate(zip(one, two, strict=True)):
            yield from _entries((*where, index), *pair)
    elif isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one:
            yield from _entries((*where, key), one[key], two[key])
    else:
        yield where, one, two


def _filled(node: fx.Node) -> dict[Any, Any]:
    """Return the arguments of `node` by place or name, those that it leaves out by the schema."""
    filled: dict[Any, Any] = dict(enumerate(node.args)) | dict(node.kwargs)
    schema = getattr(node.target, "_schema", None)
    if schema is not None and isinstance(node.target, torch._ops.OpOverload):
        for index, argument in enumerate(schema.arguments):
            key = argument.name if argument.kwarg_only else index
            if key not in filled and argument.name not in filled:
                filled[key] = argument.default_value
    return filled


def _complete(node: fx.Node) -> None:
    """Write out the arguments that an op's schema would fill in."""
    filled = _filled(node)
    places = sorted(key for key in filled if isinstance(key, int))
    node.args = tuple(filled[key] for key in places)
    node.kwargs = {key: value for key, value in filled.items() if isinstance(key, str)}


def _put(node: fx.Node, where: tuple[Any, ...], value: fx.Node) -> None:
    def put(container: Any, where: tuple[Any, ...]) -> Any:
        if not where:
            return value
        key, *rest = where
        if isinstance(container, dict):
            return {**container, key: put(container[key], tuple(rest))}
        entries = list(container)
        entries[key] = put(entries[key], tuple(rest))
        return type(container)(entries) if isinstance(container, tuple) else entries

    key, *rest = where
    if isinstance(key, int):
        node.args = tuple(
            put(argument, tuple(rest)) if index == key else argument
            for index, argument in enumerate(node.args)
        )
    else:
        node.kwargs = {**node.kwargs, key: put(node.kwargs[key], tuple(rest))}


def _parted(
    root: nn.Module, last: fx.Node | None, node: fx.Node, twin: fx.Node | None
) -> CaptureError:
    """Return the error for graphs that part at `node` and `twin`, after they had `last` alike."""
    # The module that goes on where both were is the one that does something else.
    before = "" if last is None else module_of(last)

    def nearness(path: str) -> tuple[int, int]:
        pairs = zip(path.split("."), before.split("."), strict=False)
        shared = list(itertools.takewhile(lambda pair: pair[0] == pair[1] != "", pairs))
        return len(shared), len(path)

    path = max([module_of(n) for n in (node, twin) if n is not None], key=nearness)
    found = " and ".join("nothing" if n is None else _described(n) for n in (node, twin))
    error = CaptureError(
        f"{path or 'forward'} computes something else in train than in eval ({found}), and a graph "
        "has only one of them; pass the flag on instead of asking it (F.dropout(x, "
        "training=self.training))"
    )
    error.culprit = root.get_submodule(path) if path else root
    return error


def _described(node: fx.Node) -> str:
    return f"{node.op} {node.target}" if node.op != "output" else "what is returned"
