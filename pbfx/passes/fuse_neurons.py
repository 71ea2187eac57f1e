"""Fuse somas with their dendrites, and fold the batch norm that follows, for inference.

    y = soma(x)                                      y = soma.neurons(x)
    n = batch_norm(y.transpose(1, 2))        ->      n = y.transpose(1, 2)
    ... n ...                                        ... n ...

`soma.neurons` is one product over `[γ/σ W; V_1; ...; V_D]` and an epilogue. Ops without dendrites
are rewritten where they have a norm to fold.

Safe because in eval mode a batch norm is an affine map per neuron, because the dendrites join after
it either way, and because nothing else reads what lies between. Where a batch norm normalises the
neurons only for inputs of some ranks, the rewritten op checks that at each call.

It does not fire, and notes why, where the soma has to stay a call: one with hooks, with a weight or
bias that is computed from the input, of quantisation-aware training, given the size of its output;
nor where another norm follows, or one that cannot be folded. It runs before training flags are
taken out, because a dropout between soma and norm decides where dendrites join.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pbfx.cells import cell_map
from pbfx.dendrites import Dendrites
from pbfx.neurons import Neurons, reaching
from pbfx.passes.context import PassContext, copy_provenance, free_path
from pbfx.passes.hold_eval import NORMS, computes_as
from pbfx.sites import (
    Join,
    Site,
    describe_sites,
    find_join,
    is_permutation,
    leaves,
    read_call,
    read_input,
    soma_weight,
)

# Arguments of the functions that a fused op knows; `beta` of addmm, for one, it does not.
_KNOWN = frozenset(
    (
        *("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
        *("mat1", "mat2", "other", "tensor"),
    )
)
# How many axes each norm takes; functions take any.
_RANKS: tuple[tuple[type[nn.Module], tuple[int, ...]], ...] = (
    (nn.BatchNorm1d, (2, 3)),
    (nn.BatchNorm2d, (4,)),
    (nn.BatchNorm3d, (5,)),
)
_ANY_RANK = 2, 3, 4, 5
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


@torch.no_grad()
def fuse_neurons(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Rewrite every call of a soma that has dendrites or a norm to fold; return how many."""
    grown = {site.weight: (site, module) for site, module in ctx.grown(gm).values()}
    plain = {site.weight: site for site in describe_sites(gm, gm.graph)[0]}
    made: dict[tuple[str, str, str], str] = {}
    rewrites = 0
    for soma in list(gm.graph.nodes):
        path = soma_weight(gm, soma)
        if path not in grown and path not in plain:
            continue
        site, dendrites = grown.get(path) or (plain[path], None)
        if dendrites is not None and not reaching(dendrites.to_soma, dendrites.to_dendrite):
            dendrites = None
        join = find_join(gm, soma, site.neurons)
        if join is None and dendrites is None:
            continue
        reason = _why_apart(gm, soma, site)
        affine = None if join is None else _affine(gm, site, join)
        if reason is None and join is not None:
            if not ctx.fold_norms:
                reason = "norms are not to be folded"
            elif affine is None:
                reason = f"the {join.kind} behind it cannot be folded"
        if reason is not None:
            if dendrites is not None:
                ctx.notes[site.name] = reason
            continue
        key = path, _bias(soma), "" if join is None else _identity(join.norm)
        if key not in made:
            made[key] = free_path(gm, site.dendrites, "neurons")
            gm.add_submodule(made[key], _neurons(gm, soma, site, dendrites, affine))
        _rewrite(gm.graph, soma, made[key], join)
        rewrites += 1
    return rewrites


def _rewrite(graph: fx.Graph, soma: fx.Node, path: str, join: Join | None) -> None:
    with graph.inserting_before(soma):
        neurons = graph.call_module(path, (read_input(soma),))
    copy_provenance(soma, neurons)
    soma.replace_all_uses_with(neurons)
    graph.erase_node(soma)
    if join is not None:
        join.norm.replace_all_uses_with(read_input(join.norm))
        graph.erase_node(join.norm)


