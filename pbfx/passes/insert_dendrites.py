"""Insert a dendrites node after each call of a soma, or after the norm that alone reads it.

    y = soma(x)          ->    y = soma(x)
                               d = soma.dendrites(y, x)
    ... y ...                  ... d[0] ...

    y = soma(x)          ->    y = soma(x)
    n = norm(y)                n = norm(y)
                               d = soma.dendrites(n, x)
    ... n ...                  ... d[0] ...

Views between soma and norm are undone before the dendrites and done again after them, because these
take what has the shape of the soma's output.

Safe because the dendrites' links to the soma start at zero, so `d[0]` equals what it is given bit
for bit, and because nothing changes `x` in place before they read it: the node follows the soma
directly, or `find_join` has looked at what lies between. Only sites that own a dendrites module are
rewritten: without one the graph is the source graph.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from pbfx.passes.context import PassContext, call_module, copy_provenance
from pbfx.paths import join
from pbfx.sites import find_join, is_permutation, leaves, read_input, soma_weight


def insert_dendrites(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Rewrite every call of every grown site; return how many calls were rewritten."""
    rewrites, grown = 0, ctx.grown(gm)
    # Asked once per node: a large model has hundreds of each, and what is inserted is no soma.
    somas: dict[str, list[fx.Node]] = {site.weight: [] for site, _ in grown.values()}
    for node in gm.graph.nodes:
        # A layer can be the soma of one site only.
        if node.op != "call_module" or join(str(node.target), "weight") in somas:
            weight = soma_weight(gm, node)
            if weight in somas:
                somas[weight].append(node)
    for path, (site, _) in grown.items():
        for soma in somas[site.weight]:
            found = find_join(gm, soma, site.neurons)
            place, views = (soma, ()) if found is None else (found.norm, found.views)
            if not _is_joined(place, path, len(views)):
                _insert(gm.graph, path, soma, place, views)
                rewrites += 1
    return rewrites


def _is_joined(place: fx.Node, path: str, views: int) -> bool:
    """Return whether the dendrites at `path` read `place` already, beyond so many views."""
    return any(
        user.target == path or (views > 0 and _is_joined(user, path, views - 1))
        for user in place.users
    )


def _insert(
    graph: fx.Graph, path: str, soma: fx.Node, place: fx.Node, views: tuple[fx.Node, ...]
) -> None:
    added: list[fx.Node] = []
    with graph.inserting_before(place.next):
        value = place
        for view in reversed(views):
            value = _undo(graph, view, value)
            added.append(value)
        added.append(call_module(graph, path, (value, read_input(soma))))
        value = graph.call_function(operator.getitem, (added[-1], 0))
        added.append(value)
        for view in views:
            value = _redo(graph, view, value)
            added.append(value)
    copy_provenance(soma, *added)
    place.replace_all_uses_with(value, delete_user_cb=lambda user: user is not added[0])


def _undo(graph: fx.Graph, view: fx.Node, value: fx.Node) -> fx.Node:
    """Give `value`, which has the shape of `view`, the shape of what `view` was taken from."""
    if not is_permutation(view):
        return graph.call_method("reshape_as", (value, view.args[0]))
    dims = [dim for given in (*view.args[1:], *view.kwargs.values()) for dim in leaves(given)]
    # An op of torch.export's has its overload in its name.
    name = str(getattr(view.target, "__name__", view.target)).partition(".")[0]
    if name != "permute":
        # Two axes that change places do so again.
        return graph.call_function(torch.transpose, (value, *dims))
    forward = [dim % len(dims) for dim in dims]
    return graph.call_function(torch.permute, (value, [forward.index(d) for d in range(len(dims))]))


def _redo(graph: fx.Graph, view: fx.Node, value: fx.Node) -> fx.Node:
    if not is_permutation(view):
        return graph.call_method("reshape_as", (value, view))
    return graph.create_node(view.op, view.target, (value, *view.args[1:]), view.kwargs)
