"""A search for a learning rate: trials from one start, the best goes on, the cost is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler as lrs

import pbfx
from learning.loops import Mlp, copied, identical, network, regression, same, train
from pbfx import Action, ConfigError, Interval, Phase, RateSearch, TrackerError

TASK = regression(96)


class Run:
    def __init__(
        self, search: RateSearch | None, scheduler=None, learning: str = "gradient", **settings
    ) -> None:
        torch.manual_seed(0)
        config = pbfx.Config(learning=learning, priming_batches=1)
        self.model = pbfx.transform(Mlp(), config)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        settings = {"policy": Interval(2, 1), "max_dendrites": 1} | settings
        self.tracker = pbfx.Tracker(
            self.model, self.optimizer, self.scheduler, learning_rates=search, **settings
        )

    def epoch(self, score: float | None = None) -> pbfx.Step:
        train(self.model, self.optimizer, TASK)
        return self.tracker.step(TASK.score(self.model) if score is None else score)

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def state(run: Run) -> dict:
    named = {id(p): n for n, p in run.model.named_parameters()}
    buffers = {
        f"{named[id(p)]}/{k}": v
        for p, s in run.optimizer.state.items()
        for k, v in s.items()
        if v is not None
    }
    return copied(network(run.model) | buffers)


def test_every_trial_starts_where_the_growth_ended() -> None:
    run = Run(RateSearch((1.0, 0.5, 0.25)))
    run.epoch(0.1)
    run.epoch(0.2)
    start, objects = state(run), {n: id(p) for n, p in run.model.named_parameters()}
    assert run.rate == 0.1
    for score, rate in ((0.3, 0.05), (0.4, 0.025)):
        step = run.epoch(score)
        assert not step.restructured
        assert same(state(run), start)
        assert run.rate == pytest.approx(rate)
    assert {n: id(p) for n, p in run.model.named_parameters()} == objects
    train(run.model, run.optimizer, TASK)
    end = state(run)
    step = run.tracker.step(0.5)
    # The last is the best: nothing is set back.
    assert same(state(run), end)
    assert run.rate == pytest.approx(0.025)
    assert step.reason == (
        "searching for a learning rate (x1 0.3, x0.5 0.4, x0.25 0.5): going on with x0.25; 2 of 3 "
        "epochs were spent on others"
    )
    assert [epoch.rate_factor for epoch in run.tracker.history] == [None, None, 1.0, 0.5, 0.25]


def test_it_stops_at_the_first_that_is_worse_and_goes_back_to_the_best() -> None:
    run = Run(RateSearch((1.0, 0.5, 0.25, 0.1)))
    run.epoch(0.1)
    run.epoch(0.2)
    run.epoch(0.3)
    train(run.model, run.optimizer, TASK)
    best = state(run)
    run.tracker.step(0.4)
    step = run.epoch(0.35)
    assert same(state(run), best)
    assert run.rate == pytest.approx(0.05)
    assert "going on with x0.5; 2 of 3 epochs were spent on others" in step.reason
    assert run.tracker._run.search is None


def test_the_policy_sees_the_epochs_of_the_best_trial_only() -> None:
    seen = []

    def policy(now: pbfx.Situation) -> pbfx.Decision:
        seen.append((now.dendrites, now.scores))
        return Interval(3, 1).decide(now)

    run = Run(RateSearch((1.0, 0.5, 0.25)), policy=policy)
    for score in (0.1, 0.2, 0.3, 0.4, 0.5, 0.45, 0.6):
        run.epoch(score)
    assert seen == [
        (0, (0.1,)),
        (0, (0.1, 0.2)),
        (0, (0.1, 0.2, 0.3)),
        (1, (0.5, 0.6)),
    ]
    assert run.epoch(0.7).complete


def test_longer_trials() -> None:
    run = Run(RateSearch((1.0, 0.5), epochs=[9, 2]), policy=Interval(4, 1))
    for score in (0.1, 0.1, 0.1, 0.1, 0.9, 0.5):
        run.epoch(score)
    assert "epoch 1 of 2 at x0.5" in run.epoch(0.6).reason
    # A trial is as good as its best epoch.
    step = run.epoch(0.8)
    assert "(x1 0.9, x0.5 0.8): going on with x1; 2 of 4 epochs were spent" in step.reason
    assert run.rate == pytest.approx(0.1)


def test_minimising() -> None:
    run = Run(RateSearch((1.0, 0.5)), maximize=False)
    for score in (3.0, 2.0, 1.0, 0.5):
        step = run.epoch(score)
    assert "going on with x0.5" in step.reason


SCHEDULERS = {
    "none": None,
    "step": lambda o: lrs.StepLR(o, 1, 0.5),
    "lambda": lambda o: lrs.LambdaLR(o, lambda epoch: 0.9**epoch),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 5),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.ConstantLR(o, 0.5, 2), lrs.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.5, 2), lrs.ExponentialLR(o, 0.9)], o
    ),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.05, 0.2, 3, cycle_momentum=False),
    "one cycle": lambda o: lrs.OneCycleLR(o, 0.3, 12),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, "max", 0.5, patience=0),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scaled_schedule_is_the_schedule_scaled(scheduler: str) -> None:
    """Through trials, the way back to the best and on, each rate is the unscaled one's multiple."""
    make = SCHEDULERS[scheduler]
    plain = Run(None, make, policy=Interval(2, 1), max_dendrites=1)
    run = Run(RateSearch((0.5, 0.25, 0.1)), make, policy=Interval(6, 1), max_dendrites=1)
    plain_rates, rates = [], []
    for _ in range(2):
        plain.epoch(0.0)
    for _ in range(6):
        run.epoch(0.0)
    assert run.rate == pytest.approx(plain.rate / 2)
    for score in (0.1, 0.1):
        plain_rates.append(plain.rate)
        if not plain.tracker.complete:
            plain.epoch(score)
    trial = []
    for score in (0.3, 0.2):
        trial.append(run.rate)
        run.epoch(score)
    assert trial == pytest.approx([0.5 * plain_rates[0], 0.25 * plain_rates[0]])
    # The best is the first trial: its second epoch comes now.
    rates.append(run.rate)
    if scheduler != "plateau":
        assert rates == pytest.approx([0.5 * plain_rates[1]])


