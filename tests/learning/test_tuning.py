"""Dendrites whose weights train: in every neuron phase, or in a last one with everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pbfx
from learning.loops import (
    Cnn,
    Mlp,
    copied,
    identical,
    images,
    network,
    regression,
    relative_error,
    same,
    sgd,
    train,
)
from pbfx import Action
from pbfx.dendrites import Dendrites
from pbfx.perforated import PerforatedModule

ROLES = ("weight", "bias", "to_soma", "to_dendrite")
FROZEN_ROLES = ("weight", "bias", "to_dendrite")


def dendrites_of(model: nn.Module) -> dict[str, Dendrites]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Dendrites)}


def trained(
    until: Action | None,
    *,
    dendrites: int = 2,
    score: Callable[[int], float] = float,
    policy: pbfx.Policy | None = None,
    directory: Path | None = None,
    **settings: object,
) -> tuple[nn.Module, pbfx.Tracker]:
    """Train to the end, or until a decision; `score` maps an epoch's number to its score."""
    torch.manual_seed(0)
    task = regression(96)
    config = pbfx.Config(**{"priming_batches": 1, "measure_every": 2, "finish": True, **settings})
    model = pbfx.transform(Mlp(), config)
    tracker = pbfx.Tracker(
        model,
        sgd(model),
        policy=pbfx.Interval(2, 1) if policy is None else policy,
        max_dendrites=dendrites,
        directory=directory,
    )
    while not tracker.complete:
        train(model, tracker.optimizer, task)
        tracker.step(score(len(tracker.history)))
        if tracker.history[-1].action is until:
            break
    return model, tracker


def held(tracker: pbfx.Tracker) -> set[int]:
    return {id(p) for group in tracker.optimizer.param_groups for p in group["params"]}


def test_one_more_neuron_phase_stands_before_completion() -> None:
    _, tracker = trained(None, dendrites=1)
    assert [str(epoch.action) for epoch in tracker.history] == [
        *("continue", "grow", "promote", "continue", "finish", "continue", "complete"),
    ]
    assert {epoch.dendrites for epoch in tracker.history[3:]} == {1}
    assert "train with everything else" in tracker.history[4].reason


@pytest.mark.parametrize("learning", ["perforated", "sham", "gradient"])
def test_every_mode_has_the_phase(learning: str) -> None:
    """Arms of a study then train for the same number of epochs."""
    _, tracker = trained(None, dendrites=1, learning=learning)
    actions = [epoch.action for epoch in tracker.history]
    assert actions.count(Action.FINISH) == 1
    assert actions[-3:] == [Action.FINISH, Action.CONTINUE, Action.COMPLETE]


def test_a_network_without_dendrites_completes_at_once() -> None:
    _, tracker = trained(None, dendrites=0)
    assert Action.FINISH not in {epoch.action for epoch in tracker.history}


def test_everything_trains_in_the_last_phase() -> None:
    model, tracker = trained(Action.FINISH)
    before = copied(dict(model.named_parameters()))
    for name, dendrites in dendrites_of(model).items():
        for role in ROLES:
            parameter = getattr(dendrites, role)
            assert parameter.requires_grad, (name, role)
            assert id(parameter) in held(tracker), (name, role)
    train(model, tracker.optimizer, regression(96))
    for name, dendrites in dendrites_of(model).items():
        for role in ROLES:
            moved = getattr(dendrites, role) - before[f"{name}.{role}"]
            moved = moved[1, 0] if role == "to_dendrite" else moved
            assert moved.any(), (name, role)


def test_the_last_phase_backpropagates_through_dendrites() -> None:
    """By finite differences of the whole network, to inputs and to every parameter."""
    model, _ = trained(Action.FINISH)
    model.double()
    for dendrites in dendrites_of(model).values():
        nn.init.normal_(dendrites.to_soma)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    named = dict(model.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(named, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *named.values()))


def test_the_last_phase_starts_from_the_best_network_and_changes_no_output() -> None:
    x = regression(64).x
    torch.manual_seed(0)
    task, model = regression(96), pbfx.transform(Mlp(), pbfx.Config(finish=True))
    tracker = pbfx.Tracker(model, sgd(model), policy=pbfx.Interval(2, 1), max_dendrites=1)
    best = None
    for score in (0.0, 1.0, 0.0, 3.0, 2.0):
        train(model, tracker.optimizer, task)
        if score == 3.0:
            best = model.eval()(x).detach()
        tracker.step(score)
    assert tracker.history[-1].action is Action.FINISH
    assert best is not None
    assert relative_error(model.eval()(x).detach(), best) < 1e-6


