"""The link that a dendrite is promoted with: zero, or a share of a Newton step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx
from learning.loops import (
    Cnn,
    enter_dendrite_phase,
    images,
    learners,
    network,
    relative_error,
    same,
    sgd,
    train,
)
from pbfx.dendrites import Dendrites


class Classifier(nn.Module):
    """One layer that cannot separate what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def problem(rows: int = 512) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator)
    return x, ((x[:, 0] * x[:, 1] > 0).long() + (x[:, 2].abs() > 1).long())


def measured(
    share: float, learning: str = "perforated", lr: float = 1e-2
) -> tuple[nn.Module, pbfx.Tracker]:
    """Train the layer, then candidates, over whole-batch epochs, and stop before the promotion."""
    torch.manual_seed(0)
    config = pbfx.Config(
        priming_batches=2, measure_every=2, initial_link=share, learning=learning, candidate_lr=lr
    )
    model = pbfx.transform(Classifier(), config)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    x, y = problem()

    def epoch(batches: int) -> None:
        for _ in range(batches):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    epoch(200)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=1)
    tracker.step(0.0)
    epoch(100)
    return model, tracker


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_it_is_the_step_that_the_empirical_fisher_information_gives(share: float) -> None:
    # A rate so small that the candidates are what they were when they were measured.
    model, tracker = measured(share, lr=1e-30)
    (learner,) = learners(tracker).values()
    learner.measure()
    weight, bias, _ = learner.chosen()
    x, y = problem()
    a = torch.tanh(F.linear(x, weight, bias))
    out = model(x).detach().requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(out, y), out)
    # Of each sample, and the mean over samples of its square.
    gradient = len(x) * a * error
    fisher = a.square().mean(0) * (len(x) * error).square().mean(0)
    expected = -share * gradient.mean(0) / fisher
    assert relative_error(learner.first_link(share), expected) < 1e-5


def test_a_promotion_with_it_lowers_the_loss() -> None:
    model, tracker = measured(0.5)
    x, y = problem()
    before = float(F.cross_entropy(model(x), y).detach())
    assert tracker.step(0.0).restructured
    (dendrites,) = [m for m in model.modules() if isinstance(m, Dendrites)]
    assert dendrites.to_soma.all()
    after = float(F.cross_entropy(model(x), y).detach())
    assert after < before - 0.01


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 1.0, "learning": "sham"}])
def test_zero_by_default_and_for_a_sham(settings: dict) -> None:
    model, tracker = measured(**settings)
    x, _ = problem()
    before = model(x).detach()
    tracker.step(0.0)
    assert tracker.dendrites == 1
    assert torch.equal(model(x).detach(), before)


@pytest.mark.parametrize("spoilt", ["unmeasured", "constant"])
def test_nothing_known_means_no_link(spoilt: str) -> None:
    _, tracker = measured(1.0)
    (learner,) = learners(tracker).values()
    learner.measure()
    pool = learner.candidates
    if spoilt == "unmeasured":
        pool.best_moments.zero_()
        pool.best_batches.zero_()
    else:
        # tanh saturated: Σa = Σa² = P.
        pool.best_moments[1:3] = pool.best_moments[0]
    assert not learner.first_link(1.0).any()


def test_it_depends_on_the_moments_alone() -> None:
    """A resumed run promotes with the same links."""

    def promoted() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = pbfx.transform(
            Cnn(), pbfx.Config(priming_batches=1, measure_every=2, initial_link=0.1)
        )
        optimizer = sgd(model)
        tracker = enter_dendrite_phase(model, optimizer, 1)
        train(model, optimizer, images(96))
        again = pbfx.transform(Cnn(), model.perforation.config)
        resumed = pbfx.Tracker(again, sgd(again), policy=tracker.policy)
        again.load_state_dict(model.state_dict())
        resumed.load_state_dict(tracker.state_dict())
        for each in (tracker, resumed):
            each.step(0.0)
        assert same(network(model), network(again))
        return network(model)

    assert same(promoted(), promoted())
