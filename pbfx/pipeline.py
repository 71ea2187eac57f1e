"""Which passes run, in which order, and the ceremony around each.

The order is data. The runner checks the graph after every pass, records what changed, and turns a
failure into a `PassError` that names the pass; it never catches to carry on.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import operator
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from pbfx.artefacts import trace_json, trace_text
from pbfx.errors import PassError
from pbfx.passes import (
    attach_candidates,
    drop_reads,
    fuse_neurons,
    hold_eval,
    insert_dendrites,
    pack_dendrites,
    unfold_layers,
)
from pbfx.paths import find_module, module_at, modules_in

logger = logging.getLogger(__name__)

# The context is what this family of passes is told: a `PassContext` for those of `PASSES`.
Pass = Callable[[fx.GraphModule, Any], int]

PASSES: tuple[Pass, ...] = (
    # First, because it brings the somas inside layers to light.
    unfold_layers,
    # Before the candidates, which attach to dendrites nodes.
    insert_dendrites,
    # Reads the outputs of the dendrites nodes; rewrites nothing in the neuron phase.
    attach_candidates,
    # Last, so that nothing inserted before can bring a training flag back.
    hold_eval,
)

# For inference: from the source graph to one of packed weights.
LOWERING: tuple[Pass, ...] = (
    unfold_layers,
    # Before dendrites nodes are there, which would be in its way, and while dropouts still stand
    # between soma and norm.
    fuse_neurons,
    # Those whose soma was left an op of its own.
    insert_dendrites,
    pack_dendrites,
    hold_eval,
    # Last, because every pass before it leaves reads behind.
    drop_reads,
)


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name: of the pass.
        rewrites: how many it made.
        added: ops that there are more of now, and how many more.
        removed: ops that there are fewer of now, and how many fewer.
        seconds: that it took, with the checks around it.
    """

    name: str
    rewrites: int
    added: dict[str, int]
    removed: dict[str, int]
    seconds: float

    def diff(self) -> str:
        """Return what was added and removed in one line: `+2 Neurons -2 Linear -1 BatchNorm1d`."""
        counts = [(f"+{n}", op) for op, n in self.added.items()]
        counts += [(f"-{n}", op) for op, n in self.removed.items()]
        return " ".join(f"{count} {op}" for count, op in counts)


def sum_records(records: Sequence[PassRecord]) -> PassRecord:
    """Return what one pass did to several graphs."""
    change: collections.Counter[str] = collections.Counter()
    for record in records:
        change.update(record.added)
        change.subtract(record.removed)
    return PassRecord(
        records[0].name,
        sum(record.rewrites for record in records),
        {op: n for op, n in change.items() if n > 0},
        {op: -n for op, n in change.items() if n < 0},
        sum(record.seconds for record in records),
    )


def run_passes(
    gm: fx.GraphModule, ctx: Any, passes: tuple[Pass, ...] = PASSES
) -> tuple[PassRecord, ...]:
    """Run `passes` over `gm.graph` in place and return a record of each. The caller recompiles.

    What a pass has edited is checked, whatever it says: the graph must hold together. What it has
    not edited is what the pass before it left.

    Raises:
        PassError: naming the pass, if it raised or broke the graph.
    """
    records = []
    names: dict[_Op, str] = {}
    before, content = _ops(gm, names), content_of(gm.graph)
    for rewrite in passes:
        name, started = rewrite.__name__, time.perf_counter()
        try:
            rewrites = rewrite(gm, ctx)
            edited = content_of(gm.graph)
            untouched = not rewrites and is_same(edited, content)
            if not untouched and not _holds_together(gm):
                _lint(gm)
        # A pass runs over arbitrary graphs; whatever it raises is a bug that must carry the name of
        # the pass.
        except Exception as error:
            raise PassError(
                f"pass {name} failed on {type(gm).__name__}: {type(error).__name__}: {error}"
            ) from error
        after = before if untouched else _ops(gm, names)
        added = collections.Counter(names[op] for op in after if op not in before)
        removed = collections.Counter(names[op] for op in before if op not in after)
        record = PassRecord(
            name,
            rewrites,
            dict(added - removed),
            dict(removed - added),
            time.perf_counter() - started,
        )
        milliseconds = record.seconds * 1e3
        logger.debug("%s: %d rewrites in %.1f ms %s", name, rewrites, milliseconds, record.diff())
        records.append(record)
        before, content = after, edited
    trace_json("passes", lambda: [dataclasses.asdict(record) for record in records])
    trace_text("graph", lambda: str(gm.graph))
    return tuple(records)


def content_of(graph: fx.Graph) -> list[Any]:
    """Return what a graph consists of: nodes in their order, targets and arguments."""
    return [part for node in graph.nodes for part in (node, node.target, node.args, node.kwargs)]


def is_same(one: list[Any], other: list[Any]) -> bool:
    """Return whether nothing was exchanged; equal things that are not the same count as new."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


_Op = tuple[fx.Node, Any]


def _ops(gm: fx.GraphModule, names: dict[_Op, str]) -> dict[_Op, None]:
    """Return what the nodes compute, in order; `names` gets a word for each that has none yet.

    A pass may drop the module of a node that it drops, so words are found while it is there.
    """
    ops = dict.fromkeys((node, node.target) for node in gm.graph.nodes)
    names.update({op: op_name(gm, op[0]) for op in ops if op not in names})
    return ops


def op_name(root: nn.Module, node: fx.Node) -> str:
    """Return what `node` computes, in a word: a class, a function, a method, or fx's own word."""
    if node.op == "call_module":
        return type(module_at(root, str(node.target))).__name__
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target) if node.op == "call_method" else node.op


def _holds_together(gm: fx.GraphModule) -> bool:
    """Return whether lint would find nothing, in a fraction of its time.

    It reads no attribute that computes something.
    """
    graph = gm.graph
    seen: set[fx.Node] = set()
    names: set[str] = set()
    for node in graph.nodes:
        if node.graph is not graph or not seen.issuperset(node._input_nodes):
            return False
        seen.add(node)
        names.add(node.name)
        if node.op == "call_function":
            known = callable(node.target)
        else:
            known = isinstance(node.target, str)
            if known and node.op in ("call_module", "get_attr"):
                known = _exists(gm, node.target, node.op == "call_module")
        if not known or node.op not in _OPS:
            return False
    return len(names) == len(seen)


def _exists(root: nn.Module, path: str, is_module: bool) -> bool:
    """Return whether there is something at `path`, as far as tables of modules and tensors tell."""
    above, _, name = path.rpartition(".")
    owner = find_module(root, above)
    if owner is None:
        return False
    if owner._modules.get(name) is not None:
        return True
    tensors = owner._parameters.get(name), owner._buffers.get(name)
    return not is_module and any(tensor is not None for tensor in tensors)


_OPS = frozenset(
    ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")
)


def _lint(gm: fx.GraphModule) -> None:
    """Raise if the graph is broken, saying where."""
    # The check reads every attribute, and spectral norm, for one, updates its state when a weight
    # is read in training.
    computed = [
        module
        for parametrization in modules_in(gm).values()
        if isinstance(parametrization, parametrize.ParametrizationList)
        for module in parametrization.modules()
        if module.training
    ]
    for module in computed:
        module.training = False
    try:
        with warnings.catch_warnings():
            # Reads of `self.training` are get_attr nodes that name neither a parameter nor a
            # buffer, on purpose.
            warnings.filterwarnings(
                "ignore", message=".*does not reference an nn.Module, nn.Parameter, or buffer.*"
            )
            gm.graph.lint()
    finally:
        for module in computed:
            module.training = True