@pytest.mark.parametrize("helps", [True, False], ids=["kept", "dropped"])
def test_the_last_phase_is_kept_only_if_it_helped(helps: bool) -> None:
    model, tracker = trained(Action.FINISH, dendrites=1)
    before = network(model)
    scores = (50.0, 40.0) if helps else (-50.0, -40.0)
    after = {}
    for score in scores:
        train(model, tracker.optimizer, regression(96))
        after[score] = network(model)
        step = tracker.step(score)
    assert step.complete
    assert ("helped" in step.reason, "did not help" in step.reason) == (helps, not helps)
    assert same(network(model), after[50.0] if helps else before)


def test_afterwards_dendrites_are_frozen_again() -> None:
    model, tracker = trained(None)
    before = copied(dict(model.named_parameters()))
    assert not any(d.backpropagates for d in dendrites_of(model).values())
    # The optimizer holds them still; it decays weights, and has momentum for each.
    train(model, tracker.optimizer, regression(96))
    for name, dendrites in dendrites_of(model).items():
        for role in FROZEN_ROLES:
            assert not getattr(dendrites, role).requires_grad, (name, role)
            assert identical(getattr(dendrites, role), before[f"{name}.{role}"]), (name, role)


def test_a_sham_stays_a_sham() -> None:
    model, tracker = trained(Action.FINISH, learning="sham")
    before = copied(dict(model.named_parameters()))
    train(model, tracker.optimizer, regression(96))
    for name, dendrites in dendrites_of(model).items():
        assert not dendrites.to_soma.any()
        for role in ROLES:
            assert identical(getattr(dendrites, role), before[f"{name}.{role}"]), (name, role)


class Stubborn:
    """Grows once, and goes on trying for ever."""

    def decide(self, situation: pbfx.Situation) -> pbfx.Decision:
        if situation.phase is pbfx.Phase.DENDRITE:
            return pbfx.Decision(Action.PROMOTE, "enough")
        if situation.accepted is None:
            return pbfx.Decision(Action.GROW, "the first")
        if situation.attempt < 1 and not situation.finishing:
            return pbfx.Decision(Action.RETRY, "another")
        grown = situation.dendrites > 0 and not situation.finishing
        return pbfx.Decision(Action.COMPLETE if grown else Action.RETRY, "whatever")


def test_a_policy_need_not_know_the_phase() -> None:
    _, tracker = trained(None, dendrites=1, policy=Stubborn())
    assert [str(epoch.action) for epoch in tracker.history] == [
        *("grow", "promote", "retry", "promote", "finish", "complete"),
    ]


def test_a_policy_may_decide_it_itself() -> None:
    class Own(Stubborn):
        def decide(self, situation: pbfx.Situation) -> pbfx.Decision:
            decision = super().decide(situation)
            if decision.action is Action.COMPLETE and not situation.finishing:
                return pbfx.Decision(Action.FINISH, "now all of it")
            return decision

    _, tracker = trained(None, dendrites=1, policy=Own(), finish=False)
    actions = [epoch.action for epoch in tracker.history]
    assert actions[-2:] == [Action.FINISH, Action.COMPLETE]


def test_a_failure_leaves_the_dendrites_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tracker = trained(Action.PROMOTE, dendrites=1)
    train(model, tracker.optimizer, regression(96))
    tracker.step(10.0)
    before, members = network(model), held(tracker)
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    train(model, tracker.optimizer, regression(96))
    trained_on = network(model)

    def fail(_: PerforatedModule) -> None:
        raise ValueError("no graph today")

    with monkeypatch.context() as broken:
        broken.setattr(PerforatedModule, "rebuild", fail)
        with pytest.raises(pbfx.RestructureError, match="no graph today"):
            tracker.step(9.0)
    assert not any(d.finishing for d in dendrites_of(model).values())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learns
    assert held(tracker) == members
    assert same(network(model), trained_on)
    step = tracker.step(9.0)
    assert step.restructured
    assert same(network(model), before)
    assert all(d.finishing for d in dendrites_of(model).values())


def test_a_run_that_stops_in_the_last_phase_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    def task_epochs(model: nn.Module, tracker: pbfx.Tracker) -> dict[str, Tensor]:
        for number in range(3):
            train(model, tracker.optimizer, regression(96))
            tracker.step(20.0 + number)
        assert tracker.complete
        return network(model)

    model, tracker = trained(Action.FINISH, directory=tmp_path, policy=pbfx.Interval(3, 1))
    pbfx.save(model, tmp_path / "stopped.safetensors", tracker)
    through = task_epochs(model, tracker)

    other = pbfx.transform(Mlp(), model.perforation.config)
    again = pbfx.Tracker(other, sgd(other), policy=pbfx.Interval(3, 1), max_dendrites=2)
    pbfx.load(tmp_path / "stopped.safetensors", other, again)
    assert all(d.finishing for d in dendrites_of(other).values())
    assert same(task_epochs(other, again), through)


