"""Where a site's dendrites join: at the op's output, or after the norm that alone reads it.

    y = soma(x)                                  y = soma(x)
    n = norm(y)               or                 n = norm(y.permute(0, 2, 3, 1))
    ... n + T f(z) ...                           ... n + T f(z) ...

An op and the norm that follows it are one site. A norm undoes what lies before it: a dendrite that
joined at y would be divided by the spread of y, so its link would lose its meaning as y grows, and
every dendrite would shift the norm's running statistics. After the norm it adds to the neuron's
preactivation what its link says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_arg

from pbfx.paths import module_at
from pbfx.sites.site import leaves
from pbfx.topology import may_write

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.RMSNorm,
)


def held_norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """Return what the batch norm `norm` gives for `x` in eval, whatever its mode."""
    statistics = norm.running_mean, norm.running_var
    return F.batch_norm(x, *statistics, norm.weight, norm.bias, False, 0.0, norm.eps)


FUNCTIONS: dict[Callable[..., Any], str] = {
    F.batch_norm: "batch_norm",
    held_norm: "batch_norm",
    F.group_norm: "group_norm",
    F.layer_norm: "layer_norm",
    F.instance_norm: "instance_norm",
    F.rms_norm: "rms_norm",
    # As torch.export writes them.
    torch.ops.aten.batch_norm.default: "batch_norm",
    torch.ops.aten.group_norm.default: "group_norm",
    torch.ops.aten.layer_norm.default: "layer_norm",
    torch.ops.aten.instance_norm.default: "instance_norm",
    torch.ops.aten.rms_norm.default: "rms_norm",
}
# Views by the name of the method or function, which is the same in torch.
_PERMUTES = frozenset({"transpose", "swapaxes", "swapdims", "permute"})
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"})
_SAME = frozenset({"contiguous"})
_VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity)


@dataclasses.dataclass(frozen=True)
class Join:
    """The norm after a soma, and the views between them, from the soma on."""

    norm: fx.Node
    views: tuple[fx.Node, ...]
    kind: str


def find_join(root: nn.Module, soma: fx.Node, neurons: int) -> Join | None:
    """Return where the dendrites of this call of a soma join, None for the soma's own output.

    Args:
        root: the module over which the graph runs.
        soma: a call of the soma.
        neurons: N, which the norm has to name where views lie between, so that what it normalises
            is the channels.
    """
    views: list[fx.Node] = []
    node = soma
    while True:
        readers = [user for user in node.users if not _reads_shape_only(user, node)]
        if len(readers) != 1 or _uses(readers[0]).count(node) != 1:
            return None
        reader = readers[0]
        kind = _norm(root, reader)
        if kind is not None and _first(reader) is node:
            if views and _features(root, reader) != neurons:
                return None
            # Dendrites read x after the norm, so x must still be what the soma read.
            between = _between(soma, reader)
            if any(may_write(root, other) for other in between if other not in views):
                return None
            return Join(reader, tuple(views), kind)
        if not (is_permutation(reader) or _is_reshape(root, reader)) or _first(reader) is not node:
            return None
        views.append(reader)
        node = reader


def is_permutation(node: fx.Node) -> bool:
    """Return whether `node` reorders the axes of its first argument, by literal numbers."""
    return _name(node) in _PERMUTES and all(
        isinstance(dim, int)
        for value in (*node.args[1:], *node.kwargs.values())
        for dim in leaves(value)
    )


def _is_reshape(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = module_at(root, str(node.target))
        return isinstance(module, _VIEW_MODULES) and not (
            module._forward_hooks or module._forward_pre_hooks
        )
    return _name(node) in _RESHAPES | _SAME


def _name(node: fx.Node) -> str | None:
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__ if node.target.namespace == "aten" else None
    if node.op == "call_function" and callable(node.target):
        name = getattr(node.target, "__name__", "")
        return name if getattr(torch, name, None) is node.target else None
    return None


def _norm(root: nn.Module, node: fx.Node) -> str | None:
    """Return what kind of norm `node` is, or None."""
    if node.op == "call_function" and callable(node.target):
        return FUNCTIONS.get(node.target)
    if node.op != "call_module":
        return None
    module = module_at(root, str(node.target))
    same = "forward" not in module.__dict__ and any(
        isinstance(module, base) and type(module).forward is base.forward for base in NORMS
    )
    return type(module).__name__ if same else None


def _features(root: nn.Module, norm: fx.Node) -> int | None:
    """Return how many features a norm says that it normalises, None where it does not say."""
    shape: Any
    held = norm.args[1] if norm.target is held_norm else None
    if norm.op == "call_module" or isinstance(held, fx.Node):
        module = module_at(root, str((held if isinstance(held, fx.Node) else norm).target))
        named = getattr(module, "num_features", getattr(module, "num_channels", None))
        shape = getattr(module, "normalized_shape", named)
    elif FUNCTIONS[norm.target] in ("layer_norm", "rms_norm"):  # pyright: ignore[reportArgumentType]
        shape = norm.args[1] if len(norm.args) > 1 else norm.kwargs.get("normalized_shape")
    else:
        # Statistics or weight: the first of its arguments that the model owns.
        owned = [n for n in norm.all_input_nodes if n.op == "get_attr"]
        value = _attribute(root, str(owned[0].target)) if owned else None
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else None
    sizes = leaves(shape)
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else None


def _attribute(root: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module_at(root, owner), name, None)


def _first(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _uses(node: fx.Node) -> list[fx.Node]:
    """Return the nodes in the arguments of `node`, as often as they stand there."""
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _reads_shape_only(user: fx.Node, node: fx.Node) -> bool:
    """Return whether `user` takes nothing but sizes from `node`."""
    if user.op == "call_method":
        if user.target in ("reshape_as", "view_as"):
            return user.args[0] is not node
        return user.target in ("size", "dim")
    if user.target is torch.ops.aten.sym_size.int:
        return True
    return user.target is getattr and user.args[1:] in (("shape",), ("ndim",))


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    nodes, node = [], first.next
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes
