"""What an explanation says about one part, module, site or op."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from pbfx.capture import Rung
from pbfx.pipeline import PassRecord


@dataclasses.dataclass(frozen=True)
class PartReport:
    """One graph of the model.

    Attributes:
        path: of the module whose forward it is, `""` for the model itself.
        class_name: of that module.
        rung: how it was captured.
        reason: why no graph around it could be had; empty for a whole model.
    """

    path: str
    class_name: str
    rung: Rung
    reason: str


@dataclasses.dataclass(frozen=True)
class KeptReport:
    """One module that runs its own forward, and why no graph took its place."""

    path: str
    class_name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One site: what it is, what it has grown, and what one more dendrite would cost.

    Attributes:
        name: full path, as `pbfx.grow` takes it.
        op: linear, conv1d, conv2d, ...
        norm: the kind of norm after which the dendrites join, None for the op's own output.
        calls: how often the graph calls the op.
        dendrites: how many each neuron has now, of those that have any.
        parameters: those that the site computes with, its soma included: of the links between
            dendrites the strict lower triangle, as no other entry is ever read.
        next_dendrite: parameters that one more dendrite on each of these channels would add.
        rung: how the part was captured that the site is in.
        channels: how many neurons have dendrites; all of them where none has yet.
        neurons: how many neurons the op has.
        heldout: correlation of the candidates with the error on batches that only measured, in the
            last dendrite phase of the model's tracker; None where none was measured.
        p_value: of that being chance.
        gain: predicted by the chosen candidates' correlations, see `pbfx.SiteFigures`.
    """

    name: str
    op: str
    norm: str | None
    calls: int
    dendrites: int
    parameters: int
    next_dendrite: int
    rung: Rung
    channels: int
    neurons: int
    heldout: float | None = None
    p_value: float | None = None
    gain: float | None = None


class SkippedReport(NamedTuple):
    """One op with parameters that carries no dendrites: full path, op, reason."""

    name: str
    op: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ApartReport:
    """A site whose soma stays an op of its own when the model is lowered, by full path, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class LoweredReport:
    """What `pbfx.lower` makes of one graph.

    Attributes:
        path: of the part, `""` for the model itself.
        class_name: of the module whose forward it is.
        ops_before: nodes of the graph that runs now.
        ops_after: nodes of the lowered one.
        passes: what each pass did, in order, from the captured graph on.
        fused: ops that are one product with their dendrites, if any, and the norm behind them if it
            is folded in: full paths, as of sites.
        apart: sites with dendrites whose soma stays an op.
    """

    path: str
    class_name: str
    ops_before: int
    ops_after: int
    passes: tuple[PassRecord, ...]
    fused: tuple[str, ...]
    apart: tuple[ApartReport, ...]