@pytest.mark.parametrize("settings", [{"tuning": "all"}, {"tuning": "newest"}, {"finish": True}])
def test_muon_is_refused_before_anything_trains(settings: dict[str, object]) -> None:
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 1, bias=False))
    model = pbfx.transform(net, pbfx.Config(**settings))
    with pytest.raises(pbfx.TrackerError, match="Muon steps matrices only"):
        pbfx.Tracker(model, torch.optim.Muon(model.parameters()))


def of_all(net: nn.Module, count: int = 2, tuning: str = "all") -> nn.Module:
    """Grow dendrites that matter, all of whose weights train."""
    model = pbfx.grow(pbfx.transform(net, pbfx.Config(tuning=tuning)), count).double().eval()
    for dendrites in dendrites_of(model).values():
        nn.init.normal_(dendrites.to_soma)
        nn.init.normal_(dendrites.to_dendrite)
    return model


def oracle(model: nn.Module, kind: type[nn.Module], x: Tensor) -> Tensor:
    """Compute `kind`'s forward with dendrites from the equations, in torch's own functions."""
    hooks = []
    for module in model.modules():
        dendrites = getattr(module, "dendrites", None)
        if not isinstance(dendrites, Dendrites):
            continue

        def add(soma: nn.Module, inputs: tuple[Tensor, ...], out: Tensor, d=dendrites) -> Tensor:
            (x,) = inputs
            shape = (-1, *(1,) * (out.dim() - 2))
            older: list[Tensor] = []
            for row in range(d.count):
                values = {"weight": d.weight[row]}
                if d.bias is not None:
                    values["bias"] = d.bias[row]
                # `forward` alone, so that no hook runs.
                z = torch.func.functional_call(_Bare(soma), _named(values), (x.detach(),))
                for e, a in enumerate(older):
                    z = z + d.to_dendrite[row, e].view(shape) * a
                older.append(torch.tanh(z))
                out = out + d.to_soma[row].view(shape) * older[-1]
            return out

        hooks.append(module.register_forward_hook(add))
    try:
        return kind.forward(model.original(), x)
    finally:
        for hook in hooks:
            hook.remove()


class _Bare(nn.Module):
    def __init__(self, soma: nn.Module) -> None:
        super().__init__()
        self.soma = soma

    def forward(self, x: Tensor) -> Tensor:
        return type(self.soma).forward(self.soma, x)


def _named(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"soma.{name}": value for name, value in values.items()}


class Conv(nn.Module):
    """A strided and a plain convolution, and nothing between them but a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, stride=2)
        self.conv2 = nn.Conv2d(4, 3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.tanh(self.conv1(x)))


@pytest.mark.parametrize("kind", [Mlp, Conv])
def test_weights_learn_from_their_neurons_error_and_pass_none_on(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = of_all(kind())
    x = torch.randn(*((5, 6) if kind is Mlp else (5, 1, 8, 8)), dtype=torch.float64)
    x.requires_grad_()
    named = {"x": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    assert sum(".dendrites." in name for name in named) == (12 if kind is Mlp else 7)
    weigh = torch.randn_like(model(x))
    ours = torch.autograd.grad((model(x) * weigh).sum(), list(named.values()))
    expected = torch.autograd.grad((oracle(model, kind, x) * weigh).sum(), list(named.values()))
    for name, found, wanted in zip(named, ours, expected, strict=True):
        if name.endswith("to_dendrite"):
            found, wanted = found[1, 0], wanted[1, 0]
        assert relative_error(found, wanted) < 1e-12, name


@pytest.mark.parametrize("kind", [Mlp, Conv])
def test_of_three_dendrites_the_newest_alone_gets_a_gradient(kind: type[nn.Module]) -> None:
    """The others' are zero, so that clipping by the norm of all does not see them either."""
    torch.manual_seed(0)
    every, newest = of_all(kind(), 3), of_all(kind(), 3, "newest")
    newest.load_state_dict(every.state_dict())
    x = torch.randn(*((5, 6) if kind is Mlp else (5, 1, 8, 8)), dtype=torch.float64)
    weigh = torch.randn_like(every(x))
    for model in (every, newest):
        (model(x) * weigh).sum().backward()
    wanted = dict(every.named_parameters())
    for name, parameter in newest.named_parameters():
        gradient = wanted[name].grad
        assert parameter.grad is not None
        assert gradient is not None
        if ".dendrites." in name and not name.endswith("to_soma"):
            assert not parameter.grad[:-1].any(), name
            # Of the links only those into the newest are read by it alone.
            assert relative_error(parameter.grad[-1], gradient[-1]) < 1e-12, name
        else:
            assert relative_error(parameter.grad, gradient) < 1e-12, name


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_older_dendrites_keep_every_bit_while_the_newest_trains(kind: str) -> None:
    """Through growths, in which momentum of the time when they were the newest stays behind."""
    torch.manual_seed(0)
    task = regression(96)
    config = pbfx.Config(tuning="newest", priming_batches=1, measure_every=2)
    model = pbfx.transform(Mlp(), config)
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(2, 1), max_dendrites=3)

    def epoch() -> None:
        for x, y in task.batches():

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = task.loss(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)

    checked = set()
    while not tracker.complete:
        before = copied(dict(model.named_parameters()))
        epoch()
        neuron = tracker.phase is pbfx.Phase.NEURON
        for name, dendrites in dendrites_of(model).items():
            for role in FROZEN_ROLES if dendrites.count else ():
                now, old = getattr(dendrites, role), before[f"{name}.{role}"]
                assert identical(now[:-1], old[:-1]), (name, role)
                if role == "to_dendrite" and dendrites.count == 1:
                    continue
                assert identical(now[-1], old[-1]) is not neuron, (name, role)
                checked.add((dendrites.count, neuron))
        tracker.step(float(len(tracker.history)))
    assert checked == {(1, True), (1, False), (2, True), (2, False), (3, True)}


