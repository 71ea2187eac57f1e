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
nor where dendrites are on some of the neurons only, another norm follows, or one that cannot be
folded. It runs before training flags are
taken out, because a dropout between soma and norm decides where dendrites join.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from pbfx.cells import cell_map
from pbfx.dendrites import Dendrites
from pbfx.neurons import Neurons, neurons_of, reaching
from pbfx.passes.affine import Affine, affine_of, read_tensor
from pbfx.passes.context import PassContext, copy_provenance, free_path
from pbfx.sites import (
    Join,
    Site,
    describe_sites,
    find_join,
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
        if dendrites is not None and not reaching(dendrites):
            dendrites = None
        join = find_join(gm, soma, site.neurons)
        if join is None and dendrites is None:
            continue
        reason = _why_apart(gm, soma, site)
        if reason is None and dendrites is not None and dendrites.channels is not None:
            reason = "its dendrites are on some of its neurons"
        affine = None if join is None else affine_of(gm, site, join)
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
            gm.add_submodule(made[key], _neurons(gm, soma, site, dendrites, affine, ctx.portable))
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
    value = read_tensor(gm, bias)
    fits = isinstance(value, Tensor) and tuple(value.shape) == (site.neurons,)
    return None if fits else "its bias is computed"


def _neurons(
    gm: fx.GraphModule,
    soma: fx.Node,
    site: Site,
    dendrites: Dendrites | None,
    affine: Affine | None,
    portable: bool,
) -> Neurons:
    owner, _, name = site.weight.rpartition(".")
    weight: Tensor = getattr(gm.get_submodule(owner), name)
    if soma.op == "call_module":
        bias = gm.get_submodule(str(soma.target)).bias
    else:
        call = read_call(soma)
        bias = None if call is None else read_tensor(gm, call.arguments["bias"])
    bias = bias if isinstance(bias, Tensor) else None
    if affine is None:
        return neurons_of(site, weight, bias, dendrites, (), portable)
    dtype, scale = weight.dtype, affine.scale
    wide = weight.to(scale.dtype) * site.along_weight(scale[None])[0]
    shift = affine.shift if bias is None else affine.shift + scale * bias.to(scale.dtype)
    folded = wide.to(dtype), shift.to(dtype)
    return neurons_of(site, *folded, dendrites, affine.ranks, portable)


def _bias(soma: fx.Node) -> str:
    """Return what tells apart the biases of calls with one weight."""
    call = read_call(soma)
    return str(soma.target) if call is None else str(getattr(call.arguments["bias"], "target", ""))


def _identity(norm: fx.Node) -> str:
    """Return what tells two norms apart: the module or the statistics that they read."""
    reads = [str(node.target) for node in norm.all_input_nodes if node.op == "get_attr"]
    return " ".join([str(norm.target), *reads, *(str(a) for a in norm.args if type(a) is float)])
