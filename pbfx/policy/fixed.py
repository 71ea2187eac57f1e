"""Grow by the number of epochs, whatever the scores say: at intervals, every time, or never."""

from __future__ import annotations

import dataclasses

from pbfx.errors import ConfigError
from pbfx.phase import Phase
from pbfx.policy.decision import Action, Decision, Situation, is_over, learning_is_over
from pbfx.settings import PerDendrite, at, freeze_lists, number_faults


@dataclasses.dataclass(frozen=True)
class Interval:
    """Grow at fixed intervals, whatever the scores say: the schedule of paired experiments.

    Every arm of a study then trains for the same number of epochs. The best network of all phases,
    by validation score, is restored at the end. Either setting may be a list indexed by the number
    of dendrites that a neuron has, so `Interval([20, 5])` gives the first network longer.

    Args:
        neuron_epochs: length of each neuron phase.
        dendrite_epochs: length of each dendrite phase.

    Raises:
        ConfigError: naming every setting that is out of range.
    """

    neuron_epochs: PerDendrite[int]
    dendrite_epochs: PerDendrite[int] = 4

    def __post_init__(self) -> None:
        _check(self, neuron_epochs=1, dendrite_epochs=1)

    def decide(self, situation: Situation) -> Decision:
        """Return what to do next."""
        now, epochs = situation, len(situation.scores)
        if now.phase is Phase.DENDRITE:
            length = at(self.dendrite_epochs, now.dendrites)
            if epochs < length:
                return Decision(Action.CONTINUE, f"epoch {epochs} of {length}")
            return Decision(Action.PROMOTE, learning_is_over(length))
        length = at(self.neuron_epochs, now.dendrites)
        if epochs < length:
            return Decision(Action.CONTINUE, f"epoch {epochs} of {length}")
        over = is_over(length)
        if now.dendrites < now.max_dendrites:
            reason = f"{over}: growing dendrite {now.dendrites + 1}"
            return Decision(Action.GROW, reason, now.helped)
        reason = f"{over}; max_dendrites={now.max_dendrites} is reached"
        return Decision(Action.COMPLETE, reason, now.helped)

    def growth_epochs(self, dendrites: int, dendrite_phase: bool) -> int:
        """Return how many epochs a growth at so many dendrites takes."""
        learning = at(self.dendrite_epochs, dendrites) if dendrite_phase else 0
        return learning + at(self.neuron_epochs, dendrites + 1)


@dataclasses.dataclass(frozen=True)
class EveryTime:
    """Restructure at every step until all dendrites are grown: each phase lasts one epoch.

    It proves a set-up and trains nothing well. What `Interval(1, 1)` does.
    """

    def decide(self, situation: Situation) -> Decision:
        """Return what to do next."""
        return Interval(1, 1).decide(situation)


@dataclasses.dataclass(frozen=True)
class Never:
    """Never grow: the plain arm of an experiment, with the tracker's history and files.

    A dendrite phase that it finds, because it took over from another policy, is ended.

    Args:
        epochs: after how many epochs of a phase training completes, with its best network; None
            goes on for as long as the loop does. May be a list indexed by the number of dendrites.

    Raises:
        ConfigError: if the setting is out of range.
    """

    epochs: PerDendrite[int | None] = None

    def __post_init__(self) -> None:
        _check(self, epochs=1)

    def decide(self, situation: Situation) -> Decision:
        """Return what to do next."""
        now, epochs = situation, len(situation.scores)
        if now.phase is Phase.DENDRITE:
            return Decision(Action.PROMOTE, "no more epochs of candidate learning are wanted")
        length = at(self.epochs, now.dendrites)
        if length is None or epochs < length:
            of = "" if length is None else f" of {length}"
            return Decision(Action.CONTINUE, f"epoch {epochs}{of}")
        return Decision(Action.COMPLETE, is_over(length), now.helped)


def _check(policy: Interval | Never, **least: float) -> None:
    freeze_lists(policy, *least)
    faults = number_faults(policy, least, optional=frozenset(("epochs",)))
    if faults:
        raise ConfigError(f"pbfx.{type(policy).__name__}: " + "; ".join(faults))
