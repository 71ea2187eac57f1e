"""Where a graph is cut into regions: at its blocks, or around the dendrites of its sites.

    stem, [blocks.0], [blocks.1], ..., head                      blocks
    conv, norm, [dendrites, relu], conv, norm, [dendrites], ...  sites

A block is a run of nodes that belong to one member of a repeated container, such as `blocks.3`;
what lies between blocks is a region too. A growth changes every block that has sites, so that all
of it is compiled again. Cut around its sites, a graph falls into what grows, which is little, and
what a growth leaves alone: somas, norms, pooling, residual additions.

Regions are runs of nodes, so that a graph of regions has no circles, and work in place stays in one
region with all that it is done to.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx
from torch._ops import OpOverload

from pbfx.backend.out_of_place import is_switch, word_of, written
from pbfx.candidates import Candidates
from pbfx.dendrites import Dendrites
from pbfx.passes.lower_dendrites import ACTIVATIONS, module_path

# A member of a container of modules, and something inside it: `blocks.3` of `blocks.3.conv1`. A
# layer that is a member itself is too small to be a region.
_BLOCK = re.compile(r"((?:\D[^.]*\.)*?\d+(?:\.\d+)*)\..+")
# What only looks at a tensor from another side: work in place on it is work on what it looks at.
_LOOKS = (
    "view view_as reshape reshape_as flatten unflatten squeeze unsqueeze transpose permute t "
    "movedim swapaxes expand expand_as narrow select split chunk tensor_split unbind diagonal "
    "unfold getitem getattr detach contiguous to"
)
_VIEWS = frozenset(_LOOKS.split())
_NOT_COMPUTED = ("placeholder", "get_attr", "output")


def computed(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that compute something, in order."""
    return [node for node in graph.nodes if node.op not in _NOT_COMPUTED]


def cut_at_blocks(graph: fx.Graph) -> dict[str, int]:
    """Return the number of the region of each node that computes, by its name.

    What is computed outside any module after a block, such as an addition, belongs to that block,
    except for what no other block of its container has: the mean over the last block's output is no
    part of that block.
    """
    nodes = computed(graph)
    paths = [module_path(node).removesuffix(".dendrites") for node in nodes]
    inside = {path: match[1] for path in paths if (match := _BLOCK.fullmatch(path))}
    blocks = set(inside.values())
    runs: list[_Run] = []
    for node, path in zip(nodes, paths, strict=True):
        here = path if path in blocks else inside.get(path, "")
        if not runs or (path and here != runs[-1].block):
            runs.append(_Run(here))
        runs[-1].take(node, bool(path))
    runs = _cut(runs)
    return _whole_mutations(graph, (run.nodes for run in runs))


def cut_at_sites(graph: fx.Graph) -> dict[str, int]:
    """Return the number of the region of each node that computes, by its name.

    The dendrites of a site are a region, with the activation that a compiler fuses with them, and
    so is what lies between sites.
    """
    runs: list[_Run] = []
    for node in computed(graph):
        here = _site(node)
        before = runs[-1].block if runs else ""
        if before and not here and (is_switch(node) or _ends(runs[-1].nodes, node)):
            here = before
        if not runs or here != runs[-1].block:
            runs.append(_Run(here))
        runs[-1].take(node, True)
    return _whole_mutations(graph, (run.nodes for run in runs))


def _site(node: fx.Node) -> str:
    """Return the path of the dendrites, or of the candidates beside them, whose node it is."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    kind = stack[-1][1] if stack else None
    grows = isinstance(kind, type) and issubclass(kind, (Dendrites, Candidates))
    return module_path(node).removesuffix(".candidates") if grows else ""


def _ends(nodes: Sequence[fx.Node], node: fx.Node) -> bool:
    """Return whether `node` only takes a part of what they compute, or is fused with the end of it.

    Nothing is fused with an op of ours: what follows one need not be compiled again with it.
    """
    sources = node.all_input_nodes
    if len(sources) != 1 or sources[0] not in nodes:
        return False
    if node.target is operator.getitem:
        return True
    (source,) = sources
    made = source.args[0] if source.target is operator.getitem else source
    opaque = isinstance(made, fx.Node) and isinstance(made.target, OpOverload)
    return not opaque and list(source.users) == [node] and word_of(node) in ACTIVATIONS


@dataclasses.dataclass
class _Run:
    """Nodes in a row: those of a block and those outside any module that follow, `tail` of them."""

    block: str
    nodes: list[fx.Node] = dataclasses.field(default_factory=list)
    tail: int = 0

    def take(self, node: fx.Node, inside: bool) -> None:
        self.nodes.append(node)
        self.tail = 0 if inside else self.tail + 1

    @property
    def ops(self) -> list[Any]:
        """What the tail computes."""
        return [node.target for node in self.nodes[len(self.nodes) - self.tail :]]


def _cut(runs: list[_Run]) -> list[_Run]:
    """Move out of the last block of each container what follows it and no block before it."""
    cut: list[_Run] = []
    last: dict[str, _Run] = {}
    for run, after in itertools.zip_longest(runs, runs[1:]):
        container = run.block.rpartition(".")[0]
        before = last.get(container)
        cut.append(run)
        if not run.block:
            continue
        last[container] = run
        if before is None or (after is not None and after.block):
            continue
        common = before.ops
        if run.tail > len(common) and run.ops[: len(common)] == common:
            kept = len(run.nodes) - run.tail + len(common)
            moved, run.nodes = run.nodes[kept:], run.nodes[:kept]
            if after is None:
                cut.append(_Run("", moved))
            else:
                after.nodes[:0] = moved
    return cut


def _whole_mutations(graph: fx.Graph, runs: Iterable[Sequence[fx.Node]]) -> dict[str, int]:
    """Number the runs, those as one that lie between a tensor and work in place on it.

    A region saves what its backward needs; another one must not change that afterwards.
    """
    regions = {node.name: number for number, nodes in enumerate(runs) for node in nodes}
    merged = list(range(max(regions.values(), default=0) + 1))
    for node in graph.nodes:
        source = written(node)
        if source is None or node.name not in regions:
            continue
        while source.name in regions and word_of(source) in _VIEWS and source.all_input_nodes:
            source = source.all_input_nodes[0]
        first, last = regions.get(source.name, regions[node.name]), regions[node.name]
        for number in range(first, last + 1):
            merged[number] = min(merged[number], merged[first])
    return {name: merged[number] for name, number in regions.items()}
