"""In the dendrite phase the network is frozen: its numbers, its statistics, its noise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pbfx
from models import CASES, Case, assert_equal, each_case, outputs, perceptron, randomise, run
from pbfx.parts import candidate_parameters
from pbfx.phase import Phase
from pbfx.restructure import promote, start_dendrite_phase, thaw

# Its dropout hides in a module of which no graph shows the mode.
HIDDEN_MODE = ("attention",)


def grown(case: Case, dendrites: int) -> nn.Module:
    model = pbfx.transform(case.build())
    for _ in range(3):
        # Running statistics of their own.
        run(model, case.input())
    if dendrites:
        randomise(pbfx.grow(model, dendrites))
    return model


def network(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what the network computes with, candidates left out."""
    return {n: t for n, t in model.state_dict().items() if ".candidates." not in n}


def frozen_output(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Run the network in eval; for frozen weights torch picks other kernels here and there."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    for parameter in trainable:
        parameter.requires_grad_(False)
    # The fused path of attention rounds otherwise than the parts that carry dendrites.
    torch.backends.mha.set_fastpath_enabled(False)
    found = run(model.eval(), x)
    torch.backends.mha.set_fastpath_enabled(True)
    for parameter in trainable:
        parameter.requires_grad_(True)
    for module in training:
        module.training = True
    return found


def learn(model: nn.Module, x: torch.Tensor, steps: int = 3) -> None:
    """Do what a user's loop does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        sum(out.square().sum() for out in run(model, x, step)).backward()
        optimizer.step()


@each_case
@pytest.mark.parametrize("dendrites", [0, 2])
def test_the_output_is_that_of_the_base_in_eval(case: Case, dendrites: int):
    model, x = grown(case, dendrites), case.input()
    expected = frozen_output(model, x)
    start_dendrite_phase(model)
    assert model.training
    assert_equal(run(model, x, 1), expected)
    assert_equal(run(model.train(), x, 2), expected)
    assert_equal(run(nn.Sequential(model).train()[0], x, 3), expected)
    assert_equal(run(model.eval(), x, 4), expected)


@pytest.mark.parametrize("name", sorted(CASES.keys() - set(HIDDEN_MODE)))
def test_nor_does_train_on_a_submodule_change_it(name: str):
    case = CASES[name]
    model, x = grown(case, 1), case.input()
    expected = frozen_output(model, x)
    start_dendrite_phase(model)
    for module in model.modules():
        # Spectral norm iterates in train mode; no graph shows that either.
        if "parametri" not in type(module).__module__:
            module.training = True
    assert_equal(run(model, x), expected)


@each_case
def test_the_numbers_of_the_base_do_not_move(case: Case):
    model, x = grown(case, 1), case.input()
    before = {name: value.clone() for name, value in network(model).items()}
    start_dendrite_phase(model)
    assert network(model).keys() == before.keys()
    learn(model, x)
    for name, value in network(model).items():
        assert torch.equal(value, before[name]), name


@each_case
@pytest.mark.parametrize("dendrites", [0, 1])
def test_only_candidates_learn(case: Case, dendrites: int):
    model, x = grown(case, dendrites), case.input()
    sum(out.sum() for out in run(model, x)).backward()
    start_dendrite_phase(model)
    pools = candidate_parameters(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == pools.keys()
    assert all(p.grad is None for p in model.parameters()), "old gradients are gone"
    sum(out.square().sum() for out in run(model, x)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in pools), name
        if name.endswith("moments"):
            assert parameter.grad.abs().sum() > 0, name


def test_candidates_see_the_error_of_every_call():
    """A site that is called twice sums over both calls, as its soma's gradient does."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x):
            return self.fc(torch.tanh(self.fc(x)))

    model, x = pbfx.transform(Twice()), torch.randn(5, 4, dtype=torch.float64)
    start_dendrite_phase(model)
    (y,) = outputs(model(x))
    y.square().sum().backward()
    moments = model.get_parameter("fc.dendrites.candidates.moments").grad.view(6, 4, 4)
    assert moments[0].eq(10).all(), "two calls of five rows"

    fc = model.get_submodule("fc")
    inner = fc(x).detach().requires_grad_()
    outer = fc(torch.tanh(inner))
    (inner_error,) = torch.autograd.grad(outer.square().sum(), inner)
    error = torch.cat([inner_error, 2 * outer.detach()])
    torch.testing.assert_close(moments[3], error.sum(0).expand(4, 4))
    torch.testing.assert_close(moments[4], error.square().sum(0).expand(4, 4))


@each_case
@pytest.mark.parametrize("dendrites", [0, 1])
def test_promoting_keeps_the_output_and_gives_the_flags_back(case: Case, dendrites: int):
    model, x = grown(case, 0), case.input()
    randomise(pbfx.grow(model, dendrites)) if dendrites else None
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    [child for name, child in model.named_children() if "dendrites" not in name][-1].eval()
    modes = {n: m.training for n, m in model.named_modules() if "dendrites" not in n}
    expected = frozen_output(model, x)
    frozen, learners = start_dendrite_phase(model)
    learn(model, x)
    promote(model, learners)
    if dendrites:
        # Evaluated together with the new ones, old dendrites are sums in another order.
        torch.testing.assert_close(run(model.eval(), x), expected)
    else:
        assert_equal(run(model.eval(), x), expected)
    thaw(model, frozen)
    assert model.perforation.phase is Phase.NEURON
    assert set(model.structure().sites) == {*case.sites}
    assert {c.dendrites for c in model.structure().sites.values()} == {dendrites + 1}
    assert not candidate_parameters(model)
    assert not any("candidates" in name for name in model.state_dict())
    assert {n: model.get_submodule(n).training for n in modes} == modes
    for name, parameter in model.named_parameters():
        new = name.endswith("to_soma")
        assert parameter.requires_grad == flags.get(name, new), name
    # The noise is back.
    again, other = run(model, x, 1)[0], run(model, x, 2)[0]
    plain = case.build()
    assert torch.equal(again, other) == torch.equal(run(plain, x, 1)[0], run(plain, x, 2)[0])


def test_a_dendrite_of_the_first_phase_feeds_the_candidates_of_the_next():
    case = CASES["perceptron"]
    model, x = grown(case, 0), case.input()
    for count in (1, 2, 3):
        frozen, learners = start_dendrite_phase(model)
        assert model.get_parameter("0.dendrites.candidates.to_dendrite").shape == (4, count - 1, 8)
        learn(model, x)
        promote(model, learners)
        thaw(model, frozen)
        assert model.get_parameter("0.dendrites.to_dendrite").shape == (count, count, 8)


@pytest.mark.parametrize("learning", ["perforated", "sham", "gradient"])
def test_who_learns_in_the_neuron_phase(learning: str):
    model = pbfx.grow(pbfx.transform(perceptron(), pbfx.Config(learning=learning)), 2)
    randomise(model)
    roles = {
        "perforated": {"to_soma"},
        "sham": set(),
        "gradient": {"weight", "bias", "to_soma", "to_dendrite"},
    }
    run(model, CASES["perceptron"].input())[0].square().sum().backward()
    found = {
        n.split(".")[-1] for n, p in model.named_parameters() if "dend" in n and p.requires_grad
    }
    assert found == roles[learning]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, name


def test_a_frozen_layer_stays_frozen():
    model = pbfx.transform(perceptron())
    model.get_parameter("0.weight").requires_grad_(False)
    frozen, learners = start_dendrite_phase(model)
    promote(model, learners)
    thaw(model, frozen)
    assert not model.get_parameter("0.weight").requires_grad
    assert model.get_parameter("4.weight").requires_grad
