"""One run to be done: what it trains, and the key under which its row is found again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any

from torch import nn

import pbfx
from benchmarks.learning.arms import Arm
from benchmarks.learning.nets import Net, width_for
from benchmarks.learning.studies import STUDIES, Study
from pbfx.parts import parameter_count

Key = tuple[str, str, str, str, str]


@dataclasses.dataclass(frozen=True)
class Task:
    """A run.

    Attributes:
        study: its name.
        arm: how it trains.
        width: of the study's net; a wider or deeper rival is matched to the net of this width.
        seed: of the initial weights, the order of the rows, and dropout.
        neuron_epochs, dendrite_epochs, dendrites: of arms with phases; a plain arm trains as many
            epochs in all.
    """

    study: str
    arm: Arm
    width: float
    seed: int
    neuron_epochs: int
    dendrite_epochs: int
    dendrites: int

    @property
    def of(self) -> Study:
        """Return the study."""
        return STUDIES[self.study]

    @property
    def epochs(self) -> int:
        """Epochs in all: a neuron phase before each growth and one after the last."""
        growth = self.neuron_epochs + self.dendrite_epochs
        return self.neuron_epochs + self.dendrites * growth

    @property
    def phase_epochs(self) -> int:
        """Epochs of this arm's neuron phases.

        Dendrites that learn by gradient have no phase of their own: its epochs lengthen the others,
        so that all arms train for as long.
        """
        if self.arm.mode == "gradient":
            return round(self.epochs / (self.dendrites + 1))
        return self.neuron_epochs

    @property
    def include(self) -> tuple[str, ...]:
        """Return globs over the paths of the sites that grow."""
        selection = self.arm.selection
        return ("*",) if selection is None else self.of.selections[selection]

    @functools.cached_property
    def key(self) -> Key:
        """Return what tells this run from all others, as the first columns of its row."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()
        return self.study, self.arm.name, f"{self.width:g}", str(self.seed), digest[:12]

    def describe(self) -> dict[str, Any]:
        """Return, as JSON values, every setting that the result depends on but the seed."""
        study = self.of
        shared = {
            name: getattr(study, name)
            for name in ("data", "optimizer", "rate", "gamma", "batch_size", "steps", "score")
        }
        if study.nets:
            shared["nets"] = study.nets
        lengths = {
            name: getattr(self, name) for name in ("neuron_epochs", "dendrite_epochs", "dendrites")
        }
        own: dict[str, Any] = {"rival": self.arm.rival, "match": self.arm.match}
        if self.arm.mode is not None:
            # What was asked for, not every default: a new setting of pbfx leaves old rows valid.
            asked = study.config | dict(self.arm.settings)
            own = {"mode": self.arm.mode, "include": list(self.include), "asked": asked}
        return json.loads(json.dumps({"width": self.width} | shared | lengths | own, default=repr))

    def build(self) -> nn.Module:
        """Return the plain net of this arm, its weights drawn from torch's global stream."""
        if self.arm.rival is None:
            return self.of.net(self.width)
        net = self.of.net if self.arm.rival == "wider" else self.of.deeper
        return net(rival_width(self.of.net, net, self.width, self.arm.match))


@functools.cache
def rival_width(net: Net, rival: Net, width: float, dendrites: int) -> float:
    """Return the width of `rival` with the parameters of `net(width)` and so many dendrites."""
    grown = pbfx.grow(pbfx.transform(net(width)), dendrites)
    return width_for(rival, parameter_count(grown))
