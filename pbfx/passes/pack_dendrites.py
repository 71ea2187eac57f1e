"""Pack the dendrites of somas that stay ops of their own, for inference.

    d = soma.dendrites(y, x)     ->     d = soma.packed_dendrites(y, x)
    ... d[0] ...                        ... d ...

Safe because the packed dendrites compute the same from weights that are laid out once. Dendrites
that reach no soma are taken out. What `fuse_neurons` has rewritten has no such node.
"""

from __future__ import annotations

import torch
from torch import fx

from pbfx.neurons import PackedDendrites, reaching
from pbfx.passes.context import PassContext, copy_provenance, free_path, part


@torch.no_grad()
def pack_dendrites(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Rewrite every call of a dendrites module; return how many."""
    rewrites = 0
    for path, (_, dendrites) in ctx.grown(gm).items():
        calls = [n for n in gm.graph.nodes if n.op == "call_module" and n.target == path]
        if not calls:
            continue
        packed = None
        if reaching(dendrites):
            packed = free_path(gm, path, "packed_dendrites")
            gm.add_submodule(packed, PackedDendrites(dendrites))
        for call in calls:
            neuron = part(call, 0)
            assert neuron is not None, "insert_dendrites takes output 0 of every dendrites node"
            value = call.args[0]
            if packed is not None:
                with gm.graph.inserting_before(call):
                    value = gm.graph.call_module(packed, call.args)
                copy_provenance(call, value)
            assert isinstance(value, fx.Node)
            neuron.replace_all_uses_with(value)
            gm.graph.erase_node(neuron)
            gm.graph.erase_node(call)
            rewrites += 1
    return rewrites
