"""A batch norm behind an op as an affine map over its neurons, which can be folded into weights.

    batch_norm(y)  =  γ (y - μ) / sqrt(σ² + ε) + β  =  scale ⊙ y + shift        in eval mode

A batch norm normalises axis 1, whichever that is. Whether it is the axis of the neurons depends on
how many axes the input has, and on the views between op and norm; both are worked out here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pbfx.passes.hold_eval import NORMS, computes_as
from pbfx.sites import Join, Site, leaves

# How many axes each norm takes; functions take any.
_RANKS: tuple[tuple[type[nn.Module], tuple[int, ...]], ...] = (
    (nn.BatchNorm1d, (2, 3)),
    (nn.BatchNorm2d, (4,)),
    (nn.BatchNorm3d, (5,)),
)
_ANY_RANK = 2, 3, 4, 5
# Of the inputs of linear ops that are looked at.
_LINEAR_RANKS = 1, 2, 3, 4, 5
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum")
_ATEN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum")
_SIGNATURES: dict[Any, tuple[str, ...]] = {
    F.batch_norm: (*_BATCH_NORM, "eps"),
    torch.ops.aten.batch_norm.default: (*_ATEN, "eps", "cudnn_enabled"),
}


class Affine(NamedTuple):
    """A batch norm in eval mode, as `scale * y + shift` per neuron, both (N,)."""

    scale: Tensor
    shift: Tensor
    ranks: tuple[int, ...]


def affine_of(gm: fx.GraphModule, site: Site, join: Join) -> Affine | None:
    """Return a batch norm over the neurons as an affine map, None where it is none."""
    norm, ranks = join.norm, _ANY_RANK
    weight: Any
    bias: Any
    mean: Any
    variance: Any
    if norm.op == "call_module":
        module: Any = gm.get_submodule(str(norm.target))
        if not computes_as(module, NORMS):
            return None
        ranks = next((r for kind, r in _RANKS if isinstance(module, kind)), _ANY_RANK)
        mean, variance, eps = module.running_mean, module.running_var, module.eps
        weight, bias = module.weight, module.bias
    elif norm.target in _SIGNATURES:
        given = dict(zip(_SIGNATURES[norm.target], norm.args, strict=False)) | norm.kwargs
        training = given.get("training", False)
        reads_flag = (
            isinstance(training, fx.Node)
            and training.op == "get_attr"
            and str(training.target).rpartition(".")[2] == "training"
        )
        if training is not False and not reads_flag:
            return None
        names = ("running_mean", "running_var", "weight", "bias")
        owned = [read_tensor(gm, given.get(name)) for name in names]
        if any(
            given.get(name) is not None and value is None
            for name, value in zip(names, owned, strict=True)
        ):
            return None
        mean, variance, weight, bias = owned
        eps = given.get("eps", 1e-5)
    else:
        return None
    if mean is None or variance is None or not isinstance(eps, (int, float)):
        return None
    right = _ranks(site, join, ranks)
    if mean.shape != (site.neurons,) or right is None:
        return None
    # Folded once, so precision costs nothing.
    wide = torch.float32 if mean.device.type == "mps" else torch.float64
    scale = (variance.to(wide) + eps).rsqrt()
    scale = scale if weight is None else scale * weight.to(wide)
    shift = -mean.to(wide) * scale
    return Affine(scale, shift if bias is None else shift + bias.to(wide), right)


def _ranks(site: Site, join: Join, taken: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return for which ranks of its input the norm is one over the neurons, None for no rank.

    A norm normalises axis 1. An empty tuple says that it is one for every rank that it takes.
    """
    spatial = site.geometry.spatial
    # An nn.Flatten, nn.Unflatten or nn.Identity between them is not looked into.
    if any(view.op == "call_module" for view in join.views):
        return None
    right, wrong = [], []
    for start in (spatial + 1, spatial + 2) if spatial else _LINEAR_RANKS:
        place: Place | None = Place(start, start + site.geometry.channel_axis)
        for view in join.views:
            place = None if place is None else _moved(view, place, site.neurons)
        if place is not None and place.rank in taken:
            (right if place.axis == 1 else wrong).append(start)
    if not right:
        return None
    return tuple(right) if wrong else ()


class Place(NamedTuple):
    """How many axes a tensor has, and which is that of the neurons, None where it is not known."""

    rank: int
    axis: int | None


def _moved(view: fx.Node, place: Place, size: int) -> Place | None:
    """Return where a view puts the axis of the neurons, None where it takes no such tensor.

    Args:
        view: a permutation, `view`, `reshape`, `flatten`, ...
        place: what goes in.
        size: N.
    """
    rank, axis = place
    name = str(getattr(view.target, "__name__", view.target)).partition(".")[0]
    given = [leaf for value in (*view.args[1:], *view.kwargs.values()) for leaf in leaves(value)]
    literal = all(type(value) is int for value in given)
    if name in ("permute", "transpose", "swapaxes", "swapdims", "flatten") and literal:
        if not all(-rank <= dim < rank for dim in given):
            return None
        dims = [dim % rank for dim in given]
        if name == "permute":
            moved = None if axis is None else dims.index(axis)
            return Place(rank, moved) if len(dims) == rank else None
        if name != "flatten":
            one, other = dims
            return Place(rank, {one: other, other: one}.get(axis, axis))
        start, end = (*dims, *(0, rank - 1)[len(dims) :])
        if axis is None or start <= axis <= end:
            return Place(rank - (end - start), axis if start == end else None)
        return Place(rank - (end - start), axis if axis < start else axis - (end - start))
    if name == "contiguous":
        return place
    if name in ("view", "reshape") and given:
        # The last axis stays what it is where its size does.
        kept = axis == rank - 1 and type(given[-1]) is int and given[-1] == size
        return Place(len(given), len(given) - 1 if kept else None)
    return Place(rank, None)


def read_tensor(gm: fx.GraphModule, node: Any) -> Any:
    """Return the tensor that `node` reads off the model, or None."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(gm.get_submodule(owner), name, None)
    return value if isinstance(value, Tensor) else None
