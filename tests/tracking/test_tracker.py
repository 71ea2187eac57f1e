"""What `Tracker.step` does with the model, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import pbfx
from learning.loops import (
    Around,
    Mlp,
    copied,
    enter_dendrite_phase,
    identical,
    learners,
    network,
    regression,
    run,
    same,
    sgd,
    train,
)
from pbfx import (
    Action,
    ConfigError,
    Decision,
    Phase,
    Plateau,
    RestructureError,
    ScoreError,
    Situation,
    TrackerError,
)
from pbfx import parts as parts_module
from pbfx import perforated as perforated_module


class Scripted:
    """A policy that does what it is told, one decision per epoch."""

    def __init__(self, *decisions: str) -> None:
        self.decisions = list(decisions)
        self.seen: list[Situation] = []

    def decide(self, situation: Situation) -> Decision:
        self.seen.append(situation)
        action, _, flag = self.decisions.pop(0).partition(" ")
        return Decision(Action(action), f"told to {action}", keep=flag != "drop")


def quiet_step(tracker: pbfx.Tracker, score: float = 0.0) -> pbfx.Step:
    """Step a tracker whose candidates saw no batch, which is a warning elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tracker.step(score)


def started(*decisions: str, learning: str = "perforated", **settings: object):
    torch.manual_seed(0)
    model = pbfx.transform(Mlp(), pbfx.Config(learning=learning, priming_batches=1))
    optimizer = sgd(model)
    policy = Scripted(*decisions)
    return model, optimizer, pbfx.Tracker(model, optimizer, policy=policy, **settings)


TASK = regression(96)


