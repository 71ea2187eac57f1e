"""Grow when the validation score stops improving."""

from __future__ import annotations

import dataclasses
import math

from pbfx.errors import ConfigError
from pbfx.phase import Phase
from pbfx.policy.decision import Action, Decision, Situation, is_over, learning_is_over
from pbfx.policy.promise import why_not
from pbfx.settings import PerDendrite, at, freeze_lists, named_values, number_faults
from pbfx.wording import counted

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
    "significance": 0.0,
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
        candidate_patience: epochs without a better candidate score that end a dendrite phase, once
            some site is above chance.
        max_candidate_epochs: longest dendrite phase.
        significance: chance in (0, 1) of growing on noise. Where no site's candidates correlate
            with the error on unseen batches at this level by `max_candidate_epochs`, training
            completes instead of growing. With fewer than 20 measuring batches nothing is concluded,
            and dendrites grow. None always grows.

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
    significance: PerDendrite[float | None] = 0.05

    def __post_init__(self) -> None:
        freeze_lists(self, *_LEAST)
        faults = number_faults(self, _LEAST, optional=frozenset(("max_epochs", "significance")))
        faults += [
            f"{name} must be between 0 and 1, got {value!r}"
            for name, value in named_values("significance", self.significance)
            if not faults and value is not None and not 0 < value < 1
        ]
        if faults:
            raise ConfigError("pbfx.Plateau: " + "; ".join(faults))

    def decide(self, situation: Situation) -> Decision:
        """Return what to do next."""
        if situation.phase is Phase.DENDRITE:
            return self._dendrite(situation)
        return self._neuron(situation)

    def growth_epochs(self, dendrites: int, dendrite_phase: bool) -> int:
        """Return the fewest epochs from a growth at so many dendrites to its judgement."""
        longest = at(self.max_epochs, dendrites + 1)
        wait = max(at(self.patience, dendrites + 1), at(self.grace, dendrites + 1)) + 1
        neuron = wait if longest is None else min(wait, longest)
        learning = 1 + at(self.candidate_patience, dendrites)
        learning = min(learning, at(self.max_candidate_epochs, dendrites))
        return neuron + (learning if dendrite_phase else 0)

    def _neuron(self, now: Situation) -> Decision:
        epochs, waited = len(now.scores), self._waited(now)
        patience, longest = at(self.patience, now.dendrites), at(self.max_epochs, now.dendrites)
        out_of_time = longest is not None and epochs >= longest
        early = waited < patience or epochs <= at(self.grace, now.dendrites)
        if not out_of_time and early:
            reason = f"{waited} of {counted(patience, 'epoch')} without improvement"
            return Decision(Action.CONTINUE, reason)
        why = f"no improvement for {counted(waited, 'epoch')}"
        if out_of_time:
            why = is_over(epochs)
        if now.accepted is not None and not self._improves(now, now.best, now.accepted):
            gain = (
                f"dendrite {now.dendrites} did not help ({now.best:.6g} against {now.accepted:.6g})"
            )
            tries = at(self.tries, now.dendrites)
            if now.attempt + 1 < tries:
                return Decision(Action.RETRY, f"{why}; {gain}: dropped, trying another", keep=False)
            reason = f"{why}; {gain}, the last of {counted(tries, 'try', 'tries')}"
            return Decision(Action.COMPLETE, reason, keep=False)
        if now.dendrites >= now.max_dendrites:
            return Decision(Action.COMPLETE, f"{why}; max_dendrites={now.max_dendrites} is reached")
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
        significance = at(self.significance, now.dendrites)
        longest = at(self.max_candidate_epochs, now.dendrites)
        nothing = None if significance is None else why_not(now.sites, significance)
        if epochs >= longest:
            why = learning_is_over(epochs)
            if nothing is not None:
                return Decision(Action.COMPLETE, f"{why}; {nothing}")
            return Decision(Action.PROMOTE, why)
        if waited >= at(self.candidate_patience, now.dendrites):
            if nothing is not None:
                # Candidates start almost linear, and what is linear has been learnt already: a
                # signal may take its time to show.
                reason = f"candidates are at chance so far, epoch {epochs} of at most {longest}"
                return Decision(Action.CONTINUE, reason)
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
