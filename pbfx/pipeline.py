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
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from pbfx.errors import PassError
from pbfx.passes import attach_candidates, hold_eval, insert_dendrites, unfold_layers

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


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What one pass did: rewrites, how the counts of node targets changed, and its time."""

    name: str
    rewrites: int
    added: dict[str, int]
    removed: dict[str, int]
    seconds: float


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
        before, started = _targets(gm.graph), time.perf_counter()
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
                f"{again} rewrites"
            )
        after = _targets(gm.graph)
        record = PassRecord(
            name,
            rewrites,
            dict(after - before),
            dict(before - after),
            time.perf_counter() - started,
        )
        logger.debug("%s: %d rewrites, +%s -%s", name, rewrites, record.added, record.removed)
        records.append(record)
    return tuple(records)


def _targets(graph: fx.Graph) -> collections.Counter[str]:
    return collections.Counter(str(node.target) for node in graph.nodes)


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