class TestPolicies:
    def test_a_function(self) -> None:
        model = pbfx.transform(Mlp(), pbfx.Config(learning="gradient"))
        seen = []

        def policy(situation: Situation) -> Decision:
            seen.append(situation.dendrites)
            return Decision(Action.GROW, "grow, grow")

        tracker = pbfx.Tracker(model, sgd(model), policy=policy)
        assert tracker.step(0.1).reason == "grow, grow"
        assert tracker.step(0.2).dendrites == 2
        assert seen == [0, 1]

    def test_what_a_function_returns_is_checked(self) -> None:
        model = pbfx.transform(Mlp())
        tracker = pbfx.Tracker(model, sgd(model), policy=lambda situation: "grow")
        with pytest.raises(TrackerError, match=r"must return a pbfx.Decision, got 'grow'"):
            tracker.step(0.1)
        assert tracker.history == ()

    def test_an_error_of_a_function_moves_nothing(self) -> None:
        model = pbfx.transform(Mlp())
        tracker = pbfx.Tracker(model, sgd(model), policy=lambda situation: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tracker.step(0.1)
        assert tracker.history == ()

    def test_a_class_is_no_policy(self) -> None:
        model = pbfx.transform(Mlp())
        with pytest.raises(TrackerError, match="got the class Plateau; call it first"):
            pbfx.Tracker(model, sgd(model), policy=Plateau)

    def test_resets_may_be_lists(self) -> None:
        model = pbfx.transform(Mlp(), pbfx.Config(learning="gradient"))
        optimizer = sgd(model)
        tracker = pbfx.Tracker(
            model, optimizer, policy=pbfx.EveryTime(), reset_learning_rate=[True, True, False]
        )
        rates = []
        for _ in range(3):
            optimizer.param_groups[0]["lr"] = 1.0
            tracker.step(0.0)
            rates.append(optimizer.param_groups[0]["lr"])
        assert rates == [0.05, 1.0, 1.0]

    def test_candidate_settings_may_be_lists(self) -> None:
        model = pbfx.transform(
            Mlp(), pbfx.Config(candidates=[3, 2], candidate_lr=[1e-2, 1e-3], measure_every=[2, 3])
        )
        tracker = pbfx.Tracker(model, sgd(model), policy=pbfx.EveryTime())
        found = []
        for _ in range(6):
            if quiet_step(tracker).phase is Phase.DENDRITE:
                learner = learners(tracker)["fc1"]
                rate = learner._adam.lr
                found.append((learner.candidates.count, rate, learner.rules.measure_every))
        assert found == [(3, 1e-2, 2), (2, 1e-3, 3), (2, 1e-3, 3)]


class TestRestoring:
    @pytest.mark.parametrize("maximize", [True, False])
    def test_growing_starts_from_the_best_epoch(self, maximize: bool) -> None:
        model, optimizer, tracker = started(*["continue"] * 3, "grow", maximize=maximize)
        states = []
        for score in (0.1, 0.4, 0.3, 0.2):
            train(model, optimizer, TASK)
            states.append(network(model))
            step = tracker.step(score if maximize else -score)
        assert step.restructured
        now = {k: v for k, v in network(model).items() if ".dendrites." not in k}
        assert same(now, states[1])
        assert [epoch.improved for epoch in tracker.history] == [True, True, False, False]

    def test_a_tie_keeps_the_earlier_epoch(self) -> None:
        model, optimizer, tracker = started("continue", "complete")
        train(model, optimizer, TASK)
        first = network(model)
        tracker.step(0.5)
        train(model, optimizer, TASK)
        tracker.step(0.5)
        assert same(network(model), first)

    def test_completion_restores_the_best_epoch_with_its_structure(self) -> None:
        model, optimizer, tracker = started("grow", "promote", "continue", "continue", "complete")
        states = []
        for score in (0.1, 0.9, 0.5, 0.7, 0.6):
            train(model, optimizer, TASK)
            states.append(network(model))
            step = tracker.step(score)
        assert step.complete
        assert step == pbfx.Step(True, True, Phase.NEURON, 1, False, "told to complete")
        # The 0.9 of the dendrite phase is a score of the frozen network, and counts for nothing.
        assert tracker.best_score == 0.7
        assert same(network(model), states[3])
        assert all(p.requires_grad for n, p in model.named_parameters() if "dendr" not in n)

    def test_completion_without_the_last_set_prunes_it(self) -> None:
        model, optimizer, tracker = started("grow", "promote", "continue", "complete drop")
        states = []
        for score in (0.8, 0.0, 0.5, 0.7):
            train(model, optimizer, TASK)
            states.append(network(model))
            step = tracker.step(score)
        assert (step.complete, step.dendrites) == (True, 0)
        assert same(copied(model.state_dict()), states[0])
        assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}

    def test_retry_prunes_restores_and_draws_new_candidates(self) -> None:
        model, optimizer, tracker = started("grow", "promote", "retry drop", "promote")
        train(model, optimizer, TASK)
        accepted = network(model)
        tracker.step(0.8)
        pools = [learners(tracker)["fc1"].candidates.weight.detach().clone()]
        train(model, optimizer, TASK)
        tracker.step(0.8)
        assert tracker.dendrites == 1
        train(model, optimizer, TASK)
        step = tracker.step(0.5)
        assert (step.phase, step.dendrites) == (Phase.DENDRITE, 0)
        assert same({k: v for k, v in network(model).items() if k in accepted}, accepted)
        pools.append(learners(tracker)["fc1"].candidates.weight.detach().clone())
        assert not identical(*pools)
        assert tracker.history[-1].attempt == 0
        train(model, optimizer, TASK)
        step = tracker.step(0.8)
        assert (step.phase, step.dendrites) == (Phase.NEURON, 1)
        assert tracker.history[-1].attempt == 1
        train(model, optimizer, TASK)
        assert model.fc1.dendrites.to_soma.any()

    def test_retry_in_gradient_mode(self) -> None:
        model, optimizer, tracker = started("grow", "retry drop", learning="gradient")
        train(model, optimizer, TASK)
        accepted = network(model)
        tracker.step(0.8)
        first = model.fc1.dendrites.weight.detach().clone()
        train(model, optimizer, TASK)
        step = tracker.step(0.1)
        assert (step.phase, step.dendrites) == (Phase.NEURON, 1)
        assert same({k: v for k, v in network(model).items() if k in accepted}, accepted)
        assert not identical(first, model.fc1.dendrites.weight)
        assert not model.fc1.dendrites.to_soma.any()

    def test_a_growth_that_did_not_help_can_be_grown_upon(self) -> None:
        """As `Interval` does: go on from this phase, but remember the better network."""
        model, optimizer, tracker = started(
            "grow", "promote", "grow drop", "promote", "complete drop"
        )
        states = []
        for score in (0.8, 0.0, 0.5, 0.0, 0.6):
            train(model, optimizer, TASK)
            states.append(network(model))
            step = tracker.step(score)
            assert step.dendrites == {0.8: 0, 0.5: 1, 0.6: 0}.get(score, tracker.dendrites)
        assert same(copied(model.state_dict()), states[0])

    def test_snapshots_share_no_memory_with_the_model(self) -> None:
        model, optimizer, tracker = started("continue", "continue", "grow", "promote")
        tracker.step(0.5)
        live = {t.data_ptr() for t in model.state_dict().values()}
        snapshot = tracker._run.current.tensors
        assert not live & {t.data_ptr() for t in snapshot.values()}
        kept = copied(snapshot)
        train(model, optimizer, TASK)
        tracker.step(0.4)
        assert same(tracker._run.current.tensors, kept)
        tracker.step(0.4)
        train(model, optimizer, TASK)
        tracker.step(0.4)
        train(model, optimizer, TASK)
        assert same(tracker._run.accepted.tensors, kept)

    @pytest.mark.parametrize("decision", ["complete", "retry"])
    def test_a_policy_may_leave_the_dendrite_phase_without_promoting(self, decision: str) -> None:
        model, optimizer, tracker = started("grow", "continue", decision, "promote")
        train(model, optimizer, TASK)
        before = network(model)
        tracker.step(0.5)
        for _ in range(2):
            train(model, optimizer, TASK)
            step = tracker.step(0.5)
        if decision == "complete":
            assert step.complete
            assert same(copied(model.state_dict()), before)
        else:
            assert step.phase is Phase.DENDRITE
            train(model, optimizer, TASK)
            assert tracker.step(0.5).dendrites == 1
        assert all(p.requires_grad for n, p in model.named_parameters() if "dendr" not in n)
        train(model, optimizer, TASK)
        assert not identical(model.fc1.weight, before["fc1.weight"])

    def test_training_flags_come_back(self) -> None:
        model, _, tracker = started("grow", "promote")
        model.train()
        model.fc2.eval()
        tracker.step(0.0)
        assert model.training
        assert not model.fc1.training
        quiet_step(tracker)
        flags = {name for name, module in model.named_modules() if not module.training}
        assert flags == {"fc2", "fc2.dendrites"}


