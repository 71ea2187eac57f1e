"""Where a run stands: what it has seen, what it would go back to, and what is under way."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from pbfx.capacity import CapacityTest
from pbfx.figures import SiteFigures
from pbfx.history import Epoch
from pbfx.parts import Survey, Walked
from pbfx.phase import Phase
from pbfx.policy import Action, Decision, Situation
from pbfx.rates import Search
from pbfx.snapshot import Snapshot


@dataclasses.dataclass
class Run:
    """The tracker's book: it copies networks, and changes none.

    Attributes:
        maximize: whether a larger score is better.
        complete: whether training is over.
        history: all epochs so far.
        cycle: counts restructurings; the epochs of one phase share it.
        attempt: how many sets of dendrites in a row were dropped.
        finishing: whether this is the last neuron phase, in which dendrites train too.
        best_score: of a neuron phase so far.
        accepted: the network that was accepted before this phase.
        current: the best of this neuron phase; None before its first score, and in others.
        search: for a learning rate, while one is under way.
        factor: what the last search of this phase has settled on.
        test: of the capacity, while it is under way.
    """

    maximize: bool
    complete: bool = False
    history: tuple[Epoch, ...] = ()
    cycle: int = 0
    attempt: int = 0
    finishing: bool = False
    best_score: float | None = None
    accepted: Snapshot | None = None
    current: Snapshot | None = None
    search: Search | None = None
    factor: float | None = None
    test: CapacityTest | None = None

    def improves(self, score: float) -> bool:
        """Return whether no neuron phase has scored so well."""
        return self.best_score is None or self._better(score, self.best_score)

    def keep(self, model: Walked, score: float) -> None:
        """Copy the network of `model` if it is the best of its phase.

        Args:
            model: in a neuron phase.
            score: of its network.
        """
        if self.current is None:
            self.current = Snapshot.take(model, score)
        elif self._better(score, self.current.score):
            self.current = self.current.renewed(model, score)

    def kept(self, decision: Decision) -> Snapshot | None:
        """Return the network that is accepted from `decision` on."""
        return self.current if decision.keep and self.current is not None else self.accepted

    def _better(self, new: float, old: float) -> bool:
        return new > old if self.maximize else new < old

    def situation(
        self,
        phase: Phase,
        score: float,
        candidate_score: float | None,
        sites: tuple[SiteFigures, ...],
        dendrites: int,
        max_dendrites: int,
    ) -> Situation:
        """Return what the policy is to judge, now that these have come in."""
        same = itertools.takewhile(lambda e: e.cycle == self.cycle, reversed(self.history))
        now = list(same)[::-1]
        if self.search is None:
            # What other rates have led to was thrown away.
            now = [epoch for epoch in now if epoch.rate_factor in (None, self.factor)]
        return Situation(
            phase=phase,
            scores=(*(epoch.score for epoch in now), score),
            candidate_scores=(*(epoch.candidate_score for epoch in now), candidate_score),
            dendrites=dendrites,
            max_dendrites=max_dendrites,
            attempt=self.attempt,
            accepted=None if self.accepted is None else self.accepted.score,
            maximize=self.maximize,
            finishing=self.finishing,
            sites=sites,
        )

    def record(
        self,
        situation: Situation,
        decision: Decision,
        improved: bool,
        found: Survey,
        learning_rates: Sequence[float],
        seconds: float,
    ) -> None:
        """Write down the epoch that `situation` ends with."""
        score = situation.scores[-1]
        if improved:
            self.best_score = score
        self.history += (
            Epoch(
                number=len(self.history) + 1,
                phase=situation.phase,
                dendrites=found.dendrites,
                cycle=self.cycle,
                attempt=self.attempt,
                score=score,
                improved=improved,
                action=decision.action,
                reason=decision.reason,
                candidate_score=situation.candidate_scores[-1],
                parameters=found.parameters,
                learning_rates=tuple(learning_rates),
                seconds=seconds,
                rate_factor=None if self.search is None else self.search.factor,
                sites=situation.sites,
            ),
        )

    def turn(self, decision: Decision, search: Search | None) -> None:
        """Begin the next cycle, now that `decision` has been carried out."""
        kept = self.kept(decision)
        self.cycle += 1
        self.current = None
        self.search, self.factor = search, None
        if decision.action is Action.RETRY:
            self.attempt += 1
        elif decision.action in (Action.GROW, Action.FINISH):
            self.attempt, self.accepted = 0, kept
            self.finishing = decision.action is Action.FINISH
        elif decision.action is Action.COMPLETE:
            self.complete, self.accepted, self.finishing = True, kept, False
            if self.test is not None:
                # Its networks are not the run's.
                self.test = self.accepted = None

    def state_dict(self) -> dict[str, Any]:
        """Return the book as plain data and tensors."""
        return {
            "complete": self.complete,
            "cycle": self.cycle,
            "attempt": self.attempt,
            "finishing": self.finishing,
            "search": None if self.search is None else self.search.state_dict(),
            "factor": self.factor,
            "capacity": None if self.test is None else self.test.state_dict(),
            "history": [epoch.to_json() for epoch in self.history],
            "best": None if self.accepted is None else self.accepted.state_dict(),
            "current": None if self.current is None else self.current.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], maximize: bool) -> Run:
        """Return the book that `state_dict` described."""
        history = tuple(Epoch.from_json(epoch) for epoch in state["history"])
        accepted, current = (
            None if state[key] is None else Snapshot.from_state_dict(state[key])
            for key in ("best", "current")
        )
        # Absent from files that were written before there were any.
        search, test = state.get("search"), state.get("capacity")
        scores = [epoch.score for epoch in history if epoch.improved]
        return cls(
            maximize=maximize,
            complete=state["complete"],
            history=history,
            cycle=state["cycle"],
            attempt=state["attempt"],
            finishing=state.get("finishing", False),
            best_score=scores[-1] if scores else None,
            accepted=accepted,
            current=current,
            search=None if search is None else Search.from_state_dict(search, maximize),
            factor=state.get("factor"),
            test=None if test is None else CapacityTest.from_state_dict(test),
        )
