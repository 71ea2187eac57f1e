"""A script's settings as a policy of pbfx, read anew at every score: scripts change them midway."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from pbfx import (
    Action,
    Config,
    Decision,
    Epoch,
    EveryTime,
    Phase,
    Plateau,
    Policy,
    Situation,
)
from pbfx.compat.activations import activation_name
from pbfx.compat.decisions import DEFAULTS, policy_of
from pbfx.compat.places import ChosenModules
from pbfx.compat.store import Settings

HISTORY = 1
TOTAL_EPOCHS = 0
# How many dendrites prove a set-up.
CAPACITY = 3


def config_of(settings: Settings, chosen: ChosenModules) -> Config:
    """Return what the settings say about where and how dendrites grow."""
    config = Config(
        filter_fn=chosen,
        learning=learning_of(settings),
        activation=activation_name(settings.value("pai_forward_function"), "pai_forward_function"),
    )
    if settings.given("global_candidates"):
        config = dataclasses.replace(config, candidates=settings.value("global_candidates"))
    return config


def learning_of(settings: Settings) -> Any:
    """Return how dendrites learn: each dialect as its package did, unless the script says else."""
    named = settings.value("learning")
    if named is not None:
        return named
    return "perforated" if settings.now("perforated_backpropagation") else "gradient"


def judging_policy(settings: Settings) -> Policy:
    """Return the policy that the settings describe.

    Whoever asks for dendrites there gets them: no phase ends without, whatever candidates promise.
    """
    values = {name: settings.value(name) for name in DEFAULTS}
    policy = policy_of(values | {"switch_mode": settings.now("switch_mode")})
    if not isinstance(policy, Plateau):
        return policy
    policy = dataclasses.replace(policy, significance=None)
    if settings.given("p_epochs_to_switch"):
        patience = settings.value("p_epochs_to_switch")
        policy = dataclasses.replace(policy, candidate_patience=patience)
    return policy


class Switching:
    """Decide as the settings say at the moment.

    Args:
        settings: of the script.
        history: returns the epochs so far, the present one not included.
        rates: returns the learning rates that the present epoch ran with.
        scheduled: returns whether a scheduler changes them.
        plain: returns whether to grow never, and complete at the first plateau.
    """

    def __init__(
        self,
        settings: Settings,
        history: Callable[[], Sequence[Epoch]],
        rates: Callable[[], Sequence[float]],
        scheduled: Callable[[], bool],
        plain: Callable[[], bool],
    ) -> None:
        self.settings, self._plain = settings, plain
        self._history, self._rates, self._scheduled = history, rates, scheduled
        self.forced = False

    @property
    def testing(self) -> bool:
        """Whether this run only proves that the set-up can grow."""
        return bool(self.settings.now("testing_dendrite_capacity")) and not self._plain()

    def decide(self, situation: Situation) -> Decision:
        """Return what to do next."""
        settings, forced = self.settings, self.forced
        self.forced = False
        limit = 0 if self._plain() else settings.now("max_dendrites")
        now = dataclasses.replace(situation, max_dendrites=CAPACITY if self.testing else limit)
        decision = (EveryTime() if self.testing else judging_policy(settings)).decide(now)
        if decision.action is Action.CONTINUE:
            if forced:
                return self._force(now)
            if self._outlasts(now):
                return Decision(Action.PROMOTE, "as many epochs as the neuron phase had are over")
            return decision
        if now.phase is Phase.DENDRITE or self.testing or forced:
            return decision
        if self._waits_for_rate(now):
            return Decision(Action.CONTINUE, "waiting for the schedule to lower the learning rate")
        if not decision.keep and settings.now("retain_all_dendrites"):
            action = Action.GROW if now.dendrites < now.max_dendrites else Action.COMPLETE
            return Decision(action, f"{decision.reason}; all dendrites are to be retained")
        return decision

    def _force(self, now: Situation) -> Decision:
        if now.phase is Phase.DENDRITE:
            return Decision(Action.PROMOTE, "the script forced a switch")
        action = Action.GROW if now.dendrites < now.max_dendrites else Action.COMPLETE
        return Decision(action, "the script forced a switch")

    def _outlasts(self, now: Situation) -> bool:
        """Return whether a dendrite phase has taken as long as the neuron phase before it."""
        if now.phase is Phase.NEURON or not self.settings.now("cap_at_n"):
            return False
        history = self._history()
        before = [epoch for epoch in history if epoch.phase is Phase.NEURON]
        last = [epoch for epoch in before if epoch.cycle == before[-1].cycle]
        return len(now.scores) >= len(last)

    def _waits_for_rate(self, now: Situation) -> bool:
        """Return whether the schedule has yet to lower the rate since the last growth."""
        settings = self.settings
        asked = settings.now("find_best_lr") and settings.now(
            "dont_give_up_unless_learning_rate_lowered"
        )
        if not asked or not self._scheduled() or settings.now("switch_mode") != HISTORY:
            return False
        history = self._history()
        if not history or now.accepted is None:
            return False
        since = [epoch for epoch in history[-(len(now.scores) - 1) :] if len(now.scores) > 1]
        rates = self._rates()
        return not any(
            rate < before
            for epoch in since
            for rate, before in zip(rates, epoch.learning_rates, strict=False)
        )
