"""A capacity test grows three times, says what a real run needs, and takes everything back."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import pbfx
from learning.loops import Around, Cnn, Mlp, copied, images, regression, same, train
from pbfx import Action, Phase, RateSearch
from pbfx.capacity import CapacityTest, Measured, _predicted
from pbfx.parts import parameter_count

TASK = regression(96)


class Run:
    """A network that has learnt something, with an optimizer that has a state."""

    def __init__(self, learning: str = "perforated", model: nn.Module | None = None, **settings):
        torch.manual_seed(0)
        config = pbfx.Config(learning=learning, priming_batches=1)
        self.model = pbfx.transform(Mlp(), config) if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.9)
        self.task = images(48) if isinstance(model, Cnn) else TASK
        train(self.model, self.optimizer, self.task)
        self.scheduler.step()
        self.tracker = pbfx.Tracker(
            self.model, self.optimizer, self.scheduler, test_capacity=True, **settings
        )

    def epoch(self) -> pbfx.Step:
        train(self.model, self.optimizer, self.task)
        return self.tracker.step(self.task.score(self.model))

    def finish(self) -> pbfx.Step:
        while True:
            step = self.epoch()
            if step.complete:
                return step


def everything(run: Run) -> dict:
    names = {id(p): n for n, p in run.model.named_parameters()}
    return {
        "objects": names,
        "learns": {n: p.requires_grad for n, p in run.model.named_parameters()},
        "state": {
            names[id(p)]: {k: v.clone() for k, v in state.items()}
            for p, state in run.optimizer.state.items()
        },
        "groups": [
            {k: v for k, v in group.items() if k != "params"} | {"identity": id(group)}
            for group in run.optimizer.param_groups
        ],
        "held": [[id(p) for p in group["params"]] for group in run.optimizer.param_groups],
        "scheduler": copy.deepcopy(run.scheduler.state_dict()),
        "draws": run.model.perforation.draws if hasattr(run.model, "perforation") else None,
        "code": run.model.code if hasattr(run.model, "code") else None,
        "buffers": copied(dict(run.model.named_buffers())),
    }


@pytest.mark.parametrize("kind", ["perforated", "sham", "gradient", "cnn", "around"])
def test_everything_is_taken_back(kind: str) -> None:
    config = pbfx.Config(priming_batches=1)
    torch.manual_seed(1)
    if kind == "cnn":
        run = Run(model=pbfx.transform(Cnn(), config))
    elif kind == "around":
        run = Run(model=Around(pbfx.transform(Mlp(outputs=5), config)))
    else:
        run = Run(learning=kind)
    before, tensors = everything(run), copied(run.model.state_dict())
    keys = list(run.model.state_dict())
    step = run.finish()
    assert same(tensors, copied(run.model.state_dict()))
    assert list(run.model.state_dict()) == keys
    after = everything(run)
    assert after["state"].keys() == before["state"].keys()
    for name, state in before["state"].items():
        assert same(after["state"][name], state)
    assert same(after["buffers"], before["buffers"])
    for part in ("objects", "learns", "groups", "held", "scheduler", "draws", "code"):
        assert after[part] == before[part], part
    assert (step.restructured, step.dendrites, step.phase) == (True, 0, Phase.NEURON)
    counts = [epoch.dendrites for epoch in run.tracker.history]
    wanted = [0, 1, 2, 3] if kind == "gradient" else [0, 0, 1, 1, 2, 2, 3]
    assert counts == wanted
    # The network goes on learning as if nothing had been.
    train(run.model, run.optimizer, run.task)


def test_a_run_after_it_is_the_run_without_it() -> None:
    """The same candidates are drawn, from the same network, as long as the streams are the same."""

    def real(run: Run) -> pbfx.Tracker:
        torch.manual_seed(5)
        policy = pbfx.Interval(2, 1)
        tracker = pbfx.Tracker(
            run.model, run.optimizer, run.scheduler, policy=policy, max_dendrites=1
        )
        while not tracker.complete:
            train(run.model, run.optimizer, TASK)
            tracker.step(TASK.score(run.model))
        return tracker

    tested, fresh = Run(), Run()
    tested.finish()
    assert real(tested).history == real(fresh).history
    assert same(copied(tested.model.state_dict()), copied(fresh.model.state_dict()))


def test_it_says_what_a_real_run_needs(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(max_dendrites=5)
    with caplog.at_level(logging.INFO, "pbfx"):
        step = run.finish()
    found = run.tracker.capacity
    assert found is not None
    assert step.reason == str(found)
    assert step.reason in caplog.text
    assert step.reason.startswith("capacity test passed: 3 dendrites grew in 7 epochs (")
    assert "was taken back" in step.reason
    assert "make the tracker with test_capacity=False" in step.reason
    assert found.parameters == parameter_count(pbfx.grow(pbfx.transform(Mlp()), 5))
    assert f"{found.parameters:,} parameters" in step.reason
    assert len(found.epochs) == 7
    assert [epoch.phase for epoch in found.epochs] == [Phase.NEURON, Phase.DENDRITE] * 3 + [
        Phase.NEURON
    ]
    assert (found.device, found.available, found.fits) == ("cpu", None, None)
    assert found.neuron_seconds > 0
    assert found.dendrite_seconds is not None
    held = [epoch.held for epoch in found.epochs if epoch.phase is Phase.NEURON]
    assert held == sorted(held)
    assert found.memory > held[-1]
    assert run.tracker.step(0.0).reason == "training is already complete"


def test_in_gradient_mode_there_is_no_dendrite_phase() -> None:
    run = Run("gradient")
    assert "dendrite phase" not in run.finish().reason
    assert run.tracker.capacity.dendrite_seconds is None


def test_policy_budgets_and_searches_wait_for_the_real_run() -> None:
    run = Run(
        policy=pbfx.Never(),
        max_parameters=1,
        max_epochs=1,
        max_dendrites=0,
        learning_rates=RateSearch(),
    )
    assert run.finish().reason.startswith("capacity test passed: 3 dendrites")
    assert run.tracker.capacity.parameters == parameter_count(Mlp())
    assert all(epoch.rate_factor is None for epoch in run.tracker.history)


def test_a_model_that_has_dendrites_gets_three_more() -> None:
    model = pbfx.grow(pbfx.transform(Mlp(), pbfx.Config(priming_batches=1)), 2)
    run = Run(model=model, max_dendrites=4)
    before = copied(model.state_dict())
    step = run.finish()
    assert same(copied(model.state_dict()), before)
    assert (step.dendrites, max(epoch.dendrites for epoch in run.tracker.history)) == (2, 5)
    assert run.tracker.capacity.parameters == parameter_count(pbfx.grow(pbfx.transform(Mlp()), 4))


def test_its_files_do_not_touch_those_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "best.safetensors").write_text("of another run")
    run = Run(directory=tmp_path)
    run.finish()
    assert (tmp_path / "best.safetensors").read_text() == "of another run"
    names = sorted(path.name for path in (tmp_path / "capacity_test").iterdir())
    assert names == ["best.safetensors", "history.csv", "last.safetensors", "sites.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.safetensors", "capacity_test"]


def test_stopped_after_every_epoch_and_continued(tmp_path: Path) -> None:
    whole = Run()
    start = copied(whole.model.state_dict())
    stream = torch.get_rng_state()
    while not whole.tracker.complete:
        whole.epoch()
        number = len(whole.tracker.history)
        pbfx.save(whole.model, tmp_path / f"{number:02}.safetensors", whole.tracker)
    for path in sorted(tmp_path.iterdir())[:-1]:
        torch.set_rng_state(stream)
        run = Run()
        pbfx.load(path, run.model, run.tracker)
        run.finish()
        assert [epoch.action for epoch in run.tracker.history] == [
            epoch.action for epoch in whole.tracker.history
        ]
        assert same(copied(run.model.state_dict()), start)
        assert len(run.tracker.capacity.epochs) == 7


def test_a_test_is_continued_as_a_test(tmp_path: Path) -> None:
    run = Run()
    run.epoch()
    pbfx.save(run.model, tmp_path / "test.safetensors", run.tracker)
    model = pbfx.transform(Mlp(), pbfx.Config(priming_batches=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    tracker = pbfx.Tracker(model, optimizer, scheduler)
    before = copied(model.state_dict())
    with pytest.raises(pbfx.CheckpointError, match="was a capacity test, this tracker is for no"):
        pbfx.load(tmp_path / "test.safetensors", model, tracker)
    assert same(copied(model.state_dict()), before)
    assert tracker.history == ()


def test_a_failure_at_the_end_leaves_the_grown_network(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    while run.tracker.dendrites < 3:
        run.epoch()
    train(run.model, run.optimizer, TASK)
    before = copied(run.model.state_dict())

    def broken(state_dict: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(run.scheduler, "load_state_dict", broken)
    with pytest.raises(pbfx.RestructureError, match="broken"):
        run.tracker.step(0.0)
    assert same(copied(run.model.state_dict()), before)
    assert not run.tracker.complete
    monkeypatch.undo()
    assert run.epoch().complete
    assert run.tracker.dendrites == 0


def test_predictions_are_lines() -> None:
    assert _predicted([(0, 9.0), (1, 2.0), (2, 4.0), (3, 6.0)], 5) == pytest.approx(10.0)
    # The first one warms up; a line that falls is noise.
    assert _predicted([(0, 9.0), (1, 3.0), (2, 2.0), (3, 1.0)], 5) == 3.0
    assert _predicted([(1, 3.0)], 5) == 3.0


def test_more_than_the_device_has_is_said() -> None:
    rows = tuple(Measured(Phase.NEURON, d, 1.0, 10, 10**6, 10**9 * (d + 1)) for d in range(4))
    found = pbfx.Capacity(rows, 9, 1000, 2.0, None, 10**10, "cuda:0", 8 * 10**9)
    assert found.fits is False
    assert "10 GB on cuda:0, MORE than its 8 GB" in str(found)


def test_where_nothing_grows_it_ends_all_the_same() -> None:
    """As with settings that leave no site to grow: it does not wait for a third dendrite."""
    run = Run()
    test = run.tracker._run.test
    assert isinstance(test, CapacityTest)
    row = Measured(Phase.NEURON, 0, 1.0, 10, 10, None)
    situation = pbfx.Situation(Phase.NEURON, (0.1,))
    decisions = []
    for _ in range(5):
        test.epochs.append(row)
        decisions.append(test.decide(situation).action)
    assert decisions == [Action.GROW] * 3 + [Action.COMPLETE] * 2
