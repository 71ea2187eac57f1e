"""The learning studies on a CUDA device: captured steps train as eager ones, alone and in lanes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch.optim import Adadelta

from benchmarks.learning import lanes, studies
from benchmarks.learning.adadelta import FusedAdadelta
from benchmarks.learning.arms import arm_named
from benchmarks.learning.lane import Lane
from benchmarks.learning.nets import LETTERS
from benchmarks.learning.problem import Problem, Split
from benchmarks.learning.run import Outcome, start
from benchmarks.learning.task import Task
from benchmarks.learning.trainer import Trainer

pytestmark = pytest.mark.gpu

STEPS = 29
CUDA = torch.device("cuda:0")


def task(study: str, arm: str, seed: int = 0, dendrites: int = 1) -> Task:
    of = studies.STUDIES[study]
    return Task(study, arm_named(arm, of.selections), 0.1, seed, 2, 2, dendrites)


def problem(data: str) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        if data == "tiny_shakespeare":
            codes = torch.randint(0, LETTERS, (count + 64,), generator=generator)
            # Every letter follows from the one before it, mostly.
            codes[1::2] = (codes[0::2][: len(codes[1::2])] + 1) % LETTERS
            views = codes.unfold(0, 65, 1)
            return Split(views[:, :-1], views[:, 1:])
        targets = torch.randint(0, 10, (count,), generator=generator)
        images = torch.randn(count, 1, 28, 28, generator=generator)
        images[torch.arange(count), 0, targets] += 1.0
        return Split(images, targets)

    return Problem(data, split(2000), split(500), split(500)).to(CUDA)


@pytest.fixture(autouse=True)
def comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    # Captured and eager steps must choose the same algorithms, and sum in the same order.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name, study in studies.STUDIES.items():
        changed = dataclasses.replace(study, steps=STEPS, batch_size=32)
        monkeypatch.setitem(studies.STUDIES, name, changed)


def finish(jobs: list[Task], data: Problem, per_graph: int, count: int = 1) -> list[Outcome]:
    waiting: Iterator[Task | None] = iter([*jobs, *[None] * count])
    found = {}
    for ended in lanes.run_all(
        waiting.__next__, lambda t, pool: start(t, data, per_graph, pool), count, CUDA
    ):
        assert ended.outcome is not None, ended.fault
        found[ended.task.key] = ended.outcome
    return [found[job.key] for job in jobs]


def close(one: Outcome, other: Outcome) -> None:
    assert one.curve[0] == pytest.approx(other.curve[0], abs=0.5)
    for mine, theirs in zip(one.stages, other.stages, strict=True):
        assert mine.dendrites == theirs.dendrites
        assert mine.phase_train_loss == pytest.approx(theirs.phase_train_loss, rel=2e-2)
        assert mine.phase_loss == pytest.approx(theirs.phase_loss, rel=3e-2)


@pytest.mark.parametrize("study", ["mnist", "shakespeare"])
@pytest.mark.parametrize("arm", ["plain", "perforated", "gradient"])
def test_captured_runs_are_eager_runs(study: str, arm: str) -> None:
    data, job = problem(studies.STUDIES[study].data), task(study, arm)
    [eager] = finish([job], data, 0)
    for per_graph in (1, 8):
        [captured] = finish([job], data, per_graph)
        close(captured, eager)
    # The other seed is farther away than a capture may be.
    [other] = finish([task(study, arm, seed=1)], data, 0)
    assert other.stages[0].phase_train_loss != eager.stages[0].phase_train_loss


@pytest.mark.parametrize(
    "arm",
    [
        "perforated[trial.groups=4]",
        "perforated[trial.rank=2]",
        "perforated[trial.line_search=both]",
    ],
)
def test_captured_trials_are_eager_trials(arm: str) -> None:
    data, job = problem("mnist"), task("ablations", arm)
    [eager] = finish([job], data, 0)
    [captured] = finish([job], data, 8)
    close(captured, eager)


def test_lanes_do_not_mix() -> None:
    data = problem("mnist")
    jobs = [task("mnist", arm, seed) for seed in (0, 1) for arm in ("plain", "perforated", "sham")]
    together = finish(jobs, data, 4, count=4)
    for job, outcome in zip(jobs, together, strict=True):
        [alone] = finish([job], data, 4)
        close(outcome, alone)


class Noisy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(784, 10)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.dropout(images.flatten(1)))


def noisy_trainer(
    per_graph: int, seed: int, lane: Lane, kind: type[Adadelta] = Adadelta
) -> tuple[Trainer, torch.Tensor]:
    torch.manual_seed(0)
    model = Noisy().to(CUDA)
    rate = torch.tensor(0.1, device=CUDA)
    optimizer = kind(model.parameters(), lr=rate, capturable=True)
    lane.seed(seed)
    split = problem("mnist").train
    trainer = Trainer(
        model,
        optimizer,
        split,
        batch_size=32,
        seed=0,
        steps=STEPS,
        steps_per_graph=per_graph,
        pool=lane.pool,
    )
    return trainer, rate


def test_weights_dropout_and_rates_are_the_eager_ones() -> None:
    weights = {}
    runs = (
        ("eager", 0, 5, Adadelta),
        ("graph", 8, 5, Adadelta),
        ("own kernel, eager", 0, 5, FusedAdadelta),
        ("own kernel, graph", 8, 5, FusedAdadelta),
        ("other", 8, 6, Adadelta),
    )
    for name, per_graph, seed, kind in runs:
        lane = Lane(CUDA)
        with torch.cuda.stream(lane.stream):
            trainer, rate = noisy_trainer(per_graph, seed, lane, kind)
        with lane.active():
            list(trainer.epoch())
            # A schedule writes the rate in place; the graph must read it.
            rate.fill_(0.01)
            list(trainer.epoch())
            trainer.forget()
            list(trainer.epoch())
        torch.cuda.synchronize()
        weights[name] = trainer.model.get_parameter("fc.weight").detach().clone()
    for name in ("graph", "own kernel, eager", "own kernel, graph"):
        torch.testing.assert_close(weights[name], weights["eager"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weights["other"], weights["eager"], rtol=1e-2)


def test_a_lane_leaves_the_default_generator_alone() -> None:
    lane = Lane(CUDA)
    lane.seed(3)
    torch.cuda.manual_seed(9)
    wanted = torch.rand(4, device=CUDA)
    torch.cuda.manual_seed(9)
    with lane.active():
        mine = torch.rand(4, device=CUDA)
    assert torch.equal(torch.rand(4, device=CUDA), wanted)
    lane.seed(3)
    with lane.active():
        assert torch.equal(torch.rand(4, device=CUDA), mine)


def test_memory_is_used_again() -> None:
    data, job = problem("mnist"), task("mnist", "perforated", dendrites=3)
    finish([job], data, 8)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    waiting: Iterator[Task | None] = iter([*[job] * 4, None])
    for ended in lanes.run_all(waiting.__next__, lambda t, pool: start(t, data, 8, pool), 1, CUDA):
        assert ended.outcome is not None, ended.fault
    grown = torch.cuda.memory_reserved() - before
    # One lane's pool, not one for each of 28 phases.
    assert grown < 400 * 2**20