class TestReasons:
    def test_plateau_end_to_end(self) -> None:
        torch.manual_seed(0)
        model = pbfx.transform(Mlp())
        policy = Plateau(patience=1, tries=2, candidate_patience=1, max_candidate_epochs=1)
        tracker = pbfx.Tracker(model, sgd(model), policy=policy, max_dendrites=2)
        # First plateau; a set that does not help; one that does; a last one that does not, twice.
        script = [0.5, 0.5, 0, 0.4, 0.4, 0, 0.7, 0.7, 0, 0.6, 0.6, 0, 0.65, 0.6]
        steps = [quiet_step(tracker, score) for score in script]
        reasons = [step.reason for step in steps if step.restructured]
        over = "1 epoch of candidate learning is over"
        assert reasons == [
            "no improvement for 1 epoch at 0.5: growing dendrite 1",
            over,
            "no improvement for 1 epoch; dendrite 1 did not help (0.4 against 0.5): dropped, "
            "trying another",
            over,
            "no improvement for 1 epoch at 0.7: growing dendrite 2",
            over,
            "no improvement for 1 epoch; dendrite 2 did not help (0.6 against 0.7): dropped, "
            "trying another",
            over,
            "no improvement for 1 epoch; dendrite 2 did not help (0.65 against 0.7), the last of "
            "2 tries",
        ]
        assert tracker.complete
        assert steps[-1].dendrites == 1
        assert [epoch.attempt for epoch in tracker.history] == [0] * 5 + [1] * 3 + [0] * 3 + [1] * 3
        assert [e.cycle for e in tracker.history] == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]

    def test_calls_after_completion_change_nothing(self) -> None:
        model, optimizer, tracker = started("complete")
        train(model, optimizer, TASK)
        tracker.step(0.5)
        before, history = copied(model.state_dict()), tracker.history
        rates = [group["lr"] for group in optimizer.param_groups]
        step = tracker.step(0.9)
        assert step == pbfx.Step(
            False, True, Phase.NEURON, 0, False, "training is already complete"
        )
        assert same(before, copied(model.state_dict()))
        assert tracker.history == history
        assert rates == [group["lr"] for group in optimizer.param_groups]

    def test_the_situation_is_what_happened(self) -> None:
        _, _, tracker = started("continue", "grow", "continue", "promote", "continue", "continue")
        for score in (0.1, 0.3, 0.7, 0.7, 0.2):
            quiet_step(tracker, score)
        seen = tracker.policy.seen
        assert [s.scores for s in seen] == [(0.1,), (0.1, 0.3), (0.7,), (0.7, 0.7), (0.2,)]
        assert [s.accepted for s in seen] == [None, None, 0.3, 0.3, 0.3]
        assert [s.phase for s in seen] == [Phase.NEURON] * 2 + [Phase.DENDRITE] * 2 + [Phase.NEURON]
        assert [s.dendrites for s in seen] == [0, 0, 0, 0, 1]
        assert [len(s.candidate_scores) for s in seen] == [1, 2, 1, 2, 1]

    def test_history_counts_parameters_of_the_network(self) -> None:
        model, _, tracker = started("grow", "promote", "continue")
        plain = sum(p.numel() for p in Mlp().parameters())
        for _ in range(3):
            quiet_step(tracker)
        counted = [epoch.parameters for epoch in tracker.history]
        # One dendrite copies the weights and biases, and adds a link per neuron.
        assert counted == [plain, plain, 2 * plain + 11]
        # The upper triangle of to_dendrite is stored, but never read.
        assert counted[-1] == sum(p.numel() for p in model.parameters()) - 11
        assert counted[-1] == sum(site.parameters for site in pbfx.explain(model).sites)
        assert [epoch.number for epoch in tracker.history] == [1, 2, 3]
        with pytest.raises(dataclasses.FrozenInstanceError):
            tracker.history[0].score = 1.0


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (float("nan"), "must be finite, got nan; the tracker has not moved"),
        (math.inf, "must be finite, got inf"),
        (-math.inf, "must be finite, got -inf"),
        (torch.tensor(float("nan")), "must be finite, got nan"),
        (np.float32("inf"), "must be finite, got inf"),
        ("0.5", "must be a number, got '0.5' (str)"),
        (None, "must be a number, got None (NoneType)"),
        (True, "must be a number, got True (bool)"),
        (torch.tensor(True), "must be a number"),
        (np.bool_(True), "must be a number"),
        (1j, "must be a number, got 1j (complex)"),
        ([0.5], "must be a number, got [0.5] (list)"),
        (torch.zeros(3), "must be one number, got a Tensor of shape (3,); reduce it first"),
        (torch.zeros(0), "must be one number, got a Tensor of shape (0,)"),
        (np.zeros((2, 2)), "must be one number, got a ndarray of shape (2, 2)"),
    ],
    ids=repr,
)
def test_bad_scores_move_nothing(score: object, message: str) -> None:
    model, optimizer, tracker = started("grow")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    tracker = pbfx.Tracker(model, optimizer, scheduler, policy=Scripted("grow"))
    train(model, optimizer, TASK)
    before = copied(model.state_dict())
    with pytest.raises(ScoreError) as error:
        tracker.step(score)
    assert message in str(error.value)
    assert tracker.history == ()
    assert tracker.phase is Phase.NEURON
    assert scheduler.last_epoch == 0
    assert same(before, copied(model.state_dict()))
    assert tracker.step(0.5).restructured


