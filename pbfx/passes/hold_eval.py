"""Hold the network in eval mode, whatever `model.train()` says.

    dropout(x)                        ->    x
    batch_norm(x)                     ->    held_norm(x, batch_norm), with its running statistics
    f(x, training=self.training)      ->    f(x, training=False)

In the dendrite phase the network is frozen, and freezing has to include its noise: with dropout
active the error is noise too, and candidates learn nothing (measured: held-out correlations stay at
chance). The user's loop calls `model.train()` at will, so the graph must not read that flag. A
lowered graph is for inference, and held in eval for good.

A lowered graph, which others read too, has `F.batch_norm(x, running statistics, training=False)` in
the place of `held_norm`: five nodes where a restructure has to be quick with two.

Norms that keep no running statistics use the batch's in either mode and stay as they are. Modules
whose mode no graph shows (attention, recurrent nets), and those with hooks, which have to go on
firing, stay too: `train` of the perforated or lowered module leaves them in eval.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_arg

from pbfx.candidates import Candidates
from pbfx.dendrites import Dendrites
from pbfx.passes.context import PassContext, copy_provenance, get_attr
from pbfx.paths import find_module, module_at
from pbfx.phase import Phase
from pbfx.sites import held_norm, is_site_module, read_input
from pbfx.spread import Spread

DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def hold_eval(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Rewrite everything whose result depends on a training flag; return how many nodes."""
    if ctx.phase is not Phase.DENDRITE and not ctx.lowering:
        return 0
    rewrites = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            module = module_at(gm, str(node.target))
            if computes_as(module, DROPOUTS):
                node.replace_all_uses_with(read_input(node))
            elif computes_as(module, NORMS) and module.running_mean is not None:
                if not ctx.lowering:
                    _hold_norm(gm.graph, node)
                    rewrites += 1
                    continue
                node.replace_all_uses_with(_spelt_norm(gm.graph, node, module))
            else:
                continue
        elif node.op == "get_attr" and str(node.target).rpartition(".")[2] == "training":
            for user in list(node.users):
                user.args, user.kwargs = _without(node, user.args), _without(node, user.kwargs)
        else:
            continue
        gm.graph.erase_node(node)
        rewrites += 1
    return rewrites


def held_by_graph(part: fx.GraphModule, source: fx.Graph) -> list[nn.Module]:
    """Return the modules that the graph of `part` holds: itself, and the layers that were taken out
    of the `source` graph."""
    before, now = (
        {str(node.target) for node in graph.nodes if node.op == "call_module"}
        for graph in (source, part.graph)
    )
    # A pass may have dropped a module with its node.
    found = (find_module(part, path) for path in before - now)
    return [part, *(module for module in found if module is not None)]


def has_no_mode(module: nn.Module) -> bool:
    """Return whether `module` does the same in training: what owns dendrites does, and ops do."""
    return isinstance(module, (Dendrites, Candidates, Spread)) or is_site_module(module)


def computes_as(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Return whether `module` does what one of `kinds` does, and has no hooks that must fire."""
    if not isinstance(module, kinds):
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return not hooked and any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds
    )


def _hold_norm(graph: fx.Graph, node: fx.Node) -> None:
    """Let `node`, which calls a norm, hold it: to edit a node is less than to exchange it."""
    with graph.inserting_before(node):
        norm = get_attr(graph, str(node.target))
    args = read_input(node), norm
    node.op, node.target, node.args, node.kwargs = "call_function", held_norm, args, {}


def _spelt_norm(graph: fx.Graph, node: fx.Node, module: Any) -> fx.Node:
    with graph.inserting_before(node):
        mean, variance, weight, bias = (
            get_attr(graph, f"{node.target}.{name}") if getattr(module, name) is not None else None
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        norm = graph.call_function(
            F.batch_norm, (read_input(node), mean, variance, weight, bias, False, 0.0, module.eps)
        )
    copy_provenance(node, norm)
    return norm


def _without(flag: fx.Node, arguments: Any) -> Any:
    return map_arg(arguments, lambda node: False if node is flag else node)
