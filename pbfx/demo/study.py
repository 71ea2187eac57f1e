"""The study: every arm from the same weights, over the same batches; each run is tested once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from pbfx.demo.arms import ARMS, Arm, begin
from pbfx.demo.data import Digits, Split
from pbfx.demo.recipes import Recipe
from pbfx.demo.settings import Settings
from pbfx.parts import parameter_count

EVALUATION_BATCH = 2_000
"""Images a forward pass without gradients: large for speed, small enough for the CPU's memory."""


@dataclass(frozen=True)
class EpochRow:
    """One trained epoch, as `history.csv` has it; rates of several groups are joined by spaces."""

    arm: str
    seed: int
    epoch: int
    phase: str
    dendrites: int
    cycle: int
    attempt: int
    train_loss: float
    validation_accuracy: float
    improved: bool
    action: str
    candidate_score: float | None
    parameters: int
    learning_rates: str
    seconds: float
    reason: str


@dataclass(frozen=True)
class Run:
    """One finished run. `test_accuracy` was read once, with the weights of `best_epoch`."""

    arm: str
    seed: int
    test_accuracy: float
    validation_accuracy: float
    best_epoch: int
    parameters: int
    epochs: int
    seconds: float
    history: tuple[EpochRow, ...]

    @property
    def error(self) -> float:
        """Return the test error in percent."""
        return 100 * (1 - self.test_accuracy)

    @property
    def candidate_scores(self) -> tuple[float | None, ...]:
        """Return the candidates' held-out score at the end of each dendrite phase."""
        rows = self.history
        return tuple(
            row.candidate_score
            for row, after in zip(rows, (*rows[1:], None), strict=True)
            if row.phase == "dendrite" and (after is None or after.phase != "dendrite")
        )


def run_study(
    data: Digits,
    recipe: Recipe,
    settings: Settings,
    *,
    device: torch.device,
    arms: Sequence[Arm] = ARMS,
    on_epoch: Callable[[EpochRow], None] = lambda row: None,
) -> list[Run]:
    """Train every arm with every seed and return the runs, arm by arm in the order given.

    The global random streams and torch's number of threads are left as they were found.
    """
    data = data.to(device)
    with _threads(recipe.threads):
        runs = [
            run_arm(arm, seed, data, recipe, settings, device=device, on_epoch=on_epoch)
            for seed in range(settings.first_seed, settings.first_seed + settings.seeds)
            # The slowest arm first: the time left is then promised too long, never too short.
            for arm in reversed(arms)
        ]
    order = [arm.name for arm in arms]
    return sorted(runs, key=lambda run: (order.index(run.arm), run.seed))


def run_arm(
    arm: Arm,
    seed: int,
    data: Digits,
    recipe: Recipe,
    settings: Settings,
    *,
    device: torch.device,
    on_epoch: Callable[[EpochRow], None] = lambda row: None,
) -> Run:
    """Train one arm with one seed, which fixes the initial weights and the order of the batches."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        net = recipe.net(settings.width).to(device)
        batches = torch.Generator().manual_seed(seed)
        model, optimizer, tracker = begin(arm, net, recipe, settings, seed)
        rows: list[EpochRow] = []
        started = time.perf_counter()
        while not tracker.complete:
            epoch_started = time.perf_counter()
            loss = train_epoch(model, optimizer, data.train, settings.batch_size, batches)
            score = accuracy(model, data.validation)
            tracker.step(score)
            epoch = tracker.history[-1]
            rows.append(
                EpochRow(
                    arm=arm.name,
                    seed=seed,
                    epoch=len(rows) + 1,
                    phase=epoch.phase.name.lower(),
                    dendrites=epoch.dendrites,
                    cycle=epoch.cycle,
                    attempt=epoch.attempt,
                    train_loss=loss,
                    validation_accuracy=score,
                    improved=epoch.improved,
                    action=epoch.action,
                    candidate_score=epoch.candidate_score,
                    parameters=epoch.parameters,
                    learning_rates=" ".join(f"{rate:.3g}" for rate in epoch.learning_rates),
                    seconds=time.perf_counter() - epoch_started,
                    reason=epoch.reason,
                )
            )
            on_epoch(rows[-1])
        seconds = time.perf_counter() - started
        best = max(rows, key=lambda row: row.validation_accuracy)
        return Run(
            arm=arm.name,
            seed=seed,
            test_accuracy=accuracy(model, data.test),
            validation_accuracy=best.validation_accuracy,
            best_epoch=best.epoch,
            parameters=parameter_count(model),
            epochs=len(rows),
            seconds=seconds,
            history=tuple(rows),
        )


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    split: Split,
    batch_size: int,
    generator: torch.Generator,
) -> float:
    """Train one epoch over batches drawn by `generator`; return the mean loss."""
    model.train()
    total = torch.zeros((), device=split.labels.device)
    for rows in shuffled(len(split), batch_size, generator, split.labels.device):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(split.images[rows]), split.labels[rows])
        loss.backward()
        optimizer.step()
        # Summed on the device: one read an epoch instead of one a step.
        total += loss.detach() * len(rows)
    return float(total) / len(split)


def shuffled(
    count: int, batch_size: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, ...]:
    """Return the rows of each batch of one epoch, in an order that is the same on every device."""
    return torch.randperm(count, generator=generator).to(device).split(batch_size)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of `split` that `model` names rightly."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    for images, labels in zip(
        split.images.split(EVALUATION_BATCH), split.labels.split(EVALUATION_BATCH), strict=True
    ):
        right += (model(images).argmax(1) == labels).sum()
    return int(right) / len(split)