@pytest.mark.parametrize(
    "score",
    [
        0.5,
        np.float32(0.5),
        np.float64(0.5),
        np.array(0.5),
        np.array([0.5]),
        torch.tensor(0.5),
        torch.tensor([0.5]),
        torch.tensor([[0.5]], dtype=torch.float16),
        nn.Parameter(torch.tensor(0.5)),
    ],
    ids=repr,
)
def test_numbers_of_every_kind_are_scores(score: object) -> None:
    _, _, tracker = started("continue")
    tracker.step(score)
    assert tracker.history[0].score == 0.5
    assert type(tracker.history[0].score) is float


@pytest.mark.parametrize("score", [1, np.int64(1), torch.tensor(1)])
def test_whole_numbers_are_scores(score: object) -> None:
    _, _, tracker = started("continue")
    tracker.step(score)
    assert tracker.history[0].score == 1.0


class TestParts:
    def test_a_plain_model(self) -> None:
        model = Mlp()
        with pytest.raises(RestructureError, match="Mlp has no perforated parts; pass it through"):
            pbfx.Tracker(model, sgd(model))

    def test_no_optimizer(self) -> None:
        with pytest.raises(TrackerError, match=r"must be a torch.optim.Optimizer, got float"):
            pbfx.Tracker(pbfx.transform(Mlp()), 0.1)

    def test_an_optimizer_of_another_model(self) -> None:
        with pytest.raises(TrackerError, match="the optimizer holds none of the model's param"):
            pbfx.Tracker(pbfx.transform(Mlp()), sgd(Mlp()))

    def test_an_optimizer_made_before_the_transform_is_right(self) -> None:
        net = Mlp()
        optimizer = sgd(net)
        model = pbfx.transform(net)
        tracker = pbfx.Tracker(model, optimizer, policy=Scripted("grow", "promote"))
        quiet_step(tracker)
        quiet_step(tracker)
        train(model, optimizer, TASK)
        assert model.fc1.dendrites.to_soma.any()

    def test_no_policy(self) -> None:
        model = pbfx.transform(Mlp())
        with pytest.raises(TrackerError, match=r"must have a method decide\(situation\) .*, got 3"):
            pbfx.Tracker(model, sgd(model), policy=3)

    @pytest.mark.parametrize("count", [-1, 1.0, True, None])
    def test_max_dendrites(self, count: object) -> None:
        model = pbfx.transform(Mlp())
        with pytest.raises(TrackerError, match="max_dendrites must be a whole number of at least"):
            pbfx.Tracker(model, sgd(model), max_dendrites=count)

    def test_a_directory_that_cannot_be_made(self, tmp_path) -> None:
        model = pbfx.transform(Mlp())
        (tmp_path / "file").touch()
        with pytest.raises(TrackerError, match=r"directory .*file/run cannot be made"):
            pbfx.Tracker(model, sgd(model), directory=tmp_path / "file" / "run")

    def test_a_model_in_its_dendrite_phase(self) -> None:
        model, optimizer, tracker = started("grow")
        tracker.step(0.0)
        with pytest.raises(TrackerError, match="is in its dendrite phase; to resume a run, make"):
            pbfx.Tracker(model, optimizer)

    def test_a_failed_construction_touches_nothing(self) -> None:
        model, optimizer, tracker = started("continue")
        with pytest.raises(TrackerError):
            pbfx.Tracker(model, optimizer, scheduler_steps="never")
        assert tracker.step(0.0).reason == "told to continue"

    def test_a_second_tracker_takes_over(self) -> None:
        model, optimizer, first = started("continue", "continue")
        first.step(0.0)
        second = pbfx.Tracker(model, optimizer, policy=Scripted("grow"))
        with pytest.raises(TrackerError, match="another tracker has been made for this model"):
            first.step(0.0)
        assert len(first.history) == 1
        assert second.step(0.0).restructured

    def test_two_trackers_on_two_models(self) -> None:
        """Side by side, each as if it were alone."""

        def alone(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, pbfx.Tracker]:
            torch.manual_seed(seed)
            model = pbfx.transform(Mlp(), pbfx.Config(priming_batches=1))
            optimizer = sgd(model)
            policy = pbfx.Interval(1 + seed, 2)
            return model, optimizer, pbfx.Tracker(model, optimizer, policy=policy, max_dendrites=1)

        def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, tracker: pbfx.Tracker):
            optimizer.zero_grad()
            TASK.loss_of(model).backward()
            optimizer.step()
            tracker.step(-float(TASK.loss_of(model).detach()))

        together = [alone(0), alone(1)]
        for _ in range(6):
            for parts in together:
                epoch(*parts)
        for seed, (model, _, tracker) in enumerate(together):
            reference = alone(seed)
            for _ in range(6):
                epoch(*reference)
            assert same(copied(model.state_dict()), copied(reference[0].state_dict()))
            assert tracker.history == reference[2].history
            assert tracker.dendrites == 1

    def test_impossible_decisions_move_nothing(self) -> None:
        model, optimizer, tracker = started("promote", "continue")
        train(model, optimizer, TASK)
        before = copied(model.state_dict())
        with pytest.raises(TrackerError, match="decided 'promote' in the neuron phase"):
            tracker.step(0.5)
        assert same(before, copied(model.state_dict()))
        assert tracker.history == ()
        tracker.step(0.5)

    def test_grow_by_hand_is_refused_under_a_tracker(self) -> None:
        model, _, tracker = started("grow")
        with pytest.raises(RestructureError, match=r"pbfx.grow: a tracker manages the model"):
            pbfx.grow(model)
        tracker.step(0.0)
        with pytest.raises(
            RestructureError, match=r"pbfx.grow: the model is in its dendrite phase"
        ):
            pbfx.grow(model)

    @pytest.mark.parametrize("n", [0, -1, 1.0, True, "2"])
    def test_grow_by_hand_counts_in_whole_numbers(self, n: object) -> None:
        model = pbfx.transform(Mlp())
        message = f"pbfx.grow: n must be a whole number of at least 1, got {n!r}"
        with pytest.raises(ConfigError, match=re.escape(message)):
            pbfx.grow(model, n)
        assert not model.grown()

    def test_grow_by_hand_knows_its_sites(self) -> None:
        model = pbfx.transform(Mlp())
        message = "pbfx.grow: there is no site 'fc3'; did you mean 'fc2' or 'fc1'? valid: 'fc1', "
        with pytest.raises(ConfigError, match=re.escape(message)):
            pbfx.grow(model, 1, ["fc1", "fc3"])
        assert not model.grown()
        with pytest.raises(RestructureError, match="Mlp has no perforated parts"):
            pbfx.grow(Mlp())

    def test_grow_by_hand_then_track(self) -> None:
        torch.manual_seed(0)
        model = pbfx.grow(pbfx.transform(Mlp()), 2, "fc1")
        optimizer = sgd(model)
        tracker = pbfx.Tracker(model, optimizer, policy=Scripted("grow", "promote"))
        for _ in range(2):
            train(model, optimizer, TASK)
            tracker.step(0.0)
        counts = {n: c.dendrites for n, c in model.structure().sites.items()}
        assert counts == {"fc1": 3, "fc2": 1, "head": 1}