def _why_apart(gm: fx.GraphModule, soma: fx.Node, site: Site) -> str | None:
    """Return why this call of a soma has to stay one, or None."""
    if soma.op == "call_module":
        module = gm.get_submodule(str(soma.target))
        if module._forward_hooks or module._forward_pre_hooks:
            return "it has hooks, which have to see its call"
        if type(module).__module__.startswith("torch.ao.nn.qat."):
            return "it rounds its weight at each call"
        if len(soma.args) + len(soma.kwargs) != 1:
            return "it is given the size of its output"
        return None
    call = read_call(soma)
    assert call is not None, "soma_weight knows it"
    if soma.target is cell_map:
        return "its cell's step adds the bias on a GPU"
    if not _KNOWN.issuperset(soma.kwargs):
        return "its function is given more than weights and a form"
    if call.transposed and isinstance(call.arguments["output_padding"], fx.Node):
        return "it is given the size of its output"
    bias = call.arguments["bias"]
    if bias is None:
        return None
    value = _read(gm, bias)
    fits = isinstance(value, Tensor) and tuple(value.shape) == (site.neurons,)
    return None if fits else "its bias is computed"


def _neurons(
    gm: fx.GraphModule,
    soma: fx.Node,
    site: Site,
    dendrites: Dendrites | None,
    affine: Affine | None,
) -> Neurons:
    owner, _, name = site.weight.rpartition(".")
    weight: Tensor = getattr(gm.get_submodule(owner), name)
    if soma.op == "call_module":
        bias = gm.get_submodule(str(soma.target)).bias
    else:
        call = read_call(soma)
        bias = None if call is None else _read(gm, call.arguments["bias"])
    bias = bias if isinstance(bias, Tensor) else None
    if affine is None:
        return Neurons(site, weight, bias, dendrites)
    dtype, scale = weight.dtype, affine.scale
    wide = weight.to(scale.dtype) * site.along_weight(scale[None])[0]
    shift = affine.shift if bias is None else affine.shift + scale * bias.to(scale.dtype)
    return Neurons(site, wide.to(dtype), shift.to(dtype), dendrites, affine.ranks)


def _affine(gm: fx.GraphModule, site: Site, join: Join) -> Affine | None:
    """Return a batch norm over the neurons as an affine map, None where it is none."""
    norm, ranks = join.norm, _ANY_RANK
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
        owned = [_read(gm, given.get(name)) for name in names]
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
    possible = [rank for rank in taken if not spatial or rank in (spatial + 1, spatial + 2)]
    right, wrong = [], []
    for rank in possible:
        axis: int | None = rank + site.geometry.channel_axis
        for view in join.views:
            axis = None if axis is None else _moved(view, axis, rank)
        (right if axis == 1 else wrong).append(rank)
    if not right:
        return None
    return tuple(right) if wrong else ()


def _moved(view: fx.Node, axis: int, rank: int) -> int | None:
    """Return where a view puts an axis, None where it is no permutation of so many axes."""
    if view.op == "call_method" and view.target == "contiguous":
        return axis
    if not is_permutation(view):
        return None
    dims = [dim for given in (*view.args[1:], *view.kwargs.values()) for dim in leaves(given)]
    if not all(-rank <= dim < rank for dim in dims):
        return None
    dims = [dim % rank for dim in dims]
    name = str(getattr(view.target, "__name__", view.target)).partition(".")[0]
    if name == "permute":
        return dims.index(axis) if len(dims) == rank else None
    one, other = dims
    return {one: other, other: one}.get(axis, axis)


def _bias(soma: fx.Node) -> str:
    """Return what tells apart the biases of calls with one weight."""
    call = read_call(soma)
    return str(soma.target) if call is None else str(getattr(call.arguments["bias"], "target", ""))


def _identity(norm: fx.Node) -> str:
    """Return what tells two norms apart: the module or the statistics that they read."""
    reads = [str(node.target) for node in norm.all_input_nodes if node.op == "get_attr"]
    return " ".join([str(norm.target), *reads, *(str(a) for a in norm.args if type(a) is float)])


def _read(gm: fx.GraphModule, node: Any) -> Any:
    """Return the tensor that `node` reads off the model, or None."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(gm.get_submodule(owner), name, None)
    return value if isinstance(value, Tensor) else None
