"""Do one run, as a generator that hands control back wherever it would wait for the device."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Generator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR

import pbfx
from benchmarks.learning.line_search import line_search
from benchmarks.learning.problem import Problem
from benchmarks.learning.task import Task
from benchmarks.learning.trainer import Ready, Trainer, evaluate, ready
from pbfx.demo.arms import PlainTracker
from pbfx.learning.scaling import scaling_batches
from pbfx.parts import parameter_count

# Steps after a change that are not captured: they load kernels, and make the optimizer's state.
_EAGER = 3
# What the stages of a row hold of a dendrite phase's last epoch: all that these do not say already.
_EPOCH_FIELDS = frozenset(
    ("number", "phase", "dendrites", "cycle", "attempt", "score", "improved", "action", "reason")
) | {"parameters", "learning_rates", "seconds"}


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a run would have ended with, had so many dendrites been its limit.

    With phases of fixed length the run up to here is the very run with that limit, so its test
    error belongs to a row of the table. It is read once, after the stage, and chooses nothing.

    Attributes:
        dendrites: per neuron of the most grown site.
        parameters: of the network; where connections of dendrites are restricted, those that
            would have to be stored.
        epochs: so far.
        best_epoch: the one that the validation split chose among all so far.
        validation_error, validation_loss, train_loss: of that epoch, errors in percent.
        test_error, test_loss: with that epoch's weights.
        phase_error, phase_loss, phase_train_loss: of this stage's own best epoch, validation.
        growth: what was known of the candidates before they became the newest dendrites.
    """

    dendrites: int
    parameters: int
    epochs: int
    best_epoch: int
    validation_error: float
    validation_loss: float
    train_loss: float
    test_error: float
    test_loss: float
    phase_error: float
    phase_loss: float
    phase_train_loss: float
    growth: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        stages: by growing number of dendrites; a plain run has one.
        curve: validation error of every epoch, in percent.
        seconds: wall time, beside other runs.
    """

    stages: tuple[Stage, ...]
    curve: tuple[float, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Figures:
    train_loss: float
    error: float
    loss: float

    def score(self, by: str) -> float:
        return -(self.error if by == "error" else self.loss)


def start(
    task: Task,
    problem: Problem,
    steps_per_graph: int = 8,
    pool: Any = None,
    own_kernels: bool = True,
) -> Generator[Ready, None, Outcome]:
    """Train and test; yield whenever there is something to wait for.

    The random streams have been seeded by the caller with the task's seed.

    Args:
        task: what to do.
        problem: its data, on the device where to compute.
        steps_per_graph: see `Trainer`.
        pool: likewise.
        own_kernels: see `Study.make_optimizer`.
    """
    begun, device = time.perf_counter(), problem.train.targets.device
    model, optimizer, tracker, eager_steps = _begin(task, device, own_kernels)
    trial = task.arm.trial
    connections = trial.connections()
    trainer = Trainer(
        model,
        optimizer,
        problem.train,
        batch_size=task.of.batch_size,
        steps=task.of.steps,
        seed=task.seed,
        steps_per_graph=steps_per_graph,
        eager_steps=eager_steps,
        pool=pool,
        after_backward=connections.renew,
    )
    figures: list[_Figures] = []
    phases: list[_Phase] = []
    stages: list[Stage] = []
    begun_at, growth = 0, None
    while not tracker.complete:
        train_loss = yield from trainer.epoch(_rows_now(task, tracker, problem))
        seen = torch.cat([train_loss[None], evaluate(model, problem.validation)])
        yield ready(device)
        figures.append(_Figures(*seen.tolist()))
        connections.close()
        saved = connections.saved(model)
        step: Any = tracker.step(figures[-1].score(task.of.score))
        epoch = tracker.history[-1]
        if not (tracker.complete or getattr(step, "restructured", False)):
            continue
        trainer.forget()
        if isinstance(tracker, pbfx.Tracker):
            connections.begin(tracker._learners)
        if epoch.phase is pbfx.Phase.DENDRITE:
            known = epoch.to_json() if isinstance(epoch, pbfx.Epoch) else {}
            growth = {k: v for k, v in known.items() if k not in _EPOCH_FIELDS}
            if trial.line_search and epoch.action == "promote":
                rows = _rows_now(task, tracker, problem)
                growth["line_search"] = yield from line_search(model, trial, problem.train, rows)
        if tracker.complete or (epoch.phase is pbfx.Phase.NEURON and epoch.action != "retry"):
            best = max(range(begun_at, len(figures)), key=lambda i: _rank(figures, i, task))
            phases.append(_Phase(best, epoch.parameters, saved))
            # The tracker has gone back to this phase's best network, or before the last phase and
            # at the end to the best of all.
            tested = evaluate(model, problem.test)
            yield ready(device)
            error, loss = tested.tolist()
            phases[-1].test = error, loss
            accepted = max(phases, key=lambda phase: _rank(figures, phase.best, task))
            if tracker.complete or epoch.action == "finish":
                size = parameter_count(model)
                same = [phase for phase in phases if phase.parameters == size]
                accepted = max(same, key=lambda phase: _rank(figures, phase.best, task))
                accepted.test = error, loss
            stages.append(_stage(figures, phases[-1], accepted, epoch.dendrites, growth))
            growth = None
        begun_at = len(figures)
    return Outcome(tuple(stages), tuple(f.error for f in figures), time.perf_counter() - begun)


def _rows_now(
    task: Task, tracker: pbfx.Tracker | PlainTracker, problem: Problem
) -> torch.Tensor | None:
    """Return the training rows of the next epoch, None for all of them; see `Arm.folds`."""
    folds = task.arm.folds
    if folds == 1 or not isinstance(tracker, pbfx.Tracker):
        return None
    learns = tracker.phase is pbfx.Phase.DENDRITE
    if not learns and tracker.dendrites >= tracker.max_dendrites:
        return None
    spare, device = tracker.dendrites % folds, problem.train.targets.device
    parts = [
        torch.arange(fold, len(problem.train), folds, device=device)
        for fold in range(folds)
        if (fold == spare) == learns
    ]
    return torch.cat(parts)


@dataclasses.dataclass
class _Phase:
    """A neuron phase: its best epoch, its network's parameters, and the test figures.

    `saved` of the parameters would not have to be stored.
    """

    best: int
    parameters: int
    saved: int
    test: tuple[float, float] = (math.nan, math.nan)


def _rank(figures: list[_Figures], index: int, task: Task) -> tuple[float, int]:
    """Order epochs as trackers do: by score, and of equals the first is best."""
    return figures[index].score(task.of.score), -index


def _stage(
    figures: list[_Figures],
    phase: _Phase,
    accepted: _Phase,
    dendrites: int,
    growth: dict[str, Any] | None,
) -> Stage:
    own, best = figures[phase.best], figures[accepted.best]
    return Stage(
        dendrites=dendrites,
        parameters=accepted.parameters - accepted.saved,
        epochs=len(figures),
        best_epoch=accepted.best + 1,
        validation_error=best.error,
        validation_loss=best.loss,
        train_loss=best.train_loss,
        test_error=accepted.test[0],
        test_loss=accepted.test[1],
        phase_error=own.error,
        phase_loss=own.loss,
        phase_train_loss=own.train_loss,
        growth=growth,
    )


def _begin(
    task: Task, device: torch.device, own_kernels: bool
) -> tuple[nn.Module, Optimizer, pbfx.Tracker | PlainTracker, int]:
    """Return model, optimizer, tracker, and how many steps of a phase cannot be captured."""
    study, arm = task.of, task.arm
    net = task.build().to(device)
    if arm.mode is None:
        optimizer = study.make_optimizer(net.parameters(), device, own_kernels)
        gamma = study.gamma ** (task.neuron_epochs / task.epochs)
        scheduler = StepLR(optimizer, 1, gamma)
        return net, optimizer, PlainTracker(net, optimizer, scheduler, epochs=task.epochs), _EAGER
    config = arm.config(task.include, study.config, task.seed)
    model = pbfx.transform(net, config)
    optimizer = study.make_optimizer(model.parameters(), device, own_kernels)
    # The rate falls by as much in every arm's neuron phase, however long that is.
    gamma = study.gamma ** (task.neuron_epochs / task.phase_epochs)
    settings: dict[str, Any] = {"max_dendrites": task.dendrites}
    settings |= arm.tracker_settings(task.phase_epochs, task.dendrite_epochs)
    tracker = pbfx.Tracker(model, optimizer, StepLR(optimizer, 1, gamma), **settings)
    # Candidates behind a norm are scaled once, by steps that no graph can hold.
    scaling = max(scaling_batches(config, grown) for grown in range(max(task.dendrites, 1)))
    return model, optimizer, tracker, _EAGER + scaling
