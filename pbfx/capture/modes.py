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
    same: dict[fx.Node, fx.Node] = {}
    # Sizes are computed where they are first needed, attributes are read anywhere.
    mine, other = (
        [n for n in graph.nodes if n.op != "get_attr" and SIZE not in n.meta]
        for graph in (ours, theirs)
    )
    at = 0
    for node in mine:
        twin = other[at] if at < len(other) else None
        if twin is None or (node.op, node.target) != (twin.op, twin.target):
            if not _counts(root, node):
                raise _parted(root, node, twin)
            yield Difference(node, module_of(node), None, node.args[1], 0)
            continue
        # A count that stands before one that both take.
        if _counts(root, node) and not _same(node.args[0], twin.args[0]):
            yield Difference(node, module_of(node), None, node.args[1], 0)
            continue
        at += 1
        same[node] = twin
        for where, one, two in _arguments(node, twin):
            if isinstance(one, fx.Node) or isinstance(two, fx.Node):
                if same.get(one, _MISSING) is two or _same(one, two):
                    continue
                raise _parted(root, node, twin)
            if type(one) is not type(two) or one != two:
                if not all(isinstance(v, (bool, int, float, str)) for v in (one, two)):
                    raise _parted(root, node, twin)
                yield Difference(node, module_of(node), where, one, two)
    if at < len(other):
        raise _parted(root, other[at], None)


def _same(one: Any, two: Any) -> bool:
    """Return whether two nodes read the same attribute, or compute the same size."""
    if not isinstance(one, fx.Node) or not isinstance(two, fx.Node):
        return False
    if SIZE in one.meta or SIZE in two.meta:
        return one.meta.get(SIZE) == two.meta.get(SIZE)
    return one.op == two.op == "get_attr" and one.target == two.target


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
    return next(reversed(node.meta.get("nn_module_stack", {})), "")


def _counts(root: nn.Module, node: fx.Node) -> bool:
    """Return whether all that `node` does is to add a whole number to a counter of the model."""
    if node.target is not torch.ops.aten.add_.Tensor or node.users or node.kwargs:
        return False
    counter, step = node.args
    if not isinstance(counter, fx.Node) or counter.op != "get_attr" or type(step) is not int:
        return False
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


def _parted(root: nn.Module, node: fx.Node, twin: fx.Node | None) -> CaptureError:
    first = module_of(node)
    paths = {first, first if twin is None else module_of(twin)}
    # What both have in common: the module in which they part.
    path = min(paths, key=len)
    while not all(f"{p}.".startswith(f"{path}.") or not path for p in paths):
        path = path.rpartition(".")[0]
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