class TestWrapped:
    def test_inside_a_larger_module(self) -> None:
        torch.manual_seed(0)
        model = Around(pbfx.transform(Mlp(outputs=5), pbfx.Config(priming_batches=1)))
        optimizer = sgd(model)
        tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(2, 1), max_dendrites=2)
        run(model, optimizer, tracker, TASK)
        assert tracker.dendrites == 2
        assert "part.fc1.dendrites.to_soma" in model.state_dict()
        assert not model.norm._forward_pre_hooks

    def test_two_parts_in_one_module(self) -> None:
        torch.manual_seed(0)
        config = pbfx.Config(priming_batches=1)
        model = nn.Sequential(
            pbfx.transform(Mlp(outputs=4), config),
            nn.BatchNorm1d(4),
            pbfx.transform(Mlp(4), config),
        )
        optimizer = sgd(model)
        tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=1)
        run(model, optimizer, tracker, TASK, epochs=2)
        assert {part.structure().dendrites for part in (model[0], model[2])} == {1}
        train(model, optimizer, TASK)
        assert model[0].fc1.dendrites.to_soma.any()
        assert model[2].fc1.dendrites.to_soma.any()

    @pytest.mark.parametrize("where", ["model", "around", "part"])
    def test_compiled(self, where: str) -> None:
        """The next call runs the new graph: each phase is compared with an eager twin."""

        def build(compiled: bool):
            torch.manual_seed(0)
            outputs = 5 if where == "around" else 1
            part = pbfx.transform(Mlp(outputs=outputs), pbfx.Config(priming_batches=1))
            compile_ = torch.compile(backend="eager") if compiled else (lambda module: module)
            if where == "part":
                model = nn.Sequential(compile_(part), nn.Hardtanh(-9, 9))
            else:
                model = compile_(part if where == "model" else Around(part))
            optimizer = sgd(model)
            policy = pbfx.Interval(1, 1)
            return model, optimizer, pbfx.Tracker(model, optimizer, policy=policy, max_dendrites=2)

        torch.compiler.reset()
        task = regression(64)
        runs = [build(True), build(False)]
        for _ in range(5):
            for model, optimizer, tracker in runs:
                torch.manual_seed(len(tracker.history))
                train(model, optimizer, task)
                tracker.step(task.score(model))
            (compiled, _, tracker), (eager, _, twin) = runs
            assert tracker.history == twin.history
            named = {k.replace("_orig_mod.", ""): v for k, v in compiled.state_dict().items()}
            assert same(copied(named), copied(eager.state_dict()))
        assert [epoch.dendrites for epoch in tracker.history] == [0, 0, 1, 1, 2]
        assert tracker.complete

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_called_where_gradients_are_off(self, mode) -> None:
        model, optimizer, tracker = started("grow", "promote", "grow", "promote", "complete")
        for _ in range(5):
            train(model, optimizer, TASK)
            with mode():
                tracker.step(TASK.score(model))
        assert tracker.dendrites == 2
        assert not any(t.is_inference() for t in model.state_dict(keep_vars=True).values())
        train(model, optimizer, TASK)

    def test_under_another_default_dtype(self) -> None:
        torch.set_default_dtype(torch.float64)
        try:
            torch.manual_seed(0)
            model = pbfx.transform(Mlp())
            assert model.fc1.weight.dtype is torch.float64
            optimizer = sgd(model)
            task = regression(96)
            task.x, task.y = task.x.double(), task.y.double()
            tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=2)
            run(model, optimizer, tracker, task)
        finally:
            torch.set_default_dtype(torch.float32)
        assert tracker.dendrites == 2
        assert {p.dtype for p in model.parameters()} == {torch.float64}

    def test_a_tied_weight(self) -> None:
        """Dendrites of a layer whose weight belongs to another join that weight's group."""

        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up = nn.Linear(6, 6)
                self.down = nn.Linear(6, 6)
                self.down.weight = self.up.weight
                self.head = nn.Linear(6, 1)

            def forward(self, x):
                return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))

        torch.manual_seed(0)
        model = pbfx.transform(Tied(), pbfx.Config(priming_batches=1))
        optimizer = torch.optim.SGD(
            [
                {"params": [*model.head.parameters()], "lr": 1.0},
                {"params": [model.up.weight, model.up.bias, model.down.bias], "lr": 0.01},
            ]
        )
        tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=1)
        train(model, optimizer, TASK)
        tracker.step(0.0)
        train(model, optimizer, TASK)
        tracker.step(0.0)
        group = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        for name in ("up", "down", "head"):
            links = model.get_submodule(name).dendrites.to_soma
            assert group[id(links)] == (1.0 if name == "head" else 0.01)