@pytest.mark.parametrize("learning", ["perforated", "sham"])
def test_it_follows_the_dendrite_phase(learning: str) -> None:
    run = Run(RateSearch((1.0, 0.5)), learning=learning)
    phases = [run.epoch(score).phase for score in (0.1, 0.2)]
    assert phases == [Phase.NEURON, Phase.DENDRITE]
    assert run.tracker._run.search is None
    assert run.epoch(0.0).phase is Phase.NEURON
    assert run.tracker._run.search is not None
    run.epoch(0.3)
    assert run.rate == pytest.approx(0.05)
    assert run.tracker.history[-1].rate_factor == 1.0
    run.epoch(0.1)
    assert run.epoch(0.2).complete
    assert run.tracker.best_score == 0.3


def test_a_budget_of_epochs_ends_a_search() -> None:
    run = Run(RateSearch((1.0, 0.5, 0.2)), max_epochs=4)
    for score in (0.1, 0.2, 0.3):
        run.epoch(score)
    step = run.epoch(0.5)
    assert step.complete
    assert "max_epochs=4 is reached" in step.reason
    assert run.tracker.best_score == 0.5


def test_a_failure_on_the_way_back_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(RateSearch((1.0, 0.5, 0.25)), lambda o: lrs.StepLR(o, 1, 0.9))
    run.epoch(0.1)
    run.epoch(0.2)
    train(run.model, run.optimizer, TASK)
    before, rate = state(run), run.rate
    groups = [id(group) for group in run.optimizer.param_groups]

    def broken(state_dict: object) -> None:
        raise RuntimeError("no way back")

    monkeypatch.setattr(run.scheduler, "load_state_dict", broken)
    with pytest.raises(pbfx.RestructureError, match="no way back"):
        run.tracker.step(0.3)
    assert same(state(run), before)
    assert [id(group) for group in run.optimizer.param_groups] == groups
    # The scheduler's step of this epoch had been done.
    assert run.rate == pytest.approx(0.9 * rate)
    monkeypatch.undo()
    step = run.epoch(0.4)
    assert "next x0.5" in step.reason
    assert run.rate == pytest.approx(0.05)


@pytest.mark.parametrize("learning", ["gradient", "perforated"])
def test_stopped_after_every_epoch_and_continued(learning: str, tmp_path: Path) -> None:
    def new() -> Run:
        search = RateSearch((1.0, 0.5, 0.25), epochs=2)
        return Run(
            search,
            lambda o: lrs.CosineAnnealingLR(o, 4),
            learning,
            policy=Interval(3, 1),
            max_dendrites=2,
        )

    whole = new()
    while not whole.tracker.complete:
        whole.epoch()
        number = len(whole.tracker.history)
        pbfx.save(whole.model, tmp_path / f"{number:02}.safetensors", whole.tracker)
    assert {epoch.rate_factor for epoch in whole.tracker.history} >= {None, 1.0, 0.5}
    for path in sorted(tmp_path.iterdir()):
        run = new()
        pbfx.load(path, run.model, run.tracker)
        while not run.tracker.complete:
            run.epoch()
        assert run.tracker.history == whole.tracker.history, path.name
        assert same(state(run), state(whole))


def test_a_rate_in_a_tensor_stays_that_tensor() -> None:
    run = Run(None)
    model = run.model
    rate = torch.tensor(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    tracker = pbfx.Tracker(
        model, optimizer, policy=Interval(1, 1), learning_rates=RateSearch((1.0, 0.5))
    )
    for score in (0.1, 0.2):
        train(model, optimizer, TASK)
        tracker.step(score)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.05)
    tracker.step(0.1)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1)


def test_growth_after_a_search_starts_from_the_unscaled_rates() -> None:
    run = Run(RateSearch((1.0, 0.5)), max_dendrites=2, policy=Interval(1, 1))
    run.epoch(0.1)
    for score in (0.2, 0.3):
        run.epoch(score)
    assert run.rate == pytest.approx(0.05)
    step = run.epoch(0.4)
    assert step.restructured
    assert run.rate == pytest.approx(0.1)
    assert run.tracker.history[-1].action is Action.GROW


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RateSearch(()), "factors must not be an empty list"),
        (lambda: RateSearch((1.0,)), "factors must be at least two different numbers"),
        (lambda: RateSearch((1.0, 1.0)), "factors must be at least two different numbers"),
        (lambda: RateSearch((1.0, 0.0)), "factors must be a list of numbers above 0"),
        (lambda: RateSearch(0.5), "factors must be a list of numbers above 0, got 0.5"),
        (lambda: RateSearch((1.0, "2")), r"factors\[1\] must be a finite number"),
        (lambda: RateSearch(epochs=0), "epochs must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_tracker_wants_a_search() -> None:
    with pytest.raises(TrackerError, match=r"learning_rates must be a pbfx.RateSearch or None"):
        Run((1.0, 0.5))


def test_a_search_keeps_the_network_that_it_starts_from() -> None:
    run = Run(RateSearch((1.0, 0.5)))
    run.epoch(0.1)
    run.epoch(0.2)
    assert identical(
        run.tracker._run.search.start.network.tensors["fc1.weight"], run.model.fc1.weight
    )
