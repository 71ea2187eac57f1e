"""What an explanation says about one part, module, site or op."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from pbfx.capture import Rung


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
        dendrites: how many each neuron has now.
        parameters: those that the site computes with, its soma included: of the links between
            dendrites the strict lower triangle, as no other entry is ever read.
        next_dendrite: parameters that one more dendrite per neuron would add.
        rung: how the part was captured that the site is in.
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
    heldout: float | None = None
    p_value: float | None = None
    gain: float | None = None


class SkippedReport(NamedTuple):
    """One op with parameters that carries no dendrites: full path, op, reason."""

    name: str
    op: str
    reason: str
