"""Take apart the layers inside which dendrites have grown: recurrent cells and attention.

    a, w = attention(x, x, x)     ->      the projections, as functions, and what lies between

Safe because the parts give what the layer gives, bit for bit (see `pbfx.sites.unfold`); where torch
has a fused path for inference, which rounds otherwise, the parts are torch's ordinary path. A layer
without dendrites keeps its one call.
"""

from __future__ import annotations

from torch import fx

from pbfx.passes.context import PassContext
from pbfx.paths import module_at
from pbfx.sites import UNFOLDABLE, unfold


def unfold_layers(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Rewrite every call of a layer that owns a grown site's weight; return how many."""
    rewrites = 0
    weights = [site.weight for site, _ in ctx.grown(gm).values()]
    for node in list(gm.graph.nodes):
        if (
            node.op == "call_module"
            and isinstance(module_at(gm, str(node.target)), UNFOLDABLE)
            and any(weight.startswith(f"{node.target}.") for weight in weights)
        ):
            unfold(gm, gm.graph, node)
            rewrites += 1
    return rewrites
