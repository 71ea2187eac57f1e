"""Grow when the validation score stops improving."""

from __future__ import annotations

import dataclasses
import math

from pbfx.errors import ConfigError
from pbfx.phase import Phase
from pbfx.policy.decision import Action, Decision, Situation
from pbfx.settings import PerDendrite, at, freeze_lists, number_faults

_LEAST = {
    "patience": 1,
    "smoothing": 1,
    "relative_threshold": 0.0,
    "absolute_threshold": 0.0,
    "grace": 0,
    "tries": 1,
    "max_epochs": 1,
    "candidate_patience": 1,
    "max_candidate_epochs": 1,
}


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Grow when the validation score stops improving; keep a set of dendrites only if it helped.

    Any setting may be a list indexed by the number of dendrites that a neuron has; its last value
    stands for all numbers beyond.

    Args:
        patience: epochs without improvement that make a plateau.
        smoothing: how many scores are averaged before improvement is judged; 1 judges each.
        relative_threshold: improvement must exceed this share of the best score,
        absolute_threshold: and this amount.
        grace: epochs at the start of each phase that cannot make a plateau.
        tries: sets of dendrites tried in a row before training completes without them.
        max_epochs: longest neuron phase; None for no limit.
        candidate_patience: epochs without a better candidate score that end a dendrite phase.
        max_candidate_epochs: longest dendrite phase.

    Raises:
        ConfigError: naming every setting that is out of range.
    """

    patience: PerDendrite[int] = 10
    smoothing: PerDendrite[int] = 1
    relative_threshold: PerDendrite[float] = 1e-4
    absolute_threshold: PerDendrite[float] = 1e-5
    grace: PerDendrite[int] = 0
    tries: PerDendrite[int] = 2
    max_epochs: PerDendrite[int | None] = None
    candidate_patience: PerDendrite[int] = 2
    max_candidate_epochs: PerDendrite[int] = 20

    def __post_init__(self) -> None:
        freeze_lists(self, *_LEAST)
        faults = number_faults(self, _LEAST, optional=frozenset(("max_epochs",)))
        if faults:
            raise ConfigError("pbfx.Plateau: " + "; ".join(faults))

    def decide(self, situation: Situation) -> Decision:
        """Return what to do next."""
        if situation.phase is Phase.DENDRITE:
            return self._dendrite(situation)
        return self._neuron(situation)

    def _neuron(self, now: Situation) -> Decision:
        epochs, waited = len(now.scores), self._waited(now)
        patience, longest = at(self.patience, now.dendrites), at(self.max_epochs, now.dendrites)
        out_of_time = longest is not None and epochs >= longest
        early = waited < patience or epochs <= at(self.grace, now.dendrites)
        if not out_of_time and early:
            return Decision(Action.CONTINUE, f"{waited} of {patience} epochs without improvement")
        why = f"{epochs} epochs are over" if out_of_time else f"no improvement for {waited} epochs"
        if now.accepted is not None and not self._improves(now, now.best, now.accepted):
            gain = (
                f"dendrite {now.dendrites} did not help ({now.best:.6g} against {now.accepted:.6g})"
            )
            tries = at(self.tries, now.dendrites)
            if now.attempt + 1 < tries:
                return Decision(Action.RETRY, f"{why}; {gain}: dropped, trying another", keep=False)
            reason = f"{why}; {gain}, the last of {tries} tries"
            return Decision(Action.COMPLETE, reason, keep=False)
        if now.dendrites >= now.max_dendrites:
            return Decision(Action.COMPLETE, f"{why}; all {now.max_dendrites} dendrites are grown")
        return Decision(
            Action.GROW, f"{why} at {now.best:.6g}: growing dendrite {now.dendrites + 1}"
        )

    def _dendrite(self, now: Situation) -> Decision:
        epochs = len(now.scores)
        best, waited = -math.inf, 0
        for score in now.candidate_scores:
            if score is not None and score > best:
                best, waited = score, 0
            elif score is not None:
                waited += 1
        if epochs >= at(self.max_candidate_epochs, now.dendrites):
            return Decision(Action.PROMOTE, f"{epochs} epochs of candidate learning are over")
        if waited >= at(self.candidate_patience, now.dendrites):
            reason = f"candidates' correlation with the error stopped rising at {best:.3f}"
            return Decision(Action.PROMOTE, reason)
        return Decision(
            Action.CONTINUE, f"candidates are learning, correlation {max(best, 0.0):.3f}"
        )

    def _waited(self, now: Situation) -> int:
        """Return how many epochs ago the smoothed score last improved."""
        best, last = None, -1
        smoothing = at(self.smoothing, now.dendrites)
        for end in range(1, len(now.scores) + 1):
            window = now.scores[max(0, end - smoothing) : end]
            score = sum(window) / len(window)
            if best is None or self._improves(now, score, best):
                best, last = score, end - 1
        return len(now.scores) - 1 - last

    def _improves(self, now: Situation, new: float, old: float) -> bool:
        relative = at(self.relative_threshold, now.dendrites) * abs(old)
        return now.better(new, old, max(relative, at(self.absolute_threshold, now.dendrites)))
