"""Watch validation scores, and restructure when the policy says so."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pbfx import checkpoint, restructure
from pbfx.belonging import check, check_optimizer
from pbfx.budget import Budget
from pbfx.by_hand import grow_part
from pbfx.capacity import Capacity, CapacityTest
from pbfx.errors import TrackerError
from pbfx.figures import SiteFigures
from pbfx.history import Epoch, Step, finite_score, write_history
from pbfx.learning import SiteLearner, figures_of, hold_older, measure_all, reached
from pbfx.optimizers import Schedule, Stepping, hold
from pbfx.parts import Survey, growth_parameters, parts_of, survey
from pbfx.perforated import PerforatedModule
from pbfx.phase import Phase
from pbfx.policy import (
    Action,
    Decision,
    Plateau,
    PolicyLike,
    Situation,
    asked,
    finished,
    growth_epochs,
    possible,
)
from pbfx.rates import RateSearch, Search
from pbfx.restructure import Frozen
from pbfx.settings import PerDendrite, at
from pbfx.snapshot import Snapshot
from pbfx.undo import undoing
from pbfx.waypoint import Waypoint

logger = logging.getLogger(__name__)


class Tracker:
    """Decide from validation scores when to add dendrites, and add them.

    Replaces `scheduler.step()` in a training script. The model, the optimizer and the scheduler are
    edited in place: whatever the script holds stays valid.

    Args:
        model: a model from `pbfx.transform`, or one that contains such parts, compiled or not.
        optimizer: any optimizer of `torch.optim` over the model's parameters, with any groups.
        scheduler: a learning-rate scheduler of that optimizer, or None.
        policy: decides: `Plateau()` if None, another of `pbfx`, an object with a method
            `decide(situation)`, or a function `situation -> Decision`.
        max_dendrites: dendrites per neuron after which training completes at the next plateau.
        maximize: whether a larger score is better (accuracy) or a smaller one (loss).
        scheduler_steps: `"epoch"`: the tracker steps the scheduler, once per call; `"batch"`: the
            training loop does; `"auto"`: the tracker, unless the loop is seen to do it.
        reset_learning_rate: whether rates and schedule start again after each growth. May be a list
            indexed by the number of dendrites after it; the last value stands for all beyond.
        reset_optimizer_state: whether the optimizer forgets its moments after each growth; by
            default parameters that survive keep theirs. May be a list likewise.
        max_parameters: budget: a growth after which the network would have more is declined, and
            training completes. All sites are counted.
        max_flops: likewise for the FLOPs of a forward pass of `example_inputs`, in eval.
        max_epochs: calls of `step` after which training completes; a growth that could not be
            judged by then is declined.
        example_inputs: the model's positional arguments, a tuple or one tensor; for `max_flops`.
        learning_rates: `pbfx.RateSearch()` tries several rates after each growth.
        test_capacity: prove the set-up instead of training: grow three times, one epoch per phase,
            then say in `Step.reason`, in the log and in `capacity` what the real run will need, and
            complete. Network, optimizer and schedule are set back to what they were when the
            tracker was made; see docs/training.md for what is not. Budgets do not apply.
        directory: where to write `last.safetensors` (to resume), `best.safetensors`,
            `history.csv` and, from the first dendrite phase on, `sites.csv` at every call; None
            writes nothing. A capacity test writes into `capacity_test` inside.

    Raises:
        TrackerError: if the parts do not belong together; nothing has been touched.
        RestructureError: if the model has no perforated parts.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Any = None,
        *,
        policy: PolicyLike | None = None,
        max_dendrites: int = 5,
        maximize: bool = True,
        scheduler_steps: Stepping = "auto",
        reset_learning_rate: PerDendrite[bool] = True,
        reset_optimizer_state: PerDendrite[bool] = False,
        max_parameters: int | None = None,
        max_flops: int | None = None,
        max_epochs: int | None = None,
        example_inputs: Any = None,
        learning_rates: RateSearch | None = None,
        test_capacity: bool = False,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        # torch.compile returns a wrapper around the module that it was given; that one is
        # restructured.
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.optimizer = optimizer
        self.policy: PolicyLike = Plateau() if policy is None else policy
        self.max_dendrites, self.maximize = max_dendrites, maximize
        self.learning_rates = learning_rates
        check(self.model, optimizer, self.policy, max_dendrites, learning_rates)
        self._stepping: Stepping = scheduler_steps
        self._schedule = Schedule(optimizer, scheduler, scheduler_steps)
        self.reset_learning_rate = reset_learning_rate
        self.reset_optimizer_state = reset_optimizer_state
        self.budget = Budget(max_parameters, max_flops, max_epochs, example_inputs)
        if test_capacity and directory is not None:
            directory = Path(directory) / "capacity_test"
        self.directory = None if directory is None else _folder(directory)

        self.complete = False
        self.history: tuple[Epoch, ...] = ()
        self._cycle = self._attempt = 0
        self._best_score: float | None = None
        self._finishing = False
        self._best: Snapshot | None = None
        self._current: Snapshot | None = None
        self._frozen: Frozen | None = None
        self._learners: dict[str, SiteLearner] = {}
        self._holds: list[RemovableHandle] = hold_older(self.model, self.optimizer)
        # The search for a rate that is under way, and the factor that this phase's has settled on.
        self._search: Search | None = None
        self._factor: float | None = None
        self.capacity: Capacity | None = None
        self._capacity = self._capacity_test() if test_capacity else None
        # The parameters that the optimizer was last brought in line with.
        self._parameters = dict(self.model.named_parameters())
        self._since = time.perf_counter()
        self._token = object()
        for part in parts_of(self.model).values():
            part.perforation.tracker = self._token

    @property
    def phase(self) -> Phase:
        """Who learns now."""
        return Phase.DENDRITE if self._learners else Phase.NEURON

    @property
    def dendrites(self) -> int:
        """Dendrites per neuron of the most grown site."""
        return survey(self.model).dendrites

    @property
    def best_score(self) -> float | None:
        """Best validation score of a neuron phase so far."""
        return self._best_score

    # What is made here must outlive a caller's inference mode, whose tensors autograd refuses.
    @torch.inference_mode(False)
    def step(self, score: Any) -> Step:
        """Take in the validation score of an epoch; perhaps restructure.

        Args:
            score: a finite number: Python's, numpy's, or a tensor with one element.

        Returns:
            What happened. Once training is complete, further calls change nothing and say so.

        Raises:
            ScoreError: if the score is not a finite number; nothing has moved.
            TrackerError: if another tracker has taken over the model, or the policy decided what
                cannot be done; nothing has moved.
            RestructureError: if restructuring failed. It was undone; the score stays in the
                history.
        """
        value = finite_score(score)
        if self.complete:
            done = "training is already complete"
            return Step(False, True, self.phase, self.dendrites, False, done)
        found = survey(self.model)
        if any(part.perforation.tracker is not self._token for part in found.parts.values()):
            raise TrackerError("another tracker has been made for this model; use that one")
        self._schedule.observe()
        phase, best = self.phase, self.best_score
        improved = phase is Phase.NEURON and (best is None or self._better(value, best))
        if phase is Phase.NEURON:
            self._keep(value)
        seconds = time.perf_counter() - self._since
        candidate_score, sites = self._measure()
        situation = self._situation(value, candidate_score, sites, found)
        if self._capacity is not None:
            decision = self._test_capacity(self._capacity, situation, seconds, found)
        else:
            decision = self._decide(situation, found)
        self._record(value, improved, candidate_score, sites, decision, seconds, found)
        if improved:
            # Before growing: the file is to hold the network that scored.
            self._write_best()
        if decision.action is Action.CONTINUE:
            if phase is Phase.NEURON:
                self._schedule.step(value)
            if self._search is not None:
                self._carry_on(self._search)
        else:
            self._restructure(decision)
            found = survey(self.model)
            logger.info("%s", decision.reason)
        if self.complete:
            self._write_best()
        self._write_last()
        self._since = time.perf_counter()
        return Step(
            restructured=decision.action is not Action.CONTINUE,
            complete=self.complete,
            phase=self.phase,
            dendrites=found.dendrites,
            improved=improved,
            reason=decision.reason,
        )

    def _keep(self, score: float) -> None:
        """Copy the network if it is the best of its phase."""
        if self._current is None:
            self._current = Snapshot.take(self.model, score)
        elif self._better(score, self._current.score):
            self._current = self._current.renewed(self.model, score)

    def adopt(self, optimizer: Optimizer, scheduler: Any = None) -> None:
        """Go on with another optimizer, at any time and in either phase.

        For scripts that make a new one, where the tracker would have kept theirs up to date. Its
        rates are those that later growths return to; a search for a rate ends.

        Args:
            optimizer: made over the parameters that the model has now.
            scheduler: a learning-rate scheduler of that optimizer, or None.

        Raises:
            TrackerError: if the parts do not belong together, or a capacity test is on, which sets
                the optimizer back at its end; the tracker keeps its own.
            RestructureError: if the optimizer cannot step what is the tracker's to give it; the
                tracker keeps its own.
        """
        if self._capacity is not None:
            raise TrackerError(
                "a capacity test sets its optimizer back at the end, so it keeps the one that it "
                "began with; adopt another once it is complete"
            )
        check_optimizer(self.model, optimizer)
        schedule = Schedule(optimizer, scheduler, self._stepping if scheduler else "auto")
        network: set[str] = set()
        if self._frozen is not None:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            frozen = frozenset(self._frozen.learning)
            named = self.model.named_parameters()
            network = {name for name, p in named if name in frozen and id(p) in held}
        restructure.take_over(self.model, optimizer, schedule, frozenset(network))
        self.optimizer, self._schedule = optimizer, schedule
        self._parameters = dict(self.model.named_parameters())
        self._search, self._factor = None, None
        if not self._learners:
            for handle in self._holds:
                handle.remove()
            self._holds = hold_older(self.model, optimizer)

    def _better(self, new: float, old: float) -> bool:
        return new > old if self.maximize else new < old

    def _decide(self, situation: Situation, found: Survey) -> Decision:
        spent = len(self.history) + 1
        if self._search is not None:
            decision = Decision(Action.CONTINUE, self._search.judge(situation.scores[-1]))
            return possible(self.budget.in_time(decision, situation, spent), situation)
        decision = asked(self.policy, situation)
        if isinstance(decision, Decision):
            grows = decision.action is Action.GROW and situation.phase is Phase.NEURON
            if grows and not situation.finishing:
                phases = not _grows_at_once(found.parts.values())
                epochs = growth_epochs(self.policy, situation.dendrites, phases)
                decision = self.budget.affordable(decision, self.model, found, spent, epochs)
            if decision.action is Action.PROMOTE and self._learners:
                # A growth of nothing would go on for ever under a policy that counts dendrites.
                why = restructure.why_nothing_grows(self.model, self._learners)
                if why is not None:
                    decision = Decision(Action.COMPLETE, f"{decision.reason}; {why}")
            wanted = any(p.perforation.config.finish for p in found.parts.values())
            kept = self._kept(decision)
            grown = kept is not None and kept.structure.dendrites > 0
            decision = finished(decision, situation, wanted and grown)
            decision = self.budget.in_time(decision, situation, spent)
        return possible(decision, situation)

    def _carry_on(self, search: Search) -> None:
        """Do what the search for a learning rate has said. Structure and code stay."""
        parts = self.model, self.optimizer, self._schedule
        with undoing(*parts):
            over = search.carry_on(*parts)
        if over:
            self._search, self._factor = None, search.factors[search.best]

    def _capacity_test(self) -> CapacityTest:
        found = survey(self.model)
        more = max(0, self.max_dendrites - found.dendrites)
        parameters = found.parameters + growth_parameters(found.parts, more)
        start = Waypoint.take(self.model, self.optimizer, self._schedule)
        return CapacityTest(start, found.dendrites, parameters)

    def _test_capacity(
        self, test: CapacityTest, situation: Situation, seconds: float, found: Survey
    ) -> Decision:
        kept = [t for s in (self._best, self._current) if s for t in s.tensors.values()]
        epoch = self.phase, found.dendrites, seconds, found.parameters
        test.note(self.model, self.optimizer, kept, epoch)
        decision = test.decide(situation)
        if decision.action is Action.COMPLETE:
            self.capacity = test.result(self.model, self.max_dendrites)
            decision = Decision(Action.COMPLETE, str(self.capacity), decision.keep)
        return possible(decision, situation)

    def _kept(self, decision: Decision) -> Snapshot | None:
        """Return the network that is accepted from now on."""
        return self._current if decision.keep and self._current is not None else self._best

    def _measure(self) -> tuple[float | None, tuple[SiteFigures, ...]]:
        """Close the epoch of every learner; return the mean score over sites, and the figures."""
        if not self._learners:
            return None, ()
        heard = reached(self._learners)
        if not heard:
            warnings.warn(
                "pbfx: no error has reached any candidate since the dendrite phase began; the "
                "training loop must call loss.backward() on the model's output in this phase too",
                stacklevel=3,
            )
        measured = measure_all(self._learners)
        known = [score for score in measured.values() if score is not None]
        figures = tuple(
            # As `torch.compile` leaves them in peace, paths do not show that it was there.
            dataclasses.replace(found, site=found.site.replace("_orig_mod.", ""))
            for found in figures_of(heard, measured)
        )
        for part in parts_of(self.model).values():
            part.perforation.figures = figures
        return sum(known) / len(known) if known else None, figures

    def _situation(
        self,
        score: float,
        candidate_score: float | None,
        sites: tuple[SiteFigures, ...],
        found: Survey,
    ) -> Situation:
        same = itertools.takewhile(lambda e: e.cycle == self._cycle, reversed(self.history))
        now = list(same)[::-1]
        if self._search is None:
            # What other rates have led to was thrown away.
            now = [epoch for epoch in now if epoch.rate_factor in (None, self._factor)]
        return Situation(
            phase=self.phase,
            scores=(*(epoch.score for epoch in now), score),
            candidate_scores=(*(epoch.candidate_score for epoch in now), candidate_score),
            dendrites=found.dendrites,
            max_dendrites=self.max_dendrites,
            attempt=self._attempt,
            accepted=None if self._best is None else self._best.score,
            maximize=self.maximize,
            finishing=self._finishing,
            sites=sites,
        )

    def _record(
        self,
        score: float,
        improved: bool,
        candidate_score: float | None,
        sites: tuple[SiteFigures, ...],
        decision: Decision,
        seconds: float,
        found: Survey,
    ) -> None:
        if improved:
            self._best_score = score
        self.history += (
            Epoch(
                number=len(self.history) + 1,
                phase=self.phase,
                dendrites=found.dendrites,
                cycle=self._cycle,
                attempt=self._attempt,
                score=score,
                improved=improved,
                action=decision.action,
                reason=decision.reason,
                candidate_score=candidate_score,
                parameters=found.parameters,
                learning_rates=tuple(float(group["lr"]) for group in self.optimizer.param_groups),
                seconds=seconds,
                rate_factor=None if self._search is None else self._search.factor,
                sites=sites,
            ),
        )

    def _restructure(self, decision: Decision) -> None:
        """Carry out a decision; the tracker's own state changes only when the model's has."""
        kept = self._kept(decision)
        source = self._current if decision.action is Action.GROW else kept
        over = decision.action is Action.COMPLETE
        if over and self._capacity is not None:
            source = self._capacity.start.network
        frozen, learners, search = None, {}, None
        parts = self.model, self.optimizer, self._schedule
        # Promotion makes new tensors; all else returns to a snapshot, which is copied into old
        # ones.
        values = decision.action is not Action.PROMOTE
        with undoing(*parts, values=values):
            with restructure.synchronised(self.model, self.optimizer):
                if decision.action is Action.PROMOTE:
                    assert self._frozen is not None
                    restructure.promote(self.model, self._learners)
                    restructure.thaw(self.model, self._frozen)
                else:
                    assert source is not None
                    source.restore(self.model)
                    if self._frozen is not None:
                        restructure.thaw(self.model, self._frozen)
                    if decision.action is Action.FINISH or self._finishing:
                        restructure.set_finishing(self.model, decision.action is Action.FINISH)
                    elif not over:
                        frozen, learners = self._grow()
                if not over:
                    dendrites = self.dendrites
                    if at(self.reset_learning_rate, dendrites):
                        self._schedule.reset()
                    if at(self.reset_optimizer_state, dendrites):
                        self.optimizer.state.clear()
            if over and self._capacity is not None:
                self._capacity.start.restore(*parts)
                for path, part in parts_of(self.model).items():
                    part.perforation.draws = self._capacity.start.draws[path]
                    part.perforation.figures = ()
            elif not over and not learners and decision.action is not Action.FINISH:
                search = self._new_search()
        self._listen(frozen, learners)
        self._parameters = dict(self.model.named_parameters())
        self._cycle += 1
        self._current = None
        self._search, self._factor = search, None
        if decision.action is Action.RETRY:
            self._attempt += 1
        elif decision.action in (Action.GROW, Action.FINISH):
            self._attempt, self._best = 0, kept
            self._finishing = decision.action is Action.FINISH
        elif decision.action is Action.COMPLETE:
            self.complete, self._best, self._finishing = True, kept, False
            if self._capacity is not None:
                # Its networks are not the run's.
                self._capacity = self._best = None

    def _listen(self, frozen: Frozen | None, learners: dict[str, SiteLearner]) -> None:
        """Let `learners` take the place of those that have listened to backward passes so far."""
        for learner in self._learners.values():
            learner.detach()
        for handle in self._holds:
            handle.remove()
        self._frozen, self._learners = frozen, learners
        self._holds = (
            restructure.hold_outside(self.model)
            if learners
            else hold_older(self.model, self.optimizer)
        )
        for learner in learners.values():
            learner.attach()

    def _grow(self) -> tuple[Frozen | None, dict[str, SiteLearner]]:
        """Start a dendrite phase, or add dendrites at once where the mode of learning has none."""
        parts = parts_of(self.model).values()
        if _grows_at_once(parts):
            for part in parts:
                grow_part(part, 1, dict.fromkeys(site.name for site in part.perforation.sites))
            return None, {}
        return restructure.start_dendrite_phase(self.model)

    def _new_search(self) -> Search | None:
        """Start to search for a learning rate, where that is wanted and no test is under way."""
        if self.learning_rates is None or self._capacity is not None:
            return None
        start = Waypoint.take(self.model, self.optimizer, self._schedule)
        search = Search(self.learning_rates, self.dendrites, self.maximize, start)
        self._schedule.scale(search.factor)
        return search

    def _write_best(self) -> None:
        if self.directory is not None:
            checkpoint.save(self.model, self.directory / "best.safetensors")

    def _write_last(self) -> None:
        if self.directory is not None:
            checkpoint.save(self.model, self.directory / "last.safetensors", self)
            write_history(self.history, self.directory)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later process needs beside the model's own state dict.

        Plain data and tensors: the history, the best networks, the optimizer's and the scheduler's
        state, and the candidates' learners. As in torch's own state dicts, tensors are references
        that training goes on to change: save them, or copy them with `copy.deepcopy`.
        """
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {
            "version": 1,
            "complete": self.complete,
            "cycle": self._cycle,
            "attempt": self._attempt,
            "finishing": self._finishing,
            "search": None if self._search is None else self._search.state_dict(),
            "factor": self._factor,
            "capacity": None if self._capacity is None else self._capacity.state_dict(),
            "history": [epoch.to_json() for epoch in self.history],
            "best": None if self._best is None else self._best.state_dict(),
            "current": None if self._current is None else self._current.state_dict(),
            "frozen": None
            if self._frozen is None
            else {"learning": list(self._frozen.learning), "training": list(self._frozen.training)},
            "learners": {name: learner.state_dict() for name, learner in self._learners.items()},
            "draws": {p: m.perforation.draws for p, m in parts_of(self.model).items()},
            "groups": [
                [names.get(id(p)) for p in g["params"]] for g in self.optimizer.param_groups
            ],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state` left off. Load the model's state dict first, for the structure.

        Raises:
            RestructureError: if `state` does not fit the model, the optimizer or the scheduler;
                nothing has moved.
        """
        frozen, learners = None, {}
        with undoing(self.model, self.optimizer, self._schedule):
            history = tuple(Epoch.from_json(epoch) for epoch in state["history"])
            # Absent from files that were written before there were any.
            search, capacity = state.get("search"), state.get("capacity")
            if search is not None:
                search = Search.from_state_dict(search, self.maximize)
            if capacity is not None:
                capacity = CapacityTest.from_state_dict(capacity)
            if (capacity is None) != (self._capacity is None) and not state["complete"]:
                was, now = ("a capacity test", "no capacity test")[:: 1 if capacity else -1]
                raise TrackerError(
                    f"the saved run was {was}, this tracker is for {now}; give it the same "
                    "test_capacity"
                )
            best, current = (
                None if state[key] is None else Snapshot.from_state_dict(state[key])
                for key in ("best", "current")
            )
            parameters = dict(self.model.named_parameters())
            hold(self.optimizer, parameters, self._parameters, state["groups"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["schedule"])
            for path, part in parts_of(self.model).items():
                part.perforation.draws = state["draws"].get(path, part.perforation.draws)
            if self._frozen is not None:
                restructure.thaw(self.model, self._frozen)
            if self._finishing or state.get("finishing", False):
                restructure.set_finishing(self.model, state.get("finishing", False))
            if state["frozen"] is not None:
                frozen = Frozen(*(tuple(state["frozen"][key]) for key in ("learning", "training")))
                restructure.freeze(self.model)
                learners = restructure.learners_of(self.model)
                for name, learner in learners.items():
                    learner.load_state_dict(state["learners"][name])
        self._parameters = parameters
        self.complete, self.history = state["complete"], history
        scores = [epoch.score for epoch in history if epoch.improved]
        self._best_score = scores[-1] if scores else None
        self._cycle, self._attempt = state["cycle"], state["attempt"]
        self._finishing = state.get("finishing", False)
        self._best, self._current = best, current
        self._search, self._factor = search, state.get("factor")
        self._capacity = capacity
        self._since = time.perf_counter()
        self._listen(frozen, learners)
        figures = next((epoch.sites for epoch in reversed(history) if epoch.sites), ())
        for part in parts_of(self.model).values():
            part.perforation.figures = figures


def _grows_at_once(parts: Iterable[PerforatedModule]) -> bool:
    """Return whether growing takes no dendrite phase."""
    return all(part.perforation.config.learning == "gradient" for part in parts)


def _folder(directory: str | os.PathLike[str]) -> Path:
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackerError(f"directory {folder} cannot be made: {error}") from error
    return folder
