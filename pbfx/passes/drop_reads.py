"""Drop reads of attributes that nothing uses any more, so that what they read can go too.

    w = self.fc.weight; t = w.t()        ->        nothing

Safe because reading an attribute and transposing it have no effect. It drops nothing else: fx's own
dead-code elimination does not know that `x.add_(y)` writes.
"""

from __future__ import annotations

from torch import fx

from pbfx.passes.context import PassContext
from pbfx.sites import is_transpose


def drop_reads(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Erase reads, and transposes of what was read, that have no users; return how many."""
    rewrites = 0
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and (node.op == "get_attr" or is_transpose(node)):
            gm.graph.erase_node(node)
            rewrites += 1
    return rewrites
