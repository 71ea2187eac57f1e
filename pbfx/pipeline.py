"""Which passes run, in which order, and the ceremony around each.

The order is data. The runner checks the graph after every pass, records what changed, and turns a
failure into a `PassError` that names the pass; it never catches to carry on.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
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
from pbfx.wording import counted

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

    Raises:
        PassError: naming the pass, if it raised, broke the graph, or is not idempotent.
    """
    records = []
    for rewrite in passes:
        name = rewrite.__name__
        before, started = _ops(gm), time.perf_counter()
        try:
            rewrites = rewrite(gm, ctx)
            _lint(gm.graph)
            again = rewrite(gm, ctx)
        # A pass runs over arbitrary graphs; whatever it raises is a bug that must carry the name of
        # the pass.
        except Exception as error:
            raise PassError(
                f"pass {name} failed on {type(gm).__name__}: {type(error).__name__}: {error}"
            ) from error
        if again:
            raise PassError(
                f"pass {name} is not idempotent on {type(gm).__name__}: a second run made "
                f"{counted(again, 'rewrite')}"
            )
        after = _ops(gm)
        record = PassRecord(
            name,
            rewrites,
            dict(after - before),
            dict(before - after),
            time.perf_counter() - started,
        )
        milliseconds = record.seconds * 1e3
        logger.debug("%s: %d rewrites in %.1f ms %s", name, rewrites, milliseconds, record.diff())
        records.append(record)
    trace_json("passes", lambda: [dataclasses.asdict(record) for record in records])
    trace_text("graph", lambda: str(gm.graph))
    return tuple(records)


def _ops(gm: fx.GraphModule) -> collections.Counter[str]:
    return collections.Counter(op_name(gm, node) for node in gm.graph.nodes)


def op_name(root: nn.Module, node: fx.Node) -> str:
    """Return what `node` computes, in a word: a class, a function, a method, or fx's own word."""
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))).__name__
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target) if node.op == "call_method" else node.op


def _lint(graph: fx.Graph) -> None:
    # The check reads every attribute, and spectral norm, for one, updates its state when a weight
    # is read in training.
    computed = [
        module
        for parametrization in (graph.owning_module or nn.Module()).modules()
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
            graph.lint()
    finally:
        for module in computed:
            module.training = True
