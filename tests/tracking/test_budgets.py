"""Budgets: a growth that would exceed one is declined, and the reason says so."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pbfx
import pbfx_kernels.flops  # noqa: F401  registers the formulas
from learning.loops import Around, Cnn, Mlp, copied, images, network, regression, run, same, sgd
from pbfx import Interval, Phase, Plateau, TrackerError
from pbfx.budget import grown_flops
from pbfx.parts import growth_parameters, parameter_count, survey

TASK = regression(96)


def tracked(model: torch.nn.Module, policy: pbfx.Policy | None = None, **settings: object):
    optimizer = sgd(model)
    policy = Interval(1, 1) if policy is None else policy
    return optimizer, pbfx.Tracker(model, optimizer, policy=policy, **settings)


class TestParameters:
    @pytest.mark.parametrize("learning", ["perforated", "gradient"])
    @pytest.mark.parametrize("dendrites", [0, 1, 2])
    def test_as_many_dendrites_grow_as_fit_exactly(self, learning: str, dendrites: int) -> None:
        config = pbfx.Config(learning=learning, priming_batches=1)
        wanted = parameter_count(
            pbfx.grow(pbfx.transform(Mlp()), dendrites) if dendrites else Mlp()
        )
        for budget, grown in ((wanted, dendrites), (wanted + 1, dendrites)):
            torch.manual_seed(0)
            model = pbfx.transform(Mlp(), config)
            optimizer, tracker = tracked(model, max_parameters=budget, max_dendrites=9)
            run(model, optimizer, tracker, TASK)
            assert tracker.complete
            assert max(epoch.dendrites for epoch in tracker.history) == grown
            assert max(epoch.parameters for epoch in tracker.history) <= budget
            assert f"max_parameters={budget:,}" in tracker.history[-1].reason

    def test_the_reason_names_what_it_would_take(self) -> None:
        model = pbfx.transform(Mlp())
        _, tracker = tracked(model, Plateau(patience=1), max_parameters=100)
        tracker.step(0.5)
        before = network(model)
        step = tracker.step(0.4)
        assert (step.complete, step.dendrites) == (True, 0)
        assert step.reason == (
            "no improvement for 1 epoch at 0.5: growing dendrite 1; declined: it would have 153 "
            "parameters, max_parameters=100"
        )
        assert same(network(model), before)


class TestFlops:
    @pytest.mark.parametrize("grown", [0, 2])
    @pytest.mark.parametrize("kind", ["mlp", "cnn", "around"])
    def test_predicted_is_what_the_grown_model_takes(self, kind: str, grown: int) -> None:
        torch.manual_seed(0)
        model, x = {
            "mlp": lambda: (pbfx.transform(Mlp()), torch.randn(3, 6)),
            "cnn": lambda: (pbfx.transform(Cnn()), torch.randn(3, 1, 8, 8)),
            "around": lambda: (Around(pbfx.transform(Mlp(outputs=5))), torch.randn(3, 6)),
        }[kind]()
        if grown:
            pbfx.grow(model, grown)
        before, stream = copied(model.state_dict()), torch.get_rng_state()
        predicted = grown_flops(model, x)
        assert same(before, copied(model.state_dict()))
        assert torch.equal(stream, torch.get_rng_state())
        assert model.training
        pbfx.grow(model, 1)
        model.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        assert predicted == counter.get_total_flops() > 0

    def test_a_growth_that_takes_too_much_is_declined(self) -> None:
        torch.manual_seed(0)
        model, x = pbfx.transform(Mlp(), pbfx.Config(priming_batches=1)), torch.randn(1, 6)
        limit = grown_flops(model, x)
        optimizer, tracker = tracked(model, max_flops=limit, example_inputs=(x,))
        run(model, optimizer, tracker, TASK)
        assert max(epoch.dendrites for epoch in tracker.history) == 1
        assert f"max_flops={limit:,}" in tracker.history[-1].reason

    def test_inputs_that_do_not_fit_move_nothing(self) -> None:
        model = pbfx.transform(Mlp())
        _, tracker = tracked(model, max_flops=10, example_inputs=torch.randn(1, 7))
        with pytest.raises(TrackerError, match="forward fails on example_inputs: RuntimeError"):
            tracker.step(0.5)
        assert tracker.history == ()


class TestEpochs:
    @pytest.mark.parametrize("longest", range(1, 9))
    @pytest.mark.parametrize("learning", ["perforated", "gradient"])
    def test_no_run_is_longer(self, longest: int, learning: str) -> None:
        torch.manual_seed(0)
        model = pbfx.transform(Mlp(), pbfx.Config(learning=learning, priming_batches=1))
        optimizer, tracker = tracked(model, Interval(2, 1), max_epochs=longest, max_dendrites=9)
        run(model, optimizer, tracker, TASK)
        assert tracker.complete
        assert len(tracker.history) <= longest
        # What was begun could be judged: no dendrite phase is the last.
        assert tracker.history[-1].phase is Phase.NEURON
        assert "max_epochs" in tracker.history[-1].reason
        growth = 3 if learning == "perforated" else 2
        assert len(tracker.history) + growth > longest

    def test_a_policy_of_ones_own_may_be_cut_short(self) -> None:
        torch.manual_seed(0)
        model = pbfx.transform(Mlp(), pbfx.Config(priming_batches=1))
        optimizer, tracker = tracked(model, pbfx.Never(), max_epochs=3)
        run(model, optimizer, tracker, TASK)
        assert len(tracker.history) == 3
        assert tracker.history[-1].reason == "epoch 3; max_epochs=3 is reached"

    def test_in_a_dendrite_phase_the_network_before_comes_back(self) -> None:
        torch.manual_seed(0)
        model = pbfx.transform(Mlp(), pbfx.Config(priming_batches=1))

        def policy(now: pbfx.Situation) -> pbfx.Decision:
            grow = now.phase is Phase.NEURON
            action = pbfx.Action.GROW if grow else pbfx.Action.CONTINUE
            return pbfx.Decision(action, "grow and wait")

        optimizer, tracker = tracked(model, policy, max_epochs=3)
        keys = list(model.state_dict())
        run(model, optimizer, tracker, TASK)
        assert (tracker.complete, tracker.dendrites) == (True, 0)
        assert list(model.state_dict()) == keys

    def test_plateau_knows_how_long_a_growth_takes(self) -> None:
        policy = Plateau(patience=[9, 3], candidate_patience=2, max_epochs=[None, 7, 2])
        assert policy.growth_epochs(0, True) == 3 + 4
        assert policy.growth_epochs(0, False) == 4
        assert policy.growth_epochs(1, True) == 3 + 2
        assert Plateau(max_candidate_epochs=1).growth_epochs(0, True) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_parameters": 0}, "max_parameters must be a whole number of at least 1, got 0"),
        ({"max_flops": 1.5, "example_inputs": 1}, "max_flops must be a whole number"),
        ({"max_epochs": True}, "max_epochs must be a whole number of at least 1, got True"),
        ({"max_flops": 10}, "needs example_inputs"),
        ({"max_epochs": 0, "max_parameters": "9"}, "max_parameters must .*; max_epochs must"),
    ],
)
def test_bad_budgets_are_named(settings: dict, message: str) -> None:
    with pytest.raises(TrackerError, match=message):
        tracked(pbfx.transform(Mlp()), **settings)


def test_whole_numbers_may_be_written_as_floats() -> None:
    model = pbfx.transform(Cnn())
    _, tracker = tracked(model, max_parameters=1e6)
    assert tracker.budget.max_parameters == 10**6
    assert images(16).score(model) < 0


def test_a_site_on_some_channels_is_counted_by_those() -> None:
    model = pbfx.grow(pbfx.transform(Mlp()), 1, "fc1", channels=[0, 2])
    found = survey(model)
    more = growth_parameters(found.parts, 2)
    predicted = grown_flops(model, torch.randn(3, 6))
    for _ in range(2):
        pbfx.grow(model)
    assert found.parameters + more == parameter_count(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pbfx.transform(Mlp())(torch.randn(3, 6))
    assert predicted < 2 * counter.get_total_flops()
    # What explain says of one more dendrite is the same.
    model = pbfx.grow(pbfx.transform(Mlp()), 1, "fc1", channels=[0, 2])
    costs = sum(site.next_dendrite for site in pbfx.explain(model).sites)
    assert costs == growth_parameters(survey(model).parts)
