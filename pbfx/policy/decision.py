"""What a policy is asked, what it may answer, and which answers can be carried out."""

from __future__ import annotations

import dataclasses
import enum
from typing import Protocol

from pbfx.errors import TrackerError
from pbfx.figures import SiteFigures
from pbfx.phase import Phase
from pbfx.wording import counted


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
        sites: of a dendrite phase: what the last epoch has measured at each site that an error has
            reached.
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
    sites: tuple[SiteFigures, ...] = ()

    def better(self, new: float, old: float, margin: float = 0.0) -> bool:
        """Return whether `new` beats `old` by more than `margin`, in this score's direction."""
        return new > old + margin if self.maximize else new < old - margin

    @property
    def best(self) -> float:
        """Best score of this phase."""
        return max(self.scores) if self.maximize else min(self.scores)

    @property
    def helped(self) -> bool:
        """Whether this phase's best network beats those accepted before it."""
        return self.accepted is None or self.better(self.best, self.accepted)


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
        accepted, helped = situation.accepted, situation.helped
        gain = f"{situation.best:.6g}" + ("" if accepted is None else f" against {accepted:.6g}")
        verdict = "helped" if helped else "did not help"
        reason = f"training the dendrites with everything else {verdict} ({gain})"
        return Decision(Action.COMPLETE, reason, keep=helped)
    if finish and decision.action is Action.COMPLETE:
        reason = f"{decision.reason}; now the dendrites train with everything else"
        return Decision(Action.FINISH, reason, decision.keep)
    return decision


def is_over(epochs: int) -> str:
    """Say that so many epochs of a neuron phase are over."""
    return counted(epochs, "epoch is over", "epochs are over")


def learning_is_over(epochs: int) -> str:
    """Say that so many epochs of a dendrite phase are over."""
    verb = "is" if epochs == 1 else "are"
    return f"{counted(epochs, 'epoch')} of candidate learning {verb} over"


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
            f"after {counted(len(situation.scores), 'epoch')}; possible there: "
            f"{', '.join(repr(str(action)) for action in actions)}"
        )
    return decision
