"""Rates and schedules: stepped by one side only, and returned to their start at every growth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lrs

import pbfx
from learning.loops import Mlp, enter_dendrite_phase, regression, sgd
from pbfx import TrackerError

TASK = regression(96)
BATCHES = 3

PER_EPOCH: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda o: lrs.StepLR(o, 2, 0.5),
    "multistep": lambda o: lrs.MultiStepLR(o, [1, 3], 0.3),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.7),
    "constant": lambda o: lrs.ConstantLR(o, 0.5, 2),
    "linear": lambda o: lrs.LinearLR(o, 0.1, 1.0, 3),
    "polynomial": lambda o: lrs.PolynomialLR(o, 5),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 5),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 2, 2),
    "lambda": lambda o: lrs.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda epoch: 0.9),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, 1.0, 2), lrs.CosineAnnealingLR(o, 4)], [2]
    ),
    "chained": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.1, 2), lrs.ExponentialLR(o, 0.9)]
    ),
    "nested": lambda o: lrs.ChainedScheduler(
        [
            lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.5, 1), lrs.ExponentialLR(o, 0.9)], [1]),
            lrs.ExponentialLR(o, 0.9),
        ]
    ),
}


def scheduled(make: Callable[[Optimizer], Any], **settings: object):
    torch.manual_seed(0)
    model = pbfx.transform(Mlp())
    optimizer = sgd(model)
    scheduler = make(optimizer)
    return model, optimizer, scheduler, pbfx.Tracker(model, optimizer, scheduler, **settings)


def epoch(
    model: nn.Module,
    optimizer: Optimizer,
    tracker: pbfx.Tracker,
    score: float,
    per_batch: Any = None,
) -> list[tuple[float, float]]:
    """Train an epoch; return the rate and the momentum that each batch used."""
    used = []
    for _ in range(BATCHES):
        optimizer.zero_grad()
        TASK.loss_of(model).backward()
        group = optimizer.param_groups[0]
        used.append((float(group["lr"]), float(group["momentum"])))
        optimizer.step()
        if per_batch is not None:
            per_batch.step()
    tracker.step(score)
    return used


def alone(
    make: Callable[[Optimizer], Any], epochs: int, per_batch: bool = False
) -> list[list[tuple[float, float]]]:
    """Return what the schedule does by itself, on an optimizer that no one else touches."""
    optimizer = sgd(Mlp())
    scheduler = make(optimizer)
    used = []
    for _ in range(epochs):
        used.append([])
        for _ in range(BATCHES):
            group = optimizer.param_groups[0]
            used[-1].append((float(group["lr"]), float(group["momentum"])))
            optimizer.step()
            if per_batch:
                scheduler.step()
        if not per_batch:
            scheduler.step()
    return used


@pytest.mark.parametrize("name", PER_EPOCH)
def test_epoch_schedules_are_stepped_once_and_start_again(name: str) -> None:
    make = PER_EPOCH[name]
    model, optimizer, scheduler, tracker = scheduled(
        make, policy=pbfx.Interval(4, 2), max_dendrites=2
    )
    expected = alone(make, 4)
    assert len({rate for batch in expected for rate, _ in batch}) > 1
    for phase in range(5):
        length = 2 if phase % 2 else 4
        used = [epoch(model, optimizer, tracker, 0.0) for _ in range(length)]
        # In a dendrite phase nothing is stepped: its rate is that of the start.
        assert used == (expected if length == 4 else [expected[0]] * 2)
        assert scheduler.optimizer is optimizer if hasattr(scheduler, "optimizer") else True
    rates = [e.learning_rates for e in tracker.history]
    assert [rate for (rate,) in rates[:4]] == [batches[0][0] for batches in expected]
    assert tracker.complete


PER_BATCH: dict[str, Callable[[Optimizer], Any]] = {
    "one cycle": lambda o: lrs.OneCycleLR(o, 0.5, epochs=4, steps_per_epoch=BATCHES),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=True),
    "cosine by batch": lambda o: lrs.CosineAnnealingLR(o, 4 * BATCHES),
    "warm-up by batch": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, 1.0, 4), lrs.ExponentialLR(o, 0.9)], [4]
    ),
}


@pytest.mark.parametrize("stepping", ["auto", "batch"])
@pytest.mark.parametrize("name", PER_BATCH)
def test_batch_schedules_stay_in_the_hands_of_the_loop(name: str, stepping: str) -> None:
    make = PER_BATCH[name]
    model, optimizer, scheduler, tracker = scheduled(
        make, policy=pbfx.Interval(4, 2), max_dendrites=2, scheduler_steps=stepping
    )
    expected = alone(make, 4, per_batch=True)
    assert len({rate for batch in expected for rate, _ in batch}) > 2
    for phase in range(5):
        length = 2 if phase % 2 else 4
        for index in range(length):
            used = epoch(model, optimizer, tracker, 0.0, per_batch=scheduler)
            # The loop steps it in dendrite phases too; promotion returns it once more.
            assert used == expected[index], (phase, index)
    assert tracker.complete


def test_reset_returns_momentum_too() -> None:
    make = PER_BATCH["one cycle"]
    model, optimizer, scheduler, tracker = scheduled(make, policy=pbfx.Interval(2, 9))
    start = dict(optimizer.param_groups[0])
    for _ in range(2):
        epoch(model, optimizer, tracker, 0.0, per_batch=scheduler)
    now = optimizer.param_groups[0]
    assert tracker.phase is pbfx.Phase.DENDRITE
    for key in ("lr", "initial_lr", "momentum", "max_lr", "min_lr", "max_momentum"):
        assert now[key] == start[key], key


def test_no_reset_on_request() -> None:
    make = PER_EPOCH["exponential"]
    model, optimizer, _, tracker = scheduled(
        make, policy=pbfx.Interval(2, 1), max_dendrites=1, reset_learning_rate=False
    )
    used = [epoch(model, optimizer, tracker, 0.0)[0][0] for _ in range(5)]
    # The schedule goes on where it was; the call that restructures does not step it.
    assert used == pytest.approx([0.05, 0.035, 0.035, 0.035, 0.0245])


def test_rates_are_reset_without_a_scheduler_too() -> None:
    model, optimizer, _, tracker = scheduled(lambda _: None, policy=pbfx.Interval(2, 1))
    epoch(model, optimizer, tracker, 0.0)
    optimizer.param_groups[0]["lr"] = 0.001
    epoch(model, optimizer, tracker, 0.0)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert tracker.history[1].learning_rates == (0.001,)


def test_completion_leaves_the_rates_alone() -> None:
    model, optimizer, scheduler, tracker = scheduled(
        PER_EPOCH["exponential"], policy=pbfx.Interval(3), max_dendrites=0
    )
    for _ in range(3):
        epoch(model, optimizer, tracker, 0.0)
    assert tracker.complete
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.7**2)
    assert scheduler.last_epoch == 2


def test_reduce_on_plateau_gets_the_score() -> None:
    model, optimizer, scheduler, tracker = scheduled(
        lambda o: lrs.ReduceLROnPlateau(o, mode="max", factor=0.5, patience=1),
        policy=pbfx.Interval(6, 1),
        max_dendrites=1,
    )
    scores = [0.1, 0.5, 0.4, 0.4, 0.6, 0.6]
    used = [epoch(model, optimizer, tracker, score)[0][0] for score in scores]
    assert used == [0.05] * 4 + [0.025] * 2
    # Growth returns its memory as well as the rate.
    assert scheduler.best == -torch.inf
    assert scheduler.num_bad_epochs == 0
    assert optimizer.param_groups[0]["lr"] == 0.05
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "step", lambda *_: pytest.fail("stepped in a dendrite phase"))
        epoch(model, optimizer, tracker, 0.9)
    epoch(model, optimizer, tracker, 0.3)
    assert scheduler.best == 0.3


def test_epoch_on_request_is_stepped_though_the_loop_does_too() -> None:
    model, optimizer, scheduler, tracker = scheduled(
        PER_EPOCH["exponential"], scheduler_steps="epoch"
    )
    for _ in range(2):
        epoch(model, optimizer, tracker, 0.0, per_batch=scheduler)
    assert scheduler.last_epoch == 2 * BATCHES + 2


def test_auto_finds_out_at_the_first_call_and_remembers() -> None:
    model, optimizer, scheduler, tracker = scheduled(PER_EPOCH["exponential"])
    epoch(model, optimizer, tracker, 0.0, per_batch=scheduler)
    assert scheduler.last_epoch == BATCHES
    # An epoch in which the loop skips it (a scaler found no finite gradient) is not ours to fill.
    epoch(model, optimizer, tracker, 0.0)
    assert scheduler.last_epoch == BATCHES


def test_a_step_of_the_scheduler_before_the_tracker_was_made_is_its_start() -> None:
    torch.manual_seed(0)
    model = pbfx.transform(Mlp())
    optimizer = sgd(model)
    scheduler = lrs.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    tracker = enter_dendrite_phase(model, optimizer, scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert scheduler.last_epoch == 1
    assert tracker._schedule.stepping == "auto"


class NoMemory:
    def step(self) -> None: ...


@pytest.mark.parametrize(
    ("make", "stepping", "message"),
    [
        (
            lambda _: lrs.StepLR(sgd(Mlp()), 1),
            "auto",
            r"scheduler \(StepLR\) steps another optimizer than the one given",
        ),
        (
            lambda _: lrs.ChainedScheduler([lrs.StepLR(sgd(Mlp()), 1)]),
            "auto",
            r"scheduler \(ChainedScheduler\) steps another optimizer than the one given",
        ),
        (
            lambda _: NoMemory(),
            "auto",
            r"with step\(\), state_dict\(\) and load_state_dict\(\), got NoMemory",
        ),
        (lambda _: 0.1, "auto", r"must be a learning-rate scheduler .*, got float"),
        (
            PER_EPOCH["step"],
            "sometimes",
            "scheduler_steps must be 'auto', 'epoch' or 'batch', got 'sometimes'",
        ),
    ],
)
def test_schedulers_that_do_not_belong(
    make: Callable[[Optimizer], Any], stepping: str, message: str
) -> None:
    with pytest.raises(TrackerError, match=message):
        scheduled(make, scheduler_steps=stepping)
