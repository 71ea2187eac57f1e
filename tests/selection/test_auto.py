"""A tracked run with `sites="auto"` grows where its dendrite phase says that it pays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pbfx
from learning.loops import (
    Mlp,
    enter_dendrite_phase,
    identical,
    learners,
    network,
    regression,
    same,
    sgd,
    train,
)
from pbfx import restructure
from pbfx.learning import prospect_of
from selection.subsets import dendrites_of
from tracking.test_optimizers import Scripted

Channels = dict[str, tuple[int, ...]]


class Aside(Mlp):
    """A layer that no error reaches, beside a network that cannot fit its task."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * self.aside(x)


def make(seed: int = 0, **settings: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = pbfx.transform(Aside(), pbfx.Config(measure_every=2, candidate_lr=1e-2, **settings))
    return model, sgd(model)


def measure(
    model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int = 5, warm: int = 4
) -> pbfx.Tracker:
    """Train the network and then its candidates, to just before they are promoted."""
    task = regression(512)
    task.batch = 16
    for _ in range(warm):
        train(model, optimizer, task)
    tracker = enter_dendrite_phase(model, optimizer, epochs)
    for epoch in range(epochs):
        train(model, optimizer, task)
        if epoch + 1 < epochs:
            tracker.step(task.score(model))
    return tracker


def test_what_pays_grows_and_nothing_else():
    model, optimizer = make(sites="auto")
    tracker = measure(model, optimizer)
    before = network(model)
    pools = {name: learner.candidates for name, learner in learners(tracker).items()}
    tracker.step(0.0)
    grown = {name: d.site.channels for name, d in dendrites_of(model).items()}
    assert "aside" not in grown
    assert grown
    sizes = {"fc1": 5, "fc2": 5, "head": 1}
    prospects = {name: pools[name] for name in grown}
    for name, pool in prospects.items():
        best = pool.best_score.amax(0)
        kept = list(grown[name] or range(sizes[name]))
        left = [c for c in range(sizes[name]) if c not in kept]
        assert not left or best[kept].min() > best[left].max(), name
    # What was there before is untouched, and new dendrites weigh nothing.
    after = network(model)
    assert all(identical(after[name], t) for name, t in before.items() if "dendrites" not in name)
    assert not any(d.to_soma.any() for d in dendrites_of(model).values())


def test_the_rows_are_those_of_the_best_candidates():
    model, optimizer = make(sites="auto", growth_parameters=30)
    tracker = measure(model, optimizer)
    for learner in learners(tracker).values():
        learner.measure()
    chosen = {name: learner.chosen() for name, learner in learners(tracker).items()}
    tracker.step(0.0)
    subsets = {n: d for n, d in dendrites_of(model).items() if d.site.channels is not None}
    assert subsets
    for name, dendrites in subsets.items():
        weight, bias, _ = chosen[name]
        kept = list(dendrites.site.channels)
        assert torch.equal(dendrites.weight[0], weight[kept])
        assert torch.equal(dendrites.bias[0], bias[kept])


@pytest.mark.parametrize("limit", [7, 20, 60])
def test_a_growth_stays_within_its_budget(limit: int):
    model, optimizer = make(sites="auto", growth_parameters=limit)
    tracker = measure(model, optimizer)
    plain = pbfx.transform(Aside())
    tracker.step(0.0)
    added = tracker.model
    grown = sum(s.parameters for s in pbfx.explain(added).sites)
    assert 0 < grown - sum(s.parameters for s in pbfx.explain(plain).sites) <= limit


def test_one_site_at_most():
    model, optimizer = make(sites="auto", top_k=1)
    measure(model, optimizer).step(0.0)
    assert len(dendrites_of(model)) == 1


def test_later_dendrites_grow_on_the_same_channels():
    model, optimizer = make(sites="auto", growth_parameters=20)
    task = regression(512)
    task.batch = 16
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(4, 4), max_dendrites=3)
    seen: dict[str, set[tuple[int, ...] | None]] = {}
    while not tracker.complete:
        train(model, optimizer, task)
        tracker.step(task.score(model))
        for name, dendrites in dendrites_of(model).items():
            pool = dendrites.candidates
            if dendrites.count:
                seen.setdefault(name, set()).add(dendrites.site.channels)
            if pool is not None:
                assert pool.site.channels == dendrites.site.channels
                assert pool.direction.shape == (4, dendrites.to_soma.shape[1])
        if tracker.complete or len(tracker.history) > 60:
            break
    assert all(len(channels) == 1 for channels in seen.values())
    assert tracker.dendrites >= 2


def test_at_chance_training_completes_with_the_network_as_it_was():
    model, optimizer = make(sites="auto")
    task = regression(512)
    # Targets that have nothing to do with the inputs.
    task.y = torch.randn(task.y.shape, generator=torch.Generator().manual_seed(3))
    task.batch = 128
    for _ in range(8):
        train(model, optimizer, task)
    before = network(model)
    tracker = enter_dendrite_phase(model, optimizer, 2)
    for _ in range(2):
        train(model, optimizer, task)
        step = tracker.step(task.score(model))
    assert (step.complete, step.dendrites) == (True, 0)
    assert "no dendrite is predicted to pay at any of 4 sites" in step.reason
    assert list(model.state_dict()) == list(Aside().state_dict())
    assert same(network(model), before)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}


