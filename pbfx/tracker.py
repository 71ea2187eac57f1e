"""Watch validation scores, and restructure when the policy says so."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pbfx import checkpoint, restructure
from pbfx.errors import TrackerError
from pbfx.history import Epoch, Step, finite_score, write_csv
from pbfx.learning import SiteLearner, hold_older
from pbfx.optimizers import Schedule, Stepping
from pbfx.parts import parameter_count, parts_of
from pbfx.phase import Phase
from pbfx.policy import (
    Action,
    Decision,
    Plateau,
    PolicyLike,
    Situation,
    asked,
    fault_of,
    finished,
    possible,
)
from pbfx.restructure import Frozen
from pbfx.settings import PerDendrite, at
from pbfx.snapshot import Snapshot
from pbfx.undo import undoing

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
        directory: where to write `last.safetensors` (to resume), `best.safetensors` and
            `history.csv` at every call; None writes nothing.

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
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        # torch.compile returns a wrapper around the module that it was given; that one is
        # restructured.
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.optimizer = optimizer
        self.policy: PolicyLike = Plateau() if policy is None else policy
        self.max_dendrites, self.maximize = max_dendrites, maximize
        self._check_parts()
        self._schedule = Schedule(optimizer, scheduler, scheduler_steps)
        self.reset_learning_rate = reset_learning_rate
        self.reset_optimizer_state = reset_optimizer_state
        self.directory = None if directory is None else _folder(directory)

        self.complete = False
        self.history: tuple[Epoch, ...] = ()
        self._cycle = self._attempt = 0
        self._finishing = False
        self._best: Snapshot | None = None
        self._current: Snapshot | None = None
        self._frozen: Frozen | None = None
        self._learners: dict[str, SiteLearner] = {}
        self._holds: list[RemovableHandle] = hold_older(self.model, self.optimizer)
        # The parameters that the optimizer was last brought in line with.
        self._parameters = dict(self.model.named_parameters())
        self._token = object()
        for part in parts_of(self.model).values():
            part.perforation.tracker = self._token

    def _check_parts(self) -> None:
        parts = parts_of(self.model)
        if not isinstance(self.optimizer, Optimizer):
            raise TrackerError(
                f"optimizer must be a torch.optim.Optimizer, got {type(self.optimizer).__name__}"
            )
        if fault := fault_of(self.policy):
            raise TrackerError(fault)
        count = self.max_dendrites
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise TrackerError(f"max_dendrites must be a whole number of at least 0, got {count!r}")
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if trainable and not any(id(p) in held for p in trainable):
            raise TrackerError(
                "the optimizer holds none of the model's parameters; make it from the transformed "
                "model: optimizer = torch.optim.SGD(model.parameters(), ...)"
            )
        configs = [part.perforation.config for part in parts.values()]
        if isinstance(self.optimizer, torch.optim.Muon) and any(c.trains_stacks for c in configs):
            raise TrackerError(
                "Muon steps matrices only, and the weights of dendrites, which "
                f"tuning={configs[0].tuning!r} with finish={configs[0].finish} trains, are stacks "
                "of them; use another optimizer, or tuning='links' with finish=False"
            )
        for path, part in parts.items():
            if part.perforation.phase is Phase.DENDRITE:
                raise TrackerError(
                    f"the perforated part {path or type(part).__name__!r} is in its dendrite "
                    "phase; to resume a run, make the tracker on the plain transformed model, "
                    "then pbfx.load"
                )

    @property
    def phase(self) -> Phase:
        """Who learns now."""
        return Phase.DENDRITE if self._learners else Phase.NEURON

    @property
    def dendrites(self) -> int:
        """Dendrites per neuron of the most grown site."""
        parts = parts_of(self.model).values()
        return max(part.structure().dendrites for part in parts)

    @property
    def best_score(self) -> float | None:
        """Best validation score of a neuron phase so far."""
        scores = [epoch.score for epoch in self.history if epoch.phase is Phase.NEURON]
        return None if not scores else max(scores) if self.maximize else min(scores)

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
            return self._result(False, False, "training is already complete")
        for part in parts_of(self.model).values():
            if part.perforation.tracker is not self._token:
                raise TrackerError("another tracker has been made for this model; use that one")
        self._schedule.observe()
        phase, best = self.phase, self.best_score
        improved = phase is Phase.NEURON and (best is None or self._better(value, best))
        if phase is Phase.NEURON and (
            self._current is None or self._better(value, self._current.score)
        ):
            self._current = Snapshot.take(self.model, value)
        candidate_score = self._measure()
        situation = self._situation(value, candidate_score)
        decision = self._decide(situation)
        self._record(value, improved, candidate_score, decision)
        if improved:
            # Before growing: the file is to hold the network that scored.
            self._write_best()
        if decision.action is Action.CONTINUE:
            if phase is Phase.NEURON:
                self._schedule.step(value)
        else:
            self._restructure(decision)
            logger.info("%s", decision.reason)
        if self.complete:
            self._write_best()
        self._write_last()
        return self._result(decision.action is not Action.CONTINUE, improved, decision.reason)

    def _better(self, new: float, old: float) -> bool:
        return new > old if self.maximize else new < old

    def _result(self, restructured: bool, improved: bool, reason: str) -> Step:
        return Step(restructured, self.complete, self.phase, self.dendrites, improved, reason)

    def _decide(self, situation: Situation) -> Decision:
        decision = asked(self.policy, situation)
        if isinstance(decision, Decision):
            wanted = any(p.perforation.config.finish for p in parts_of(self.model).values())
            kept = self._kept(decision)
            grown = kept is not None and kept.structure.dendrites > 0
            decision = finished(decision, situation, wanted and grown)
        return possible(decision, situation)

    def _kept(self, decision: Decision) -> Snapshot | None:
        """Return the network that is accepted from now on."""
        return self._current if decision.keep and self._current is not None else self._best

    def _measure(self) -> float | None:
        """Close the epoch of every learner; return the mean score over sites."""
        if not self._learners:
            return None
        if not any(learner.batches for learner in self._learners.values()):
            warnings.warn(
                "pbfx: no error has reached any candidate since the dendrite phase began; the "
                "training loop must call loss.backward() on the model's output in this phase too",
                stacklevel=3,
            )
        measured = [learner.measure() for learner in self._learners.values()]
        known = [score for score in measured if score is not None]
        return sum(known) / len(known) if known else None

    def _situation(self, score: float, candidate_score: float | None) -> Situation:
        now = [epoch for epoch in self.history if epoch.cycle == self._cycle]
        return Situation(
            phase=self.phase,
            scores=(*(epoch.score for epoch in now), score),
            candidate_scores=(*(epoch.candidate_score for epoch in now), candidate_score),
            dendrites=self.dendrites,
            max_dendrites=self.max_dendrites,
            attempt=self._attempt,
            accepted=None if self._best is None else self._best.score,
            maximize=self.maximize,
            finishing=self._finishing,
        )

    def _record(
        self, score: float, improved: bool, candidate_score: float | None, decision: Decision
    ) -> None:
        self.history += (
            Epoch(
                number=len(self.history) + 1,
                phase=self.phase,
                dendrites=self.dendrites,
                cycle=self._cycle,
                attempt=self._attempt,
                score=score,
                improved=improved,
                action=decision.action,
                reason=decision.reason,
                candidate_score=candidate_score,
                parameters=parameter_count(self.model),
                learning_rates=tuple(float(group["lr"]) for group in self.optimizer.param_groups),
            ),
        )

    def _restructure(self, decision: Decision) -> None:
        """Carry out a decision; the tracker's own state changes only when the model's has."""
        kept = self._kept(decision)
        source = self._current if decision.action is Action.GROW else kept
        frozen, learners = None, {}
        # Promotion makes new tensors; all else returns to a snapshot, which is copied into old
        # ones.
        values = decision.action is not Action.PROMOTE
        with restructure.restructuring(self.model, self.optimizer, self._schedule, values=values):
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
                elif decision.action is not Action.COMPLETE:
                    frozen, learners = self._grow()
            if decision.action is not Action.COMPLETE:
                if at(self.reset_learning_rate, self.dendrites):
                    self._schedule.reset()
                if at(self.reset_optimizer_state, self.dendrites):
                    self.optimizer.state.clear()
        self._listen(frozen, learners)
        self._parameters = dict(self.model.named_parameters())
        self._cycle += 1
        self._current = None
        if decision.action is Action.RETRY:
            self._attempt += 1
        elif decision.action in (Action.GROW, Action.FINISH):
            self._attempt, self._best = 0, kept
            self._finishing = decision.action is Action.FINISH
        elif decision.action is Action.COMPLETE:
            self.complete, self._best, self._finishing = True, kept, False

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
        if all(part.perforation.config.learning == "gradient" for part in parts):
            for part in parts:
                restructure.grow_part(part, 1, {site.name for site in part.perforation.sites})
            return None, {}
        return restructure.start_dendrite_phase(self.model)

    def _write_best(self) -> None:
        if self.directory is not None:
            checkpoint.save(self.model, self.directory / "best.safetensors")

    def _write_last(self) -> None:
        if self.directory is not None:
            checkpoint.save(self.model, self.directory / "last.safetensors", self)
            write_csv(self.history, self.directory / "history.csv")

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
            best, current = (
                None if state[key] is None else Snapshot.from_state_dict(state[key])
                for key in ("best", "current")
            )
            parameters = dict(self.model.named_parameters())
            self._hold(parameters, state["groups"])
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
        self._cycle, self._attempt = state["cycle"], state["attempt"]
        self._finishing = state.get("finishing", False)
        self._best, self._current = best, current
        self._listen(frozen, learners)

    def _hold(self, parameters: dict[str, nn.Parameter], names: list[list[str | None]]) -> None:
        """Fill the optimizer's groups with the parameters that `names` lists.

        `None` stands for a parameter that is not the model's (a criterion's, say); those keep their
        order among themselves.
        """
        groups = self.optimizer.param_groups
        ours = {id(p) for p in (*parameters.values(), *self._parameters.values())}
        foreign = [[p for p in group["params"] if id(p) not in ours] for group in groups]
        unknown = sorted({n for group in names for n in group if n is not None} - parameters.keys())
        fault = None
        if unknown:
            fault = f"the model has no parameter {unknown[0]!r}; load its state dict first"
        elif len(groups) != len(names):
            fault = f"the optimizer has {len(groups)} parameter groups, not {len(names)}"
        elif [len(rest) for rest in foreign] != [group.count(None) for group in names]:
            fault = "the optimizer's groups hold another number of parameters from elsewhere"
        if fault:
            raise TrackerError(f"the saved tracker does not fit: {fault}")
        for group, rest, wanted in zip(groups, foreign, names, strict=True):
            others = iter(rest)
            group["params"][:] = [next(others) if n is None else parameters[n] for n in wanted]


def _folder(directory: str | os.PathLike[str]) -> Path:
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackerError(f"directory {folder} cannot be made: {error}") from error
    return folder
