"""Search for a learning rate after a growth, in epochs of the user's own loop.

Each factor trains from the same start for the same number of epochs. The search ends at the first
factor that does worse than the best so far, and training goes on from where the best one stood: its
epochs are not lost, those of the others are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pbfx.errors import ConfigError
from pbfx.optimizers import Schedule
from pbfx.settings import PerDendrite, at, freeze_lists, number_faults
from pbfx.waypoint import Waypoint


@dataclasses.dataclass(frozen=True)
class RateSearch:
    """Try several learning rates after each growth, and go on with the best.

    Args:
        factors: what the rates of all groups, as they would start after the growth, are multiplied
            by, in the order in which they are tried. Scores should rise to a best factor and fall
            after it, because the search stops at the first one that is worse than the best so far.
        epochs: how many epochs each factor gets. May be a list indexed by the number of dendrites.

    Raises:
        ConfigError: naming every setting that is out of range.
    """

    factors: Sequence[float] = (1.0, 0.3, 0.1)
    epochs: PerDendrite[int] = 1

    def __post_init__(self) -> None:
        freeze_lists(self, "factors", "epochs")
        faults = number_faults(self, {"epochs": 1, "factors": 0.0}, optional=frozenset())
        listed = isinstance(self.factors, tuple)
        if not faults and (not listed or 0 in self.factors):
            faults.append(f"factors must be a list of numbers above 0, got {self.factors!r}")
        if not faults and len(set(self.factors)) < max(2, len(self.factors)):
            faults.append(f"factors must be at least two different numbers, got {self.factors!r}")
        if faults:
            raise ConfigError("pbfx.RateSearch: " + "; ".join(faults))


class Search:
    """One search that is under way. It is a state machine over the epochs of the user's loop.

    Args:
        spec: what to try.
        dendrites: per neuron, which choose the length of a trial.
        maximize: whether a larger score is better.
        start: where each trial begins.
    """

    def __init__(self, spec: RateSearch, dendrites: int, maximize: bool, start: Waypoint) -> None:
        self.factors = tuple(spec.factors)
        self.epochs = at(spec.epochs, dendrites)
        self.maximize, self.start = maximize, start
        # Scores of each trial so far.
        self.scores: list[list[float]] = [[]]
        self.best = 0
        self.end: Waypoint | None = None

    @property
    def factor(self) -> float:
        """What is being tried."""
        return self.factors[len(self.scores) - 1]

    def judge(self, score: float) -> str:
        """Take in the score of an epoch; return what follows from it in a sentence."""
        self.scores[-1].append(score)
        trial, epochs = len(self.scores), len(self.scores[-1])
        if epochs < self.epochs:
            return self._said(f"epoch {epochs} of {self.epochs} at x{self.factor:g}")
        worse = self._is_worse()
        if not worse and trial < len(self.factors):
            return self._said(f"next x{self.factors[trial]:g}, from the same start")
        best, lost = self.best if worse else trial - 1, self.epochs * (trial - 1)
        return self._said(
            f"going on with x{self.factors[best]:g}; {lost} of "
            f"{self.epochs * trial} epochs {'was' if lost == 1 else 'were'} spent on others"
        )

    def carry_on(self, model: nn.Module, optimizer: Optimizer, schedule: Schedule) -> bool:
        """Do what `judge` has said; return whether the search is over.

        The best trial's network, optimizer and schedule are then there.
        """
        if len(self.scores[-1]) < self.epochs:
            return False
        worse, trial = self._is_worse(), len(self.scores)
        if worse:
            assert self.end is not None, "the first trial is not worse than any"
            self.end.restore(model, optimizer, schedule)
            return True
        if trial == len(self.factors):
            self.best = trial - 1
            return True
        end = Waypoint.take(model, optimizer, schedule)
        self.start.restore(model, optimizer, schedule)
        schedule.scale(self.factors[trial])
        # Only now: if anything failed, this trial is still the last.
        self.end, self.best = end, trial - 1
        self.scores.append([])
        return False

    def _is_worse(self) -> bool:
        """Return whether the last trial does not beat the best of those before."""
        trial = len(self.scores) - 1
        return trial > 0 and not self._beats(trial, self.best)

    def _beats(self, trial: int, other: int) -> bool:
        pick = max if self.maximize else min
        one, two = pick(self.scores[trial]), pick(self.scores[other])
        return one > two if self.maximize else one < two

    def _said(self, what: str) -> str:
        pick = max if self.maximize else min
        pairs = zip(self.factors, self.scores, strict=False)
        tried = ", ".join(f"x{factor:g} {pick(scores):.6g}" for factor, scores in pairs if scores)
        return f"searching for a learning rate ({tried}): {what}"

    def state_dict(self) -> dict[str, Any]:
        """Return the search as plain data and tensors."""
        return {
            "factors": list(self.factors),
            "epochs": self.epochs,
            "scores": [list(scores) for scores in self.scores],
            "best": self.best,
            "start": self.start.state_dict(),
            "end": None if self.end is None else self.end.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], maximize: bool) -> Search:
        """Return the search that `state_dict` described."""
        spec = RateSearch(state["factors"], state["epochs"])
        search = cls(spec, 0, maximize, Waypoint.from_state_dict(state["start"]))
        search.scores = [list(scores) for scores in state["scores"]]
        search.best = state["best"]
        end = state["end"]
        search.end = None if end is None else Waypoint.from_state_dict(end)
        return search
