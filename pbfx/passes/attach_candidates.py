"""Attach candidates to each dendrites node in the dendrite phase.

    d = soma.dendrites(y, x)    ->    d = soma.dendrites(y, x)
    ... d[0] ...                      ... soma.dendrites.candidates(d[0], x, d[1]) ...

Safe because the candidates return `d[0]` bit for bit. They stand in the path of the error, and
their output is used, so neither autograd nor dead-code elimination can drop them.
"""

from __future__ import annotations

import operator

from torch import fx

from pbfx.passes.context import PassContext, call_module, copy_provenance, part


def attach_candidates(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Rewrite every dendrites node whose module holds candidates; return how many."""
    rewrites = 0
    calls: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    for path, (_, module) in ctx.grown(gm).items():
        if module.candidates is None:
            continue
        target = f"{path}.candidates"
        for dendrites in calls.get(path, ()):
            neuron = part(dendrites, 0)
            assert neuron is not None, "insert_dendrites takes output 0 of every dendrites node"
            if any(user.target == target for user in neuron.users):
                continue
            with gm.graph.inserting_before(neuron.next):
                activations = gm.graph.call_function(operator.getitem, (dendrites, 1))
                candidates = call_module(gm.graph, target, (neuron, dendrites.args[1], activations))
            copy_provenance(dendrites, activations, candidates)
            neuron.replace_all_uses_with(
                candidates, delete_user_cb=lambda user, keep=candidates: user is not keep
            )
            rewrites += 1
    return rewrites