def test_step_is_cheap_when_nothing_happens() -> None:
    """A step that only looks costs no GEMM and copies nothing."""
    model = pbfx.transform(Mlp())
    optimizer = sgd(model)
    tracker = pbfx.Tracker(model, optimizer, policy=Plateau(patience=1000))
    tracker.step(1.0)
    with torch.profiler.profile(acc_events=True) as profile:
        tracker.step(0.5)
    called = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    assert called == set()


def watch_walks(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Return a list to which every walk over a model adds it."""
    walks: list[nn.Module] = []
    for room in (parts_module, perforated_module):
        walk = room.modules_in
        monkeypatch.setattr(room, "modules_in", lambda m, walk=walk: walks.append(m) or walk(m))
    return walks


def test_a_step_walks_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pbfx.grow(pbfx.transform(Mlp()))
    tracker = pbfx.Tracker(model, sgd(model), policy=Plateau(patience=1000))
    tracker.step(1.0)
    walks = watch_walks(monkeypatch)
    tracker.step(0.0)
    assert walks == [model]


def test_a_restructure_walks_the_model_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pbfx.transform(Mlp())
    optimizer = sgd(model)
    tracker = pbfx.Tracker(
        model, optimizer, policy=pbfx.Interval(neuron_epochs=1, dendrite_epochs=1)
    )
    train(model, optimizer, TASK)
    walks = watch_walks(monkeypatch)
    assert tracker.step(1.0).phase is Phase.DENDRITE
    # What freezes is not who changed the structure.
    assert walks == [model] * 3
    train(model, optimizer, TASK)
    walks.clear()
    assert tracker.step(1.0).dendrites == 1
    assert walks == [model] * 2


def test_a_better_epoch_overwrites_the_copy_of_the_last() -> None:
    model = pbfx.transform(Mlp())
    optimizer = sgd(model)
    tracker = pbfx.Tracker(model, optimizer, policy=Plateau(patience=1000))
    tracker.step(0.0)
    places = {name: tensor.data_ptr() for name, tensor in tracker._run.current.tensors.items()}
    train(model, optimizer, TASK)
    tracker.step(1.0)
    assert tracker._run.current.score == 1.0
    assert same(tracker._run.current.tensors, network(model))
    assert places == {name: t.data_ptr() for name, t in tracker._run.current.tensors.items()}
    # Into another dtype there is no copying over.
    model.double()
    tracker.step(2.0)
    assert tracker._run.current.tensors["fc1.weight"].dtype is torch.float64


def test_entering_twice_is_one_phase() -> None:
    """The policy sees the scores of this dendrite phase only, whatever came before."""
    model = pbfx.transform(Mlp())
    tracker = enter_dendrite_phase(model, sgd(model), epochs=2)
    quiet_step(tracker)
    assert quiet_step(tracker).phase is Phase.NEURON
