"""When to grow: pure functions from a history of scores to a decision with its reason.

A policy sees numbers and returns a word. It touches no model, keeps no state and draws no chance,
so a decision can be replayed, tested and explained from the history alone.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Protocol

from pbfx.errors import ConfigError, TrackerError
from pbfx.phase import Phase


class Action(enum.StrEnum):
    """What the tracker should do after an epoch."""

    CONTINUE = "continue"
    # Restore the phase's best weights, then grow: candidates first, where the mode has a dendrite
    # phase.
    GROW = "grow"
    # Drop the newest dendrites, restore the best network before them, and grow again.
    RETRY = "retry"
    # End the dendrite phase: the best candidate of each neuron becomes a dendrite.
    PROMOTE = "promote"
    # Restore the best network; one more neuron phase, in which dendrites train with everything
    # else. Whatever ends that phase completes training.
    FINISH = "finish"
    COMPLETE = "complete"


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a policy may look at, after the score of the last epoch has come in.

    Attributes:
        phase: who was learning.
        scores: validation scores of this phase, oldest first.
        candidate_scores: of a dendrite phase: mean |correlation| of the best candidates with the
            error on batches that they did not learn from; None where no batch measured.
        dendrites: D at present.
        max_dendrites: where to end.
        attempt: how many sets of dendrites in a row were dropped before this one.
        accepted: best score of the networks accepted before this phase; None in the first.
        maximize: whether a larger score is better.
        finishing: whether this is the last neuron phase, in which dendrites train too.
    """

    phase: Phase
    scores: tuple[float, ...]
    candidate_scores: tuple[float | None, ...] = ()
    dendrites: int = 0
    max_dendrites: int = 1
    attempt: int = 0
    accepted: float | None = None
    maximize: bool = True
    finishing: bool = False

    def better(self, new: float, old: float, margin: float = 0.0) -> bool:
        """Return whether `new` beats `old` by more than `margin`, in this score's direction."""
        return new > old + margin if self.maximize else new < old - margin

    @property
    def best(self) -> float:
        """Best score of this phase."""
        return max(self.scores) if self.maximize else min(self.scores)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to do, why, and whether the newest dendrites earned their place.

    Attributes:
        action: what the tracker does now.
        reason: one sentence for people.
        keep: whether this phase's best network becomes the accepted one.
    """

    action: Action
    reason: str
    keep: bool = True


class Policy(Protocol):
    """Anything with this method decides; a subclass is not needed."""

    def decide(self, situation: Situation) -> Decision:
        """Return what to do next."""
        ...


def finished(decision: Decision, situation: Situation, finish: bool) -> Decision:
    """Put the last neuron phase before completion, and let whatever ends that phase complete.

    Args:
        decision: a policy's, which need not know of this phase.
        situation: what it was made in.
        finish: whether the phase is wanted, and the network that training would complete with has
            dendrites.
    """
    if situation.finishing and decision.action is not Action.CONTINUE:
        accepted = situation.accepted
        helped = accepted is None or situation.better(situation.best, accepted)
        gain = f"{situation.best:.6g}" + ("" if accepted is None else f" against {accepted:.6g}")
        verdict = "helped" if helped else "did not help"
        reason = f"training the dendrites with everything else {verdict} ({gain})"
        return Decision(Action.COMPLETE, reason, keep=helped)
    if finish and decision.action is Action.COMPLETE:
        reason = f"{decision.reason}; now the dendrites train with everything else"
        return Decision(Action.FINISH, reason, decision.keep)
    return decision


def possible(decision: object, situation: Situation) -> Decision:
    """Return `decision` if it can be carried out in `situation`.

    Raises:
        TrackerError: if not, or if it is no decision at all.
    """
    if not isinstance(decision, Decision):
        raise TrackerError(f"a policy must return a pbfx.Decision, got {decision!r}")
    if situation.phase is Phase.DENDRITE:
        actions = [Action.CONTINUE, Action.PROMOTE, Action.RETRY, Action.FINISH, Action.COMPLETE]
    elif situation.finishing:
        actions = [Action.CONTINUE, Action.COMPLETE]
    elif decision.keep or situation.accepted is not None:
        actions = [
            *(Action.CONTINUE, Action.GROW, Action.RETRY),
            *(Action.FINISH, Action.COMPLETE),
        ]
    else:
        # Before the first network there is none to go back to.
        actions = [Action.CONTINUE, Action.GROW]
    if decision.action not in actions:
        kept = "" if decision.keep else " without keeping the phase's network"
        raise TrackerError(
            f"the policy decided {str(decision.action)!r}{kept} in the {situation.phase} phase, "
            f"after {len(situation.scores)} epochs; possible there: "
            f"{', '.join(repr(str(action)) for action in actions)}"
        )
    return decision


def _check(owner: object, **least: float) -> None:
    faults = []
    for name, bound in least.items():
        value = getattr(owner, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(bound, int) and not isinstance(value, int):
            number = False
        if not number or not math.isfinite(value) or value < bound:
            kind = "a whole number" if isinstance(bound, int) else "a finite number"
            faults.append(f"{name} must be {kind} of at least {bound}, got {value!r}")
    if faults:
        raise ConfigError(f"pbfx.{type(owner).__name__}: " + "; ".join(faults))


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Grow when the validation score stops improving; keep a set of dendrites only if it helped.

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

    patience: int = 10
    smoothing: int = 1
    relative_threshold: float = 1e-4
    absolute_threshold: float = 1e-5
    grace: int = 0
    tries: int = 2
    max_epochs: int | None = None
    candidate_patience: int = 2
    max_candidate_epochs: int = 20

    def __post_init__(self) -> None:
        _check(
            self,
            patience=1,
            smoothing=1,
            relative_threshold=0.0,
            absolute_threshold=0.0,
            grace=0,
            tries=1,
            candidate_patience=1,
            max_candidate_epochs=1,
        )
        if self.max_epochs is not None:
            _check(self, max_epochs=1)

    def decide(self, situation: Situation) -> Decision:
        """Return what to do next."""
        if situation.phase is Phase.DENDRITE:
            return self._dendrite(situation)
        return self._neuron(situation)

    def _neuron(self, now: Situation) -> Decision:
        epochs, waited = len(now.scores), self._waited(now)
        out_of_time = self.max_epochs is not None and epochs >= self.max_epochs
        if not out_of_time and (waited < self.patience or epochs <= self.grace):
            return Decision(
                Action.CONTINUE, f"{waited} of {self.patience} epochs without improvement"
            )
        why = f"{epochs} epochs are over" if out_of_time else f"no improvement for {waited} epochs"
        if now.accepted is not None and not self._improves(now, now.best, now.accepted):
            gain = (
                f"dendrite {now.dendrites} did not help ({now.best:.6g} against {now.accepted:.6g})"
            )
            if now.attempt + 1 < self.tries:
                return Decision(Action.RETRY, f"{why}; {gain}: dropped, trying another", keep=False)
            reason = f"{why}; {gain}, the last of {self.tries} tries"
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
        if epochs >= self.max_candidate_epochs:
            return Decision(Action.PROMOTE, f"{epochs} epochs of candidate learning are over")
        if waited >= self.candidate_patience:
            reason = f"candidates' correlation with the error stopped rising at {best:.3f}"
            return Decision(Action.PROMOTE, reason)
        return Decision(
            Action.CONTINUE, f"candidates are learning, correlation {max(best, 0.0):.3f}"
        )

    def _waited(self, now: Situation) -> int:
        """Return how many epochs ago the smoothed score last improved."""
        best, at = None, -1
        for end in range(1, len(now.scores) + 1):
            window = now.scores[max(0, end - self.smoothing) : end]
            score = sum(window) / len(window)
            if best is None or self._improves(now, score, best):
                best, at = score, end - 1
        return len(now.scores) - 1 - at

    def _improves(self, now: Situation, new: float, old: float) -> bool:
        margin = max(self.relative_threshold * abs(old), self.absolute_threshold)
        return now.better(new, old, margin)


@dataclasses.dataclass(frozen=True)
class Interval:
    """Grow at fixed intervals, whatever the scores say: the schedule of paired experiments.

    Every arm of a study then trains for the same number of epochs. The best network of all phases,
    by validation score, is restored at the end.

    Args:
        neuron_epochs: length of each neuron phase.
        dendrite_epochs: length of each dendrite phase.

    Raises:
        ConfigError: naming every setting that is out of range.
    """

    neuron_epochs: int
    dendrite_epochs: int = 4

    def __post_init__(self) -> None:
        _check(self, neuron_epochs=1, dendrite_epochs=1)

    def decide(self, situation: Situation) -> Decision:
        """Return what to do next."""
        now, epochs = situation, len(situation.scores)
        dendrite_phase = now.phase is Phase.DENDRITE
        length = self.dendrite_epochs if dendrite_phase else self.neuron_epochs
        if epochs < length:
            return Decision(Action.CONTINUE, f"epoch {epochs} of {length}")
        if dendrite_phase:
            return Decision(Action.PROMOTE, f"{length} epochs of candidate learning are over")
        helped = now.accepted is None or now.better(now.best, now.accepted)
        if now.dendrites < now.max_dendrites:
            reason = f"{length} epochs are over: growing dendrite {now.dendrites + 1}"
            return Decision(Action.GROW, reason, helped)
        reason = f"{length} epochs are over; all {now.max_dendrites} dendrites are grown"
        return Decision(Action.COMPLETE, reason, helped)
