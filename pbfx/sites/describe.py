"""Read the sites off a graph."""

from __future__ import annotations

import dataclasses

from torch import fx, nn

from pbfx.attention import project_apart
from pbfx.paths import module_at
from pbfx.sites.functions import describe_function, read_call
from pbfx.sites.layers import describe_module
from pbfx.sites.norms import find_join
from pbfx.sites.site import Site, Skipped
from pbfx.sites.unfold import unfolded
from pbfx.topology import reaches_output


def describe_sites(
    root: nn.Module, graph: fx.Graph
) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """Return the sites of `graph` in the order of their first call, and what was left out.

    Args:
        root: the module over which the graph runs; every path is relative to it.
        graph: the source graph.

    Returns:
        Sites, and the other ops with parameters, with the reason for each.
    """
    sites: dict[str, Site] = {}
    skipped: dict[str, Skipped] = {}
    graph = unfolded(root, graph)
    useful, alive = reaches_output(graph), set()
    for node in graph.nodes:
        found = _describe(root, node)
        if isinstance(found, Site):
            join = find_join(root, node, found.neurons)
            if join is not None:
                # A bias of the op would be lost in the norm, so ops before norms often have none;
                # a dendrite joins after it and needs one.
                found = dataclasses.replace(found, norm=join.kind, biased=True)
            if node in useful:
                alive.add(found.name)
            known = sites.get(found.name)
            together = found if known is None else _merge(known, found)
            if together is None:
                reason = "its weight is used with two different geometries"
                found = Skipped(found.name, found.op, reason)
            else:
                sites[found.name] = together
        if isinstance(found, Skipped):
            skipped.setdefault(found.name, found)
    for site in sites.values():
        if site.name not in alive | skipped.keys():
            reason = "its output does not reach the model's output"
            skipped[site.name] = Skipped(site.name, site.op, reason)
    # A weight that any of its calls rules out is ruled out: its dendrites would be right for some
    # calls only.
    eligible = tuple(site for site in sites.values() if site.name not in skipped)
    return eligible, tuple(skipped.values())


def _describe(root: nn.Module, node: fx.Node) -> Site | Skipped | None:
    """Return the site that `node` calls, why it is none, or None for other ops."""
    if node.target is project_apart:
        path = str(node.args[3].target)  # pyright: ignore[reportOptionalMemberAccess,reportAttributeAccessIssue]
        reason = "its query is not its key, so that its rows read different inputs"
        return Skipped(path, "linear", reason)
    if node.op == "call_module":
        return describe_module(module_at(root, str(node.target)), str(node.target), node)
    call = read_call(node)
    return None if call is None else describe_function(root, node, call)


def _merge(known: Site, found: Site) -> Site | None:
    """Return the site of two calls with one weight, or None where no dendrite can serve both.

    A bias of one call only is no obstacle: dendrites have a bias of their own.
    """
    together = dataclasses.replace(
        known,
        bias=known.bias or found.bias,
        biased=known.biased or found.biased,
        norm=known.norm or found.norm,
        calls=known.calls + 1,
    )
    same = dataclasses.replace(
        found,
        op=known.op,
        bias=together.bias,
        biased=together.biased,
        norm=together.norm,
        calls=together.calls,
    )
    return together if same == together else None
