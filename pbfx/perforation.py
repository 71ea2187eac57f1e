"""What pbfx knows about a perforated module."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from pbfx.capture import Example, Rung
from pbfx.config import Config
from pbfx.derived import DerivedGraphs
from pbfx.figures import SiteFigures
from pbfx.phase import Phase
from pbfx.pipeline import PassRecord
from pbfx.plain_graph import graph_of, plain_nodes
from pbfx.sites import Site, Skipped


@dataclasses.dataclass(eq=False)
class Perforation:
    """What pbfx knows about a perforated module.

    A copy shares what never changes, the source graph first of all, and has no tracker.

    Attributes:
        source: the captured graph. It is never edited; every graph that runs is derived from it.
        sites: where dendrites may grow.
        skipped: the other ops with parameters, and why.
        config: what the user asked for. Its `filter_fn` has chosen the sites and is not pickled.
        path: where this module stood in the model that was transformed.
        rung: how it was captured.
        reason: why no graph around it could be had; empty for a whole model.
        kind: the user's class.
        absorbed: paths of the modules whose forwards run in the graph.
        recapture: captures this module anew, with some modules inside as graphs of their own.
        example: what it was exported with, and would be again; None for other rungs.
        phase: which graph runs now.
        draws: how many pools of weights have been drawn, so that a new pool differs from the last.
        records: what the passes did at the last rebuild.
        tracker: the one tracker that may restructure this module, as a token.
        figures: what the last epoch of a dendrite phase measured, at each site of the model.
        slots: how many slots each site had at the last rebuild; with `Config(reserve=...)` only.
        forwards: the forwards of the graphs that have run with these slots, by their code.
        graphs: that have been derived from the source before.
        followers: copies that `AveragedModel`s made of this module: they follow its structure.
    """

    source: fx.Graph
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    config: Config
    path: str = ""
    rung: Rung = Rung.WHOLE
    reason: str = ""
    kind: type[nn.Module] = nn.Module
    absorbed: tuple[str, ...] = ()
    recapture: Callable[[Any, frozenset[str], str], None] | None = None
    example: Example | None = None
    phase: Phase = Phase.NEURON
    draws: int = 0
    records: tuple[PassRecord, ...] = ()
    tracker: object = None
    figures: tuple[SiteFigures, ...] = ()
    slots: tuple[int, ...] = ()
    forwards: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    graphs: DerivedGraphs = dataclasses.field(default_factory=DerivedGraphs)
    followers: weakref.WeakSet[nn.Module] = dataclasses.field(default_factory=weakref.WeakSet)

    def __deepcopy__(self, memo: dict[int, Any]) -> Perforation:
        twin = dataclasses.replace(
            self,
            tracker=None,
            slots=(),
            forwards={},
            graphs=DerivedGraphs(),
            followers=weakref.WeakSet(),
        )
        memo[id(self)] = twin
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = {**vars(self), "tracker": None, "followers": (), "slots": (), "forwards": {}}
        del state["graphs"]
        state["config"] = dataclasses.replace(self.config, filter_fn=None)
        owner = f"the perforated module at {self.path!r}" if self.path else "the perforated module"
        state["source"] = plain_nodes(self.source, owner)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, source=graph_of(state["source"]), followers=weakref.WeakSet())
        self.graphs = DerivedGraphs()
