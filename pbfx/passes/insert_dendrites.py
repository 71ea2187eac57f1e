"""Insert a dendrites node after each call of a soma.

    y = soma(x)          ->    y = soma(x)
                               d = soma.dendrites(y, x)
    ... y ...                  ... d[0] ...

Safe because the dendrites' links to the soma start at zero, so `d[0]` equals `y` bit for bit, and
because the node follows the soma directly, before anything can change `x` or `y` in place. Only
sites that own a dendrites module are
rewritten: without one the graph is the source graph.
"""

from __future__ import annotations

import operator

from torch import fx

from pbfx.passes.context import PassContext, copy_provenance
from pbfx.sites import read_input, soma_weight


def insert_dendrites(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Rewrite every call of every grown site; return how many calls were rewritten."""
    rewrites = 0
    for path, (site, _) in ctx.grown(gm).items():
        for soma in list(gm.graph.nodes):
            if soma_weight(soma) != site.weight or any(user.target == path for user in soma.users):
                continue
            with gm.graph.inserting_after(soma):
                dendrites = gm.graph.call_module(path, (soma, read_input(soma)))
            with gm.graph.inserting_after(dendrites):
                neuron = gm.graph.call_function(operator.getitem, (dendrites, 0))
            copy_provenance(soma, dendrites, neuron)
            soma.replace_all_uses_with(
                neuron, delete_user_cb=lambda user, keep=dendrites: user is not keep
            )
            rewrites += 1
    return rewrites
