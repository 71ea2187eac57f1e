"""The optimizer that the script holds is edited in place, and forgets nothing that survives."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pbfx
from learning.loops import (
    Mlp,
    Task,
    copied,
    identical,
    network,
    regression,
    same,
    sgd,
    train,
)
from pbfx import Action, Decision, RestructureError

TASK = regression(96)
LINKS = "fc1.dendrites.to_soma"


class Scripted:
    def __init__(self, *actions: str) -> None:
        self.actions = list(actions)

    def decide(self, situation: pbfx.Situation) -> Decision:
        action, _, flag = self.actions.pop(0).partition(" ")
        return Decision(Action(action), "told so", keep=flag != "drop")


def epoch(model: nn.Module, optimizer: Optimizer, tracker: pbfx.Tracker, score: float = 0.0):
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = TASK.loss_of(model)
        loss.backward()
        return loss.detach()

    model.train()
    for _ in range(2):
        optimizer.step(closure)
    return tracker.step(score)


def started(
    make: Callable[[nn.Module], Optimizer], *actions: str, learning: str = "perforated", **settings
) -> tuple[nn.Module, Optimizer, pbfx.Tracker]:
    torch.manual_seed(0)
    model = pbfx.transform(Mlp(), pbfx.Config(learning=learning, priming_batches=1))
    optimizer = make(model)
    return model, optimizer, pbfx.Tracker(model, optimizer, policy=Scripted(*actions), **settings)


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


CYCLE = ("grow", "promote", "grow", "promote", "retry drop", "promote", "complete")


def test_every_object_stays_the_same_object() -> None:
    model, optimizer, tracker = started(adam, *CYCLE)
    groups = optimizer.param_groups
    (group,) = groups
    members, state = group["params"], optimizer.state
    for _ in CYCLE:
        epoch(model, optimizer, tracker)
        assert optimizer.param_groups is groups
        assert groups[0] is group
        assert group["params"] is members
        assert optimizer.state is state
        # What it holds is what the model has, and learns or stands in for what learns.
        held = {id(p) for p in members}
        assert len(held) == len(members)
        now = dict(model.named_parameters())
        assert held <= {id(p) for p in now.values()}
        assert {id(p) for p in state} <= held
        if tracker.phase is pbfx.Phase.NEURON:
            assert held == {id(p) for p in now.values() if p.requires_grad}
        else:
            assert {id(p) for n, p in now.items() if n.endswith("moments")} <= held
            assert not held & {id(p) for n, p in now.items() if n.endswith("candidates.weight")}


def test_state_of_survivors_is_the_very_same() -> None:
    model, optimizer, tracker = started(adam, "grow", "promote", "complete")
    for _ in range(3):
        epoch(model, optimizer, tracker)
        base = {n: p for n, p in model.named_parameters() if "dendrites" not in n}
        if len(tracker.history) == 1:
            before = {n: dict(optimizer.state[p]) for n, p in base.items()}
            values = {n: copied(optimizer.state[p]) for n, p in base.items()}
        for name, parameter in base.items():
            for key, value in before[name].items():
                assert optimizer.state[parameter][key] is value
        if len(tracker.history) == 2:
            # The dendrite phase has not moved it either.
            for name, parameter in base.items():
                assert same(values[name], copied(optimizer.state[parameter]))


@pytest.mark.parametrize(
    ("make", "key", "first"),
    [
        (adam, "exp_avg", 0.0),
        (adam, "exp_avg_sq", 0.0),
        (lambda m: torch.optim.Adam(m.parameters(), amsgrad=True), "max_exp_avg_sq", 0.0),
        (lambda m: torch.optim.AdamW(m.parameters(), fused=True), "exp_avg", 0.0),
        (sgd, "momentum_buffer", 0.0),
        (lambda m: torch.optim.Rprop(m.parameters(), lr=0.02), "step_size", 0.02),
        (lambda m: torch.optim.Rprop(m.parameters(), lr=0.02), "prev", 0.0),
        (
            lambda m: torch.optim.Adagrad(m.parameters(), initial_accumulator_value=0.3),
            "sum",
            0.3,
        ),
        (lambda m: torch.optim.Adadelta(m.parameters()), "acc_delta", 0.0),
        (lambda m: torch.optim.RMSprop(m.parameters(), centered=True), "grad_avg", 0.0),
    ],
)
def test_state_of_a_resized_parameter_is_padded(
    make: Callable[[nn.Module], Optimizer], key: str, first: float
) -> None:
    model, optimizer, tracker = started(make, *CYCLE[:4])
    for _ in range(3):
        epoch(model, optimizer, tracker)
    # In the second dendrite phase the links of the first dendrite are still themselves.
    old = optimizer.state[model.get_parameter(LINKS)]
    kept, steps = old[key].clone(), old.get("step")
    assert kept.shape == (1, 5)
    assert kept.any()
    epoch(model, optimizer, tracker)
    new = optimizer.state[model.get_parameter(LINKS)]
    assert new[key].shape == (2, 5)
    assert identical(new[key][:1], kept)
    assert identical(new[key][1], torch.full((5,), first))
    assert new.keys() == old.keys()
    assert steps is None or new["step"] == steps
    optimizer.zero_grad()
    TASK.loss_of(model).backward()
    optimizer.step()
    assert model.get_parameter(LINKS)[1].any()


def test_state_of_a_pruned_parameter_is_cut() -> None:
    model, optimizer, tracker = started(adam, *CYCLE[:5])
    for _ in range(4):
        epoch(model, optimizer, tracker)
    assert tracker.dendrites == 2
    optimizer.state[model.get_parameter(LINKS)]["exp_avg"].copy_(torch.arange(10.0).view(2, 5))
    assert tracker.step(0.0).dendrites == 1
    cut = optimizer.state[model.get_parameter(LINKS)]["exp_avg"]
    assert identical(cut, torch.arange(5.0).view(1, 5))


def test_a_set_that_is_dropped_leaves_nothing_behind() -> None:
    model, optimizer, tracker = started(adam, "grow", "promote", "complete drop")
    before = parameters(optimizer)
    for _ in range(3):
        epoch(model, optimizer, tracker)
    assert tracker.complete
    after = parameters(optimizer)
    assert [id(p) for p in after] == [id(p) for p in before]
    assert set(optimizer.state) == set(after)


@pytest.mark.parametrize("reset", [True, False])
def test_reset_optimizer_state(reset: bool) -> None:
    model, optimizer, tracker = started(adam, "continue", "grow", reset_optimizer_state=reset)
    epoch(model, optimizer, tracker)
    assert len(optimizer.state) == 6
    epoch(model, optimizer, tracker)
    assert len(optimizer.state) == (0 if reset else 6)


def test_reset_of_an_optimizer_that_makes_its_state_only_once() -> None:
    model, optimizer, tracker = started(
        lambda m: torch.optim.Adagrad(m.parameters(), initial_accumulator_value=0.3),
        "grow",
        "promote",
        reset_optimizer_state=True,
    )
    epoch(model, optimizer, tracker)
    for parameter in parameters(optimizer):
        assert identical(optimizer.state[parameter]["sum"], torch.full_like(parameter, 0.3))
    epoch(model, optimizer, tracker)
    train(model, optimizer, TASK)


def test_new_parameters_join_the_group_of_their_soma() -> None:
    def make(model: nn.Module) -> Optimizer:
        return torch.optim.AdamW(
            [
                {"params": [model.fc1.bias, model.fc2.bias, model.head.bias], "lr": 1.0},
                {"params": [model.fc1.weight, model.fc2.weight], "lr": 0.1},
                {"params": [model.head.weight], "lr": 0.2},
            ],
            lr=0.01,
        )

    model, optimizer, tracker = started(make, "grow", "promote")

    def rate(name: str) -> float:
        parameter = model.get_parameter(name)
        return next(
            group["lr"]
            for group in optimizer.param_groups
            if any(p is parameter for p in group["params"])
        )

    epoch(model, optimizer, tracker)
    assert rate("fc1.dendrites.candidates.moments") == 0.1
    assert rate("head.dendrites.candidates.moments") == 0.2
    epoch(model, optimizer, tracker)
    assert [rate(f"{site}.dendrites.to_soma") for site in ("fc1", "fc2", "head")] == [0.1, 0.1, 0.2]


def test_a_soma_that_is_not_optimised_lends_its_dendrites_to_the_first_group() -> None:
    def make(model: nn.Module) -> Optimizer:
        model.fc1.weight.requires_grad_(False)
        return torch.optim.SGD(
            [{"params": [model.fc2.weight]}, {"params": [model.head.weight]}], 0.1
        )

    model, optimizer, tracker = started(make, "grow", "promote")
    for _ in range(2):
        epoch(model, optimizer, tracker)
    first = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert id(model.get_parameter(LINKS)) in first


def test_named_optimizers_keep_their_names_aligned() -> None:
    def make(model: nn.Module) -> Optimizer:
        named = dict(model.named_parameters())
        return torch.optim.AdamW(
            [
                {"params": [(n, p) for n, p in named.items() if n.endswith("bias")]},
                {"params": [(n, p) for n, p in named.items() if n.endswith("weight")]},
            ]
        )

    model, optimizer, tracker = started(make, *CYCLE)
    for _ in CYCLE:
        epoch(model, optimizer, tracker)
        for group in optimizer.param_groups:
            assert len(group["param_names"]) == len(group["params"])
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                assert model.get_parameter(name) is parameter
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_parameters_from_elsewhere_stay_where_they_are() -> None:
    scale = nn.Parameter(torch.ones(3))

    def make(model: nn.Module) -> Optimizer:
        return torch.optim.SGD([*model.fc1.parameters(), scale, *model.head.parameters()], 0.1)

    model, optimizer, tracker = started(make, *CYCLE)
    for _ in CYCLE:
        epoch(model, optimizer, tracker)
        assert parameters(optimizer)[2] is scale
        assert parameters(optimizer)[:2] == [model.fc1.weight, model.fc1.bias]
    assert identical(scale, torch.ones(3))


def test_lbfgs_starts_afresh_when_the_number_of_parameters_changes() -> None:
    model, optimizer, tracker = started(
        lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3), "continue", *CYCLE[:2]
    )
    epoch(model, optimizer, tracker)
    assert optimizer.state
    for _ in range(2):
        epoch(model, optimizer, tracker)
    assert not optimizer.state
    before = model.get_parameter(LINKS).detach().clone()
    optimizer.step(lambda: closure(model, optimizer))
    assert not identical(before, model.get_parameter(LINKS))
    assert optimizer._params is optimizer.param_groups[0]["params"]


def closure(model: nn.Module, optimizer: Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = TASK.loss_of(model)
    loss.backward()
    return loss.detach()


def test_adafactor_starts_a_resized_matrix_afresh() -> None:
    """Its factors have no element for each of the parameter's; for one neuron they look so."""
    model, optimizer, tracker = started(
        lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01), *CYCLE[:4]
    )
    for _ in range(4):
        epoch(model, optimizer, tracker)
    assert tracker.dendrites == 2
    for name in ("fc1", "head"):
        assert not optimizer.state.get(model.get_submodule(name).dendrites.to_soma)
    train(model, optimizer, TASK)
    assert model.head.dendrites.to_soma[1].any()


