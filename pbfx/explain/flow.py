"""The data flow of one part as plain data, for pictures: what is computed, and what reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from itertools import pairwise

import networkx as nx
from torch import fx

from pbfx.capture import Rung
from pbfx.paths import join
from pbfx.perforated import PerforatedModule
from pbfx.sites import Site, find_join, soma_weight
from pbfx.topology import dataflow, reaches_output

SITE, LEFT_OUT, APART, OTHER, EDGE = "site", "left out", "apart", "other", "edge"


@dataclasses.dataclass(frozen=True)
class Step:
    """One node of a picture.

    Attributes:
        kind: a site, an op with parameters that was left out, a module that is a part of its own or
            keeps its forward, another op, or an edge of the graph: an input or the output.
        label: the path of what owns parameters, the op's name of others.
        detail: what it is, where the label is a path.
        dendrites: how many each neuron of a site has.
    """

    kind: str
    label: str
    detail: str = ""
    dendrites: int = 0


@dataclasses.dataclass(frozen=True)
class Flow:
    """The data flow of one part; edges lead from one of `steps` to another, by their places."""

    path: str
    class_name: str
    rung: Rung
    steps: tuple[Step, ...]
    edges: tuple[tuple[int, int], ...]


def flow_of(
    path: str,
    part: PerforatedModule,
    dendrites: Mapping[str, int],
    left_out: Container[str],
    apart: Container[str],
) -> Flow:
    """Return the data flow of `part`: a site with its norm is one step.

    Reads of parameters are left out, and ops without any that no output needs.

    Args:
        path: of the part.
        part: the part.
        dendrites: how many dendrites the sites of the model have, by full path.
        left_out: the ops that carry none, by full path.
        apart: the modules that are parts of their own or keep their forward, by full path.
    """
    flow = dataflow(part.perforation.source)
    flow.remove_nodes_from([node for node in flow if node.op == "get_attr"])
    home = _norms(part, flow)
    useful = reaches_output(part.perforation.source)
    steps: list[Step] = []
    place: dict[fx.Node, int] = {}
    for node in flow:
        if node in home:
            continue
        step = _step(node, path, part, dendrites, left_out, apart)
        # Assertions and what else comes to nothing would only be in the way.
        if step.kind != OTHER or node in useful:
            place[node] = len(steps)
            steps.append(step)
    place |= {node: place[soma] for node, soma in home.items()}
    shown = [(place[a], place[b]) for a, b in flow.edges if a in place and b in place]
    edges = {(a, b) for a, b in shown if a != b}
    rung = part.perforation.rung
    return Flow(path, type(part).__name__, rung, tuple(steps), tuple(sorted(edges)))


def _norms(part: PerforatedModule, flow: nx.DiGraph) -> dict[fx.Node, fx.Node]:
    """Return the norms of sites, and the views before them, with the soma whose step shows them.

    A norm that reads more than that, a computed weight for one, stays a step of its own.
    """
    found: dict[fx.Node, fx.Node] = {}
    for soma in flow:
        (site, *others) = _sites_at(soma, part) or [None]
        if site is None or others or soma_weight(part, soma) != site.weight:
            continue
        norm = find_join(part, soma, site.neurons)
        chain = [soma] if norm is None else [soma, *norm.views, norm.norm]
        if all(set(flow.predecessors(node)) == {before} for before, node in pairwise(chain)):
            found |= dict.fromkeys(chain[1:], soma)
    return found


def _step(
    node: fx.Node,
    path: str,
    part: PerforatedModule,
    dendrites: Mapping[str, int],
    left_out: Container[str],
    apart: Container[str],
) -> Step:
    if node.op == "placeholder":
        return Step(EDGE, str(node.target))
    if node.op == "output":
        return Step(EDGE, "output")
    sites = _sites_at(node, part)
    what = _what(node, part)
    if sites:
        return _site_step(node, path, part, sites, dendrites)
    # Modules and parameters go by their paths; a function with a computed weight by its node.
    weight = soma_weight(part, node) or ""
    for name in (str(node.target), weight, weight.removesuffix(".weight"), node.name):
        if name and join(path, name) in left_out:
            return Step(LEFT_OUT, join(path, name), what)
    full = join(path, str(node.target))
    if node.op == "call_module" and full in apart:
        return Step(APART, full, what)
    return Step(OTHER, what)


def _site_step(
    node: fx.Node,
    path: str,
    part: PerforatedModule,
    sites: list[Site],
    dendrites: Mapping[str, int],
) -> Step:
    """Return the step of one site, or of a layer with several inside."""
    counts = [dendrites[join(path, site.name)] for site in sites]
    site = sites[0]
    if len(sites) == 1:
        detail = f"{site.op}, {site.norm}" if site.norm else site.op
        return Step(SITE, join(path, site.name) or type(part).__name__, detail, counts[0])
    detail = f"{len(sites)} sites"
    if min(counts) != max(counts):
        detail += f", {min(counts)} to {max(counts)} dendrites"
    return Step(SITE, join(path, str(node.target)), detail, max(counts))


def _sites_at(node: fx.Node, part: PerforatedModule) -> list[Site]:
    """Return the sites whose soma `node` calls: those inside of a module that it calls, too."""
    weight = soma_weight(part, node)
    found = [site for site in part.perforation.sites if site.weight == weight]
    if not found and node.op == "call_module":
        inside = f"{node.target}."
        found = [s for s in part.perforation.sites if s.name.startswith(inside)]
    return found


def _what(node: fx.Node, part: PerforatedModule) -> str:
    """Return what `node` computes, in a word."""
    if node.op == "call_module":
        return type(part.get_submodule(str(node.target))).__name__
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target)).strip("_")
    return str(node.target).strip("_") if node.op == "call_method" else str(node.target)