def test_weights_loaded_between_steps_are_kept() -> None:
    """What a step must not move is what was there before the step, whoever put it there."""
    torch.manual_seed(0)
    model = pbfx.grow(pbfx.transform(Mlp(), pbfx.Config(tuning="newest")), 2)
    optimizer = sgd(model)
    tracker = pbfx.Tracker(model, optimizer)
    train(model, optimizer, regression(96))
    other = {name: t + 1 for name, t in network(model).items()}
    model.load_state_dict(other)
    train(model, optimizer, regression(96))
    for name, dendrites in dendrites_of(model).items():
        assert dendrites.holds_older
        assert identical(dendrites.weight[:-1], other[f"{name}.weight"][:-1]), name
        assert not identical(dendrites.weight[-1:], other[f"{name}.weight"][-1:]), name
    assert tracker.dendrites == 2


def test_in_the_last_phase_older_dendrites_are_free() -> None:
    model, tracker = trained(Action.FINISH, tuning="newest")
    before = copied(dict(model.named_parameters()))
    train(model, tracker.optimizer, regression(96))
    for name, dendrites in dendrites_of(model).items():
        assert not identical(dendrites.weight[:-1], before[f"{name}.weight"][:-1]), name


def test_neuron_phases_tune_what_is_accepted_and_dendrite_phases_do_not() -> None:
    torch.manual_seed(0)
    model = pbfx.transform(Cnn(), pbfx.Config(tuning="all", priming_batches=1, measure_every=2))
    task, optimizer = images(48), sgd(model)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(2, 2), max_dendrites=2)
    moved = {pbfx.Phase.NEURON: 0, pbfx.Phase.DENDRITE: 0}
    while not tracker.complete:
        before = copied(dict(model.named_parameters()))
        train(model, optimizer, task)
        for name, dendrites in dendrites_of(model).items():
            for role in FROZEN_ROLES if dendrites.count else ():
                now, old = getattr(dendrites, role), before.get(f"{name}.{role}")
                assert now is None or now.requires_grad is (tracker.phase is pbfx.Phase.NEURON)
                if old is not None and now.numel() and not identical(now, old):
                    moved[tracker.phase] += 1
        tracker.step(float(len(tracker.history)))
    assert moved[pbfx.Phase.DENDRITE] == 0
    assert moved[pbfx.Phase.NEURON] > 0


def test_tuning_has_no_effect_on_the_other_modes() -> None:
    for learning in ("gradient", "sham"):
        plain, tuned = (
            trained(None, dendrites=1, learning=learning, tuning=tuning, finish=False)
            for tuning in ("links", "newest")
        )
        assert same(network(plain[0]), network(tuned[0])), learning


@pytest.mark.parametrize("settings", [{"tuning": "all"}, {"finish": True}])
def test_a_compiled_model_trains_them_too(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    task = regression(96)
    model = pbfx.transform(Mlp(), pbfx.Config(priming_batches=1, measure_every=2, **settings))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = sgd(model)
    tracker = pbfx.Tracker(compiled, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=1)
    train(compiled, optimizer, task)
    while tracker.history[-1:] == () or tracker.history[-1].action is not Action.PROMOTE:
        tracker.step(float(len(tracker.history)))
        train(compiled, optimizer, task)
    if "finish" in settings:
        tracker.step(9.0)
        assert tracker.history[-1].action is Action.FINISH
    before = copied(dict(model.named_parameters()))
    train(compiled, optimizer, task)
    for name, dendrites in dendrites_of(model).items():
        for role in ("weight", "bias", "to_soma"):
            assert not identical(getattr(dendrites, role), before[f"{name}.{role}"]), (name, role)
