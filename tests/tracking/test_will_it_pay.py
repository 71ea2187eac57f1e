"""Before a growth the tracker knows what candidates promise; where that is nothing it says so."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pbfx
from learning.loops import Mlp, Task, network, regression, run, same, sgd, train
from pbfx import Action, Phase, Plateau


def noise(rows: int = 1024) -> Task:
    """Draw targets that have nothing to do with the inputs."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 6, generator=g)
    return Task(x, torch.randn(rows, 1, generator=g), F.mse_loss, 16)


def tracked(policy: pbfx.Policy, *, rate: float = 1e-2, **settings: object):
    torch.manual_seed(0)
    config = pbfx.Config(candidate_lr=rate, measure_every=3)
    model = pbfx.transform(Mlp(), config)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return model, optimizer, pbfx.Tracker(model, optimizer, policy=policy, **settings)


def test_on_noise_it_completes_instead_of_growing() -> None:
    policy = Plateau(patience=2, max_epochs=3, candidate_patience=1, max_candidate_epochs=2)
    model, optimizer, tracker = tracked(policy)
    task = noise()
    before = None
    while not tracker.complete:
        train(model, optimizer, task)
        step = tracker.step(task.score(model))
        if step.phase is Phase.DENDRITE and before is None:
            before = {k: v for k, v in network(model).items() if ".dendrites." not in k}
    assert "no site's candidates correlate with the error on unseen batches" in step.reason
    assert step.dendrites == 0
    assert before is not None
    assert same(network(model), before)
    assert [epoch.phase for epoch in tracker.history].count(Phase.DENDRITE) == 2
    assert all(p.requires_grad for p in model.parameters())


def test_with_something_to_find_it_grows() -> None:
    """The same network and policy, where the target is no linear function of what it reads."""
    policy = Plateau(max_epochs=2, candidate_patience=1, max_candidate_epochs=8)
    model, optimizer, tracker = tracked(policy, rate=3e-2, max_dendrites=1)
    task = regression(2048)
    run(model, optimizer, tracker, task, epochs=11)
    assert Action.PROMOTE in {epoch.action for epoch in tracker.history}
    assert tracker.dendrites == 1


def test_the_history_has_the_figures_of_every_site(tmp_path: Path) -> None:
    model, optimizer, tracker = tracked(pbfx.Interval(1, 2), max_dendrites=1, directory=tmp_path)
    run(model, optimizer, tracker, regression(256))
    sites = [[site.site for site in epoch.sites] for epoch in tracker.history]
    assert sites == [[], ["fc1", "fc2", "head"], ["fc1", "fc2", "head"], []]
    promoted = next(epoch for epoch in tracker.history if epoch.action is Action.PROMOTE)
    for site in promoted.sites:
        assert site.heldout_batches == 5
        assert 0 < site.correlation < 1
        assert 0 < site.gain < site.neurons / 2
        assert 0 < site.p_value < 1
    mean = sum(site.correlation for site in promoted.sites) / 3
    assert promoted.candidate_score == pytest.approx(mean)
    costs = {site.site: site.parameters for site in promoted.sites}
    plain = pbfx.transform(Mlp())
    assert costs == {site.name: site.next_dendrite for site in pbfx.explain(plain).sites}
    with open(tmp_path / "sites.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["number"], row["site"], row["action"]) for row in rows[3:]] == [
        ("3", site, "promote") for site in ("fc1", "fc2", "head")
    ]
    assert [float(row["gain"]) for row in rows[3:]] == [site.gain for site in promoted.sites]
    with open(tmp_path / "history.csv", encoding="utf-8") as file:
        assert "sites" not in next(csv.reader(file))


def test_explain_shows_what_was_measured(tmp_path: Path) -> None:
    model, optimizer, tracker = tracked(pbfx.Interval(1, 2), max_dendrites=1)
    before = pbfx.explain(model)
    assert before.sites[0].heldout is None
    assert "  p\n" not in str(before)
    run(model, optimizer, tracker, regression(256), epochs=3)
    found = {site.site: site for site in tracker.history[-1].sites}
    explained = pbfx.explain(model)
    for site in explained.sites:
        known = found[site.name]
        assert (site.heldout, site.p_value, site.gain) == (
            known.heldout,
            known.p_value,
            known.gain,
        )
    head = next(line for line in str(explained).splitlines() if line.startswith("site"))
    assert head.split()[-2:] == ["r", "p"]
    # A copy and a checkpoint know it too.
    pbfx.save(model, tmp_path / "run.safetensors", tracker)
    other_model, _, other = tracked(pbfx.Interval(1, 2), max_dendrites=1)
    pbfx.load(tmp_path / "run.safetensors", other_model, other)
    assert pbfx.explain(other_model).sites == explained.sites


def test_a_site_that_no_error_reaches_has_no_figures() -> None:
    class Spare(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(6, 1)

        def forward(self, x):
            return super().forward(x) + 0 * self.spare(x).detach()

    torch.manual_seed(0)
    model = pbfx.transform(Spare())
    optimizer = sgd(model)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1))
    run(model, optimizer, tracker, regression(128), epochs=2)
    assert [site.site for site in tracker.history[-1].sites] == ["fc1", "fc2", "head"]


def test_a_state_from_before_there_were_figures_is_taken_up() -> None:
    model, optimizer, tracker = tracked(pbfx.Interval(1, 3), max_dendrites=1)
    run(model, optimizer, tracker, regression(256), epochs=2)
    state = copy.deepcopy(tracker.state_dict())
    for name in ("search", "factor", "capacity"):
        del state[name]
    for epoch in state["history"]:
        for name in ("sites", "seconds", "rate_factor"):
            del epoch[name]
    for learner in state["learners"].values():
        del learner["evidence"]
    other_model, other_optimizer, other = tracked(pbfx.Interval(1, 3), max_dendrites=1)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    assert [epoch.score for epoch in other.history] == [epoch.score for epoch in tracker.history]
    run(other_model, other_optimizer, other, regression(256), epochs=1)
    # It counts from here: eight batches, of which every third only measures.
    assert other.history[-1].phase is Phase.DENDRITE
    assert other.history[-1].sites[0].heldout_batches in (2, 3)