def test_one_site_is_no_list(monkeypatch):
    monkeypatch.setattr(restructure, "_growing", lambda *_: ({"fc": 0}, []))
    reason = restructure.why_nothing_grows(Aside(), {})
    assert reason == "no dendrite is predicted to pay at the only site"


def test_without_a_measurement_nothing_grows():
    model, optimizer = make(sites="auto")
    tracker = enter_dendrite_phase(model, optimizer, 1)
    with pytest.warns(UserWarning, match="no error has reached any candidate"):
        assert tracker.step(0.0).complete
    assert dendrites_of(model) == {}


def test_dropped_dendrites_may_come_back_on_other_channels():
    model, optimizer = make(sites="auto", growth_parameters=20)
    policy = Scripted("grow", "promote", "retry drop", "promote", "complete")
    task = regression(512)
    task.batch = 16
    tracker = pbfx.Tracker(model, optimizer, policy=policy)
    shapes = []
    while not tracker.complete:
        train(model, optimizer, task)
        tracker.step(task.score(model))
        state = {id(p): optimizer.state.get(p, {}) for p in model.parameters()}
        for parameter in model.parameters():
            for value in state[id(parameter)].values():
                if isinstance(value, Tensor) and value.dim():
                    assert value.shape == parameter.shape
        shapes.append({n: d.counts for n, d in dendrites_of(model).items()})
    assert any(c.candidates for c in shapes[0].values())
    # Retried from the network without dendrites: pools on all channels again.
    assert all(c.channels is None for c in shapes[2].values())


@pytest.mark.parametrize("fail", ["rebuild", "optimizer"])
def test_a_failed_promotion_is_undone(fail: str, monkeypatch: pytest.MonkeyPatch):
    model, optimizer = make(sites="auto", growth_parameters=20)
    tracker = measure(model, optimizer)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    groups = [list(group["params"]) for group in optimizer.param_groups]
    structure = model.structure()

    def broken(*_: object, **__: object) -> None:
        raise ValueError("broken")

    if fail == "rebuild":
        monkeypatch.setattr(type(model), "rebuild", broken)
    else:
        monkeypatch.setattr(restructure, "sync_optimizer", broken)
    with pytest.raises(pbfx.RestructureError, match="was undone: ValueError: broken"):
        tracker.step(0.0)
    assert model.structure() == structure
    assert model.state_dict().keys() == before.keys()
    moved = {name for name, t in model.state_dict().items() if not identical(t, before[name])}
    # What closing the epoch has measured stays.
    assert all(".candidates." in name for name in moved)
    assert [list(group["params"]) for group in optimizer.param_groups] == groups


def test_a_link_that_does_not_start_at_zero_is_that_of_its_channel():
    runs = []
    for settings in ({}, {"sites": "auto", "growth_parameters": 20}):
        model, optimizer = make(initial_link=0.5, **settings)
        measure(model, optimizer).step(0.0)
        runs.append(dendrites_of(model))
    whole, some = runs
    assert some
    for name, dendrites in some.items():
        kept = list(dendrites.site.channels or range(dendrites.to_soma.shape[1]))
        assert torch.equal(dendrites.to_soma, whole[name].to_soma[:, kept])
        assert dendrites.to_soma.any()


@pytest.mark.parametrize(
    "settings", [{"tuning": "all"}, {"finish": True}, {"learning": "sham"}], ids=str
)
def test_modes_of_learning(settings: dict[str, object]):
    model, optimizer = make(sites="auto", growth_parameters=20, **settings)
    task = regression(512)
    task.batch = 16
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(3, 3), max_dendrites=1)
    while not tracker.complete:
        train(model, optimizer, task)
        tracker.step(task.score(model))
    assert dendrites_of(model)
    silent = [not d.to_soma.any() for d in dendrites_of(model).values()]
    assert silent == [settings.get("learning") == "sham"] * len(silent)


def test_a_prospect_holds_what_was_measured():
    model, optimizer = make(sites="auto")
    tracker = measure(model, optimizer, epochs=3)
    for learner in learners(tracker).values():
        learner.measure()
    prospect = prospect_of("fc2", learners(tracker)["fc2"])
    # 512 rows in batches of 16, every second of which only measures.
    assert (prospect.positions, prospect.batches, prospect.epoch_batches) == (256, 16, 32)
    assert prospect.positions_per_batch == 16
    # Four candidates over three epochs; a row of five weights, a bias, a link.
    assert (prospect.tries, prospect.cost, prospect.together) == (12, 7, 1)
    scores = learners(tracker)["fc2"].candidates.best_score.amax(0)
    assert [abs(r) for r in prospect.correlations] == pytest.approx(scores.tolist())


def test_a_copy_of_a_tracked_model_keeps_its_channels():
    model, optimizer = make(sites="auto", growth_parameters=20)
    measure(model, optimizer).step(0.0)
    twin = copy.deepcopy(model)
    assert same(network(twin), network(model))
    x = regression(8).x
    assert torch.equal(twin(x), model(x))