def test_muon_trains_links_but_no_stack_of_matrices() -> None:
    def make(model: nn.Module) -> Optimizer:
        return torch.optim.Muon([model.fc1.weight, model.fc2.weight], lr=0.01)

    model, optimizer, tracker = started(make, "grow", learning="gradient")
    train(model, optimizer, TASK)
    before, members = network(model), list(parameters(optimizer))
    with pytest.raises(
        RestructureError, match=r"Muon steps matrices only, and \S+ has shape \(1, "
    ):
        tracker.step(0.0)
    assert same(before, network(model))
    assert parameters(optimizer) == members


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    rate = torch.tensor(0.1)
    model, optimizer, tracker = started(
        lambda m: torch.optim.AdamW(m.parameters(), lr=rate), "continue", "grow"
    )
    held = optimizer.param_groups[0]["lr"]
    epoch(model, optimizer, tracker)
    held.fill_(0.05)
    epoch(model, optimizer, tracker)
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == pytest.approx(0.1)
    assert tracker.history[1].learning_rates == (pytest.approx(0.05),)


def test_gradient_accumulated_across_a_growth_is_dropped() -> None:
    """A half accumulated gradient belongs to weights that growing has just replaced."""
    model, _, tracker = started(sgd, "continue", "grow")
    TASK.loss_of(model).backward()
    tracker.step(1.0)
    assert model.fc1.weight.grad is not None
    tracker.step(0.0)
    assert all(p.grad is None for p in model.parameters())


def test_the_trajectory_does_not_depend_on_how_often_the_tracker_looks() -> None:
    """A tracker that only watches leaves a run bit for bit as it is without one."""

    def fitted(watch: bool) -> tuple[dict[str, Tensor], Task]:
        torch.manual_seed(0)
        model = pbfx.transform(Mlp()) if watch else Mlp()
        optimizer = adam(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        if watch:
            tracker = pbfx.Tracker(model, optimizer, scheduler, policy=pbfx.Plateau(patience=99))
        for _ in range(6):
            train(model, optimizer, TASK)
            score = TASK.score(model)
            if watch:
                tracker.step(score)
            else:
                scheduler.step()
        return network(model), TASK

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(fitted(True)[0], fitted(False)[0])
