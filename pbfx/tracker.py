"""Watch validation scores, and restructure when the policy says so."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pbfx import restructure
from pbfx.acting import Resets, carry_out
from pbfx.belonging import check, check_optimizer
from pbfx.budget import Budget
from pbfx.capacity import Capacity, CapacityTest
from pbfx.deciding import decide
from pbfx.errors import TrackerError
from pbfx.history import Epoch, Step
from pbfx.learning import SiteLearner
from pbfx.listening import Listening, resumed
from pbfx.measuring import measure, show_figures
from pbfx.optimizers import Schedule, Stepping, hold
from pbfx.parts import Survey, Walk, parts_of, survey
from pbfx.phase import Phase
from pbfx.policy import Action, Decision, Plateau, PolicyLike, Situation, possible
from pbfx.ranks import (
    Wrappers,
    agreed_score,
    check_candidates,
    check_renewable,
    listen_together,
    renew,
    wrappers_of,
)
from pbfx.rates import RateSearch, Search
from pbfx.restructure import Frozen
from pbfx.run import Run
from pbfx.run_files import made, write_best, write_last
from pbfx.settings import PerDendrite
from pbfx.undo import undoing
from pbfx.waypoint import Waypoint

logger = logging.getLogger(__name__)


class Tracker:
    """Decide from validation scores when to add dendrites, and add them.

    Replaces `scheduler.step()` in a training script. The model, the optimizer and the scheduler are
    edited in place: whatever the script holds stays valid. Under `DistributedDataParallel` every
    rank has a tracker, and its wrapper stays valid too.

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
        self.max_dendrites = max_dendrites
        self.learning_rates = learning_rates
        check(self.model, optimizer, self.policy, max_dendrites, learning_rates)
        self._stepping: Stepping = scheduler_steps
        self._schedule = Schedule(optimizer, scheduler, scheduler_steps)
        self.reset_learning_rate = reset_learning_rate
        self.reset_optimizer_state = reset_optimizer_state
        self.budget = Budget(max_parameters, max_flops, max_epochs, example_inputs)
        if test_capacity and directory is not None:
            directory = Path(directory) / "capacity_test"
        self.directory = None if directory is None else made(directory)

        self.capacity: Capacity | None = None
        self._run = Run(maximize)
        self._listening = Listening(self.model, optimizer)
        if test_capacity:
            parts = self.model, self.optimizer, self._schedule
            self._run.test = CapacityTest.begin(*parts, max_dendrites)
        # The parameters that the optimizer was last brought in line with.
        self._parameters = dict(self.model.named_parameters())
        self._since = time.perf_counter()
        self._token = object()
        for part in parts_of(self.model).values():
            part.perforation.tracker = self._token

    @property
    def complete(self) -> bool:
        """Whether training is over; the best network has then been restored."""
        return self._run.complete

    @property
    def history(self) -> tuple[Epoch, ...]:
        """All epochs so far."""
        return self._run.history

    @property
    def maximize(self) -> bool:
        """Whether a larger score is better."""
        return self._run.maximize

    @property
    def _frozen(self) -> Frozen | None:
        return self._listening.frozen

    @property
    def _learners(self) -> dict[str, SiteLearner]:
        return self._listening.learners

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
        return self._run.best_score

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
            TrackerError: if another tracker has taken over the model, the policy decided what
                cannot be done, or the ranks of `DistributedDataParallel` give different scores;
                nothing has moved. Or if candidates have learnt different things on different ranks;
                the model is as it was.
            RestructureError: if restructuring failed. It was undone; the score stays in the
                history.
        """
        wrappers = wrappers_of(self.model)
        value = agreed_score(score, wrappers)
        if self.complete:
            done = "training is already complete"
            return Step(False, True, self.phase, self.dendrites, False, done)
        found = survey(self.model)
        if any(part.perforation.tracker is not self._token for part in found.parts.values()):
            raise TrackerError("another tracker has been made for this model; use that one")
        self._schedule.observe()
        run, phase = self._run, self.phase
        improved = phase is Phase.NEURON and run.improves(value)
        if phase is Phase.NEURON:
            run.keep(found.walk, value)
        seconds = time.perf_counter() - self._since
        candidate_score, sites = measure(found.parts, self._learners)
        check_candidates(candidate_score, wrappers)
        situation = run.situation(
            phase, value, candidate_score, sites, found.dendrites, self.max_dendrites
        )
        if run.test is not None:
            decision = self._test_capacity(run.test, situation, seconds, found)
        else:
            parts = self.model, found, self._learners
            decision = decide(self.policy, self.budget, run, situation, *parts)
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        run.record(situation, decision, improved, found, rates, seconds)
        if improved:
            # Before growing: the file is to hold the network that scored.
            write_best(self.directory, self.model)
        if decision.action is Action.CONTINUE:
            if phase is Phase.NEURON:
                self._schedule.step(value)
            if run.search is not None:
                self._carry_on(run.search)
        else:
            found = self._restructure(decision, wrappers, found.walk)
            logger.info("%s", decision.reason)
        if self.complete:
            write_best(self.directory, self.model)
        write_last(self.directory, self.model, self, self.history)
        self._since = time.perf_counter()
        return Step(
            restructured=decision.action is not Action.CONTINUE,
            complete=self.complete,
            phase=self.phase,
            dendrites=found.dendrites,
            improved=improved,
            reason=decision.reason,
        )

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
        if self._run.test is not None:
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
        self._run.search = self._run.factor = None
        self._listening.follow(self.model, optimizer)

    def _carry_on(self, search: Search) -> None:
        """Do what the search for a learning rate has said. Structure and code stay."""
        parts = self.model, self.optimizer, self._schedule
        with undoing(*parts):
            over = search.carry_on(*parts)
        if over:
            self._run.search, self._run.factor = None, search.factors[search.best]

    def _test_capacity(
        self, test: CapacityTest, situation: Situation, seconds: float, found: Survey
    ) -> Decision:
        networks = self._run.accepted, self._run.current
        kept = [t for network in networks if network for t in network.tensors.values()]
        epoch = self.phase, found.dendrites, seconds, found.parameters
        test.note(self.model, self.optimizer, kept, epoch)
        decision = test.decide(situation)
        if decision.action is Action.COMPLETE:
            self.capacity = test.result(self.model, self.max_dendrites)
            decision = Decision(Action.COMPLETE, str(self.capacity), decision.keep)
        return possible(decision, situation)

    def _restructure(self, decision: Decision, wrappers: Wrappers, found: Walk) -> Survey:
        """Carry out a decision; the tracker's own state changes only when the model's has."""
        check_renewable(wrappers)
        parts = found, self.optimizer, self._schedule
        resets = Resets(self.reset_learning_rate, self.reset_optimizer_state)
        outcome = carry_out(decision, self._run, self._listening, parts, resets, self._new_search)
        renew(wrappers)
        listen_together(outcome.learners, wrappers)
        now = outcome.found.walk
        self._listening.change(now, self.optimizer, outcome.frozen, outcome.learners)
        self._parameters = outcome.parameters
        self._run.turn(decision, outcome.search)
        return outcome.found

    def _new_search(self, dendrites: int) -> Search | None:
        """Start to search for a learning rate, where that is wanted and no test is under way."""
        if self.learning_rates is None or self._run.test is not None:
            return None
        start = Waypoint.take(self.model, self.optimizer, self._schedule)
        search = Search(self.learning_rates, dendrites, self.maximize, start)
        self._schedule.scale(search.factor)
        return search

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later process needs beside the model's own state dict.

        Plain data and tensors: the history, the best networks, the optimizer's and the scheduler's
        state, and the candidates' learners. As in torch's own state dicts, tensors are references
        that training goes on to change: save them, or copy them with `copy.deepcopy`.
        """
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {
            "version": 1,
            **self._run.state_dict(),
            **self._listening.state_dict(),
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
        with undoing(self.model, self.optimizer, self._schedule):
            run = Run.from_state_dict(state, self.maximize)
            if (run.test is None) != (self._run.test is None) and not run.complete:
                was, now = ("a capacity test", "no capacity test")[:: 1 if run.test else -1]
                raise TrackerError(
                    f"the saved run was {was}, this tracker is for {now}; give it the same "
                    "test_capacity"
                )
            parameters = dict(self.model.named_parameters())
            hold(self.optimizer, parameters, self._parameters, state["groups"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["schedule"])
            for path, part in parts_of(self.model).items():
                part.perforation.draws = state["draws"].get(path, part.perforation.draws)
            if self._frozen is not None:
                restructure.thaw(self.model, self._frozen)
            if self._run.finishing or run.finishing:
                restructure.set_finishing(self.model, run.finishing)
            frozen, learners = resumed(self.model, state)
        self._parameters = parameters
        self._run = run
        wrappers = wrappers_of(self.model)
        renew(wrappers)
        listen_together(learners, wrappers)
        self._since = time.perf_counter()
        self._listening.change(self.model, self.optimizer, frozen, learners)
        last = next((e.sites for e in reversed(run.history) if e.sites), ())
        show_figures(parts_of(self.model), last)
