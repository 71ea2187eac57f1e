"""The arms of the comparison, and what each does between two epochs.

The training loop is one and the same (`study.py`); an arm is a model with something that has
`step(score)`: pbfx's tracker, or for the plain arm `PlainTracker`, which only steps the schedule
and keeps the best weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR

import pbfx
from pbfx.demo.recipes import Recipe
from pbfx.demo.settings import Settings
from pbfx.parts import parameter_count
from pbfx.wording import counted


@dataclass(frozen=True)
class Arm:
    """One way to train the same net. `learning` is pbfx's mode, or None for the net as it is."""

    name: str
    learning: Literal["perforated", "gradient", "sham"] | None


PLAIN = Arm("plain", None)
SHAM = Arm("sham", "sham")
DENDRITIC = Arm("dendritic", "perforated")
ARMS = (PLAIN, SHAM, DENDRITIC)


class Tracking(Protocol):
    """What the training loop needs between two epochs."""

    @property
    def complete(self) -> bool:
        """Say whether training is over."""
        ...

    @property
    def history(self) -> Sequence[Any]:
        """Return one record an epoch, with the names of `pbfx.Epoch`."""
        ...

    def step(self, score: float, /) -> Any:
        """Take the validation score of the epoch just trained."""
        ...


@dataclass(frozen=True)
class PlainEpoch:
    """One epoch of a plain run, with the names that `pbfx.Epoch` has."""

    number: int
    score: float
    improved: bool
    parameters: int
    learning_rates: tuple[float, ...]
    action: str
    reason: str
    phase: pbfx.Phase = pbfx.Phase.NEURON
    dendrites: int = 0
    cycle: int = 0
    attempt: int = 0
    candidate_score: float | None = None


class PlainTracker:
    """Count epochs, step the schedule after each, and end with the best epoch's weights."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, *, epochs: int
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._epochs = epochs
        self._parameters = parameter_count(model)
        self._best_score = -math.inf
        self._best_state: dict[str, Any] = {}
        self._history: list[PlainEpoch] = []

    @property
    def complete(self) -> bool:
        """Say whether all epochs are over."""
        return len(self._history) >= self._epochs

    @property
    def history(self) -> tuple[PlainEpoch, ...]:
        """Return one record an epoch."""
        return tuple(self._history)

    def step(self, score: float, /) -> PlainEpoch:
        """Record the validation `score` of the epoch just trained, the higher the better."""
        if not math.isfinite(score):
            raise ValueError(f"a score must be a finite number, got {score!r}")
        rates = tuple(float(group["lr"]) for group in self._optimizer.param_groups)
        improved = score > self._best_score
        if improved:
            self._best_score = score
            self._best_state = copy.deepcopy(self._model.state_dict())
        self._scheduler.step()
        last = len(self._history) + 1 >= self._epochs
        over = counted(self._epochs, "epoch is over", "epochs are over")
        self._history.append(
            PlainEpoch(
                number=len(self._history) + 1,
                score=score,
                improved=improved,
                parameters=self._parameters,
                learning_rates=rates,
                action="complete" if last else "continue",
                reason=over if last else "a fixed number of epochs",
            )
        )
        if last:
            self._model.load_state_dict(self._best_state)
        return self._history[-1]


def begin(
    arm: Arm, net: nn.Module, recipe: Recipe, settings: Settings, seed: int
) -> tuple[nn.Module, Optimizer, Tracking]:
    """Return the model, optimizer and tracker with which `arm` trains `net`.

    The rate falls to the same share of its first value in every arm: over one neuron phase where
    phases restart it, over the whole run where nothing does. So the plain arm has one long
    schedule, and as many epochs.
    """
    if arm.learning is None:
        optimizer = recipe.optimizer(net.parameters())
        scheduler = falling(optimizer, recipe.final_rate, settings.epochs)
        return net, optimizer, PlainTracker(net, optimizer, scheduler, epochs=settings.epochs)
    config = pbfx.Config(
        learning=arm.learning,
        activation="tanh",
        candidates=4,
        candidate_lr=recipe.candidate_lr,
        seed=seed,
    )
    model = pbfx.transform(net, config)
    optimizer = recipe.optimizer(model.parameters())
    scheduler = falling(optimizer, recipe.final_rate, settings.neuron_epochs)
    policy = pbfx.Interval(
        neuron_epochs=settings.neuron_epochs, dendrite_epochs=settings.dendrite_epochs
    )
    tracker = pbfx.Tracker(
        model,
        optimizer,
        scheduler,
        policy=policy,
        max_dendrites=settings.dendrites,
        maximize=True,
    )
    return model, optimizer, tracker


def falling(optimizer: Optimizer, final_rate: float, epochs: int) -> LRScheduler:
    """Return a schedule that takes the rate down to `final_rate` of itself in equal factors."""
    return StepLR(optimizer, step_size=1, gamma=final_rate ** (1 / epochs))
