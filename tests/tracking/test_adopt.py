"""`Tracker.adopt`: another optimizer takes over, in either phase, all or nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import StepLR

import pbfx

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()


def tracked(learning: str = "perforated") -> tuple[nn.Module, pbfx.Tracker]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    model = pbfx.transform(net, pbfx.Config(learning=learning))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, pbfx.Tracker(model, optimizer, policy=pbfx.EveryTime(), max_dendrites=2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def names(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in held}


@pytest.mark.parametrize("learning", ["perforated", "gradient"])
def test_a_new_optimizer_at_every_score_sees_the_run_through(learning: str):
    model, tracker = tracked(learning)
    for epoch in range(6):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        tracker.adopt(optimizer)
        assert tracker.optimizer is optimizer
        train(model, optimizer)
        if tracker.step(0.1 * epoch).complete:
            break
        learning_now = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {n for n in learning_now if "candidates" not in n} <= names(model, optimizer)
    assert tracker.complete


def test_what_the_dendrite_phase_has_frozen_is_held_by_the_new_one():
    model, tracker = tracked()
    held = names(model, tracker.optimizer)
    train(model, tracker.optimizer)
    tracker.step(0.5)
    assert tracker.phase is pbfx.Phase.DENDRITE
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tracker.adopt(optimizer)
    assert held <= names(model, optimizer)
    before = model[0].weight.detach().clone()
    train(model, optimizer)
    assert torch.equal(model[0].weight, before)
    tracker.step(0.6)
    train(model, optimizer)
    assert not torch.equal(model[0].weight, before)


def test_its_rates_are_those_that_growths_return_to():
    model, tracker = tracked("gradient")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    tracker.policy = pbfx.Plateau(patience=2)
    tracker.adopt(optimizer, StepLR(optimizer, 1, gamma=0.5))
    train(model, optimizer)
    for score, rate in ((0.5, 0.2), (0.5, 0.1), (0.5, 0.4)):
        tracker.step(score)
        assert optimizer.param_groups[0]["lr"] == rate


def test_what_does_not_belong_is_refused_and_the_old_one_stays():
    model, tracker = tracked()
    mine = tracker.optimizer
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(pbfx.TrackerError, match="none of the model's parameters"):
        tracker.adopt(other)
    with pytest.raises(pbfx.TrackerError, match="another optimizer"):
        tracker.adopt(torch.optim.SGD(model.parameters(), lr=0.1), StepLR(other, 1))
    with pytest.raises(pbfx.TrackerError, match=r"torch\.optim\.Optimizer"):
        tracker.adopt("adam")
    assert tracker.optimizer is mine
