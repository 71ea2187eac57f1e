"""State dicts of plain and of grown models load into models that stand elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pbfx
from models import CASES, Case, assert_equal, each_case, perceptron, randomise, run
from pbfx.parts import candidate_parameters
from pbfx.phase import Phase
from pbfx.restructure import start_dendrite_phase


class Parent(nn.Module):
    """A model of which one part is perforated."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.before, self.part = nn.Linear(5, 5), part

    def forward(self, x):
        return self.part(self.before(x))


def source(case: Case, phase: str, seed: int = 0) -> nn.Module:
    model = pbfx.transform(case.build(seed))
    randomise(pbfx.grow(model, 2))
    pbfx.grow(model, 1, sites=case.sites[-1:])
    if phase == "dendrite":
        start_dendrite_phase(model)
    return model


@each_case
@pytest.mark.parametrize("phase", ["neuron", "dendrite"])
def test_a_fresh_model_grows_to_what_it_loads(case: Case, phase: str):
    trained = source(case, phase)
    fresh = pbfx.transform(case.build(seed=9))
    fresh.load_state_dict(trained.state_dict())
    assert fresh.structure() == trained.structure()
    assert fresh.perforation.phase == Phase(phase)
    assert fresh.code == trained.code
    for key, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    # torch picks other kernels for frozen weights, in recurrent layers for example.
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_(trained.get_parameter(name).requires_grad)
    # Dropouts that no graph shows fall alike: the network is held in eval here, too.
    assert_equal(run(fresh, case.input()), run(trained, case.input()))
    assert_equal(run(fresh.eval(), case.input()), run(trained.eval(), case.input()))


@pytest.mark.parametrize("phase", ["neuron", "dendrite"])
def test_so_does_a_part_of_a_larger_model(phase: str):
    case = CASES["perceptron"]
    trained = Parent(source(case, phase))
    fresh = Parent(pbfx.transform(perceptron()))
    fresh.load_state_dict(trained.state_dict())
    assert fresh.part.structure() == trained.part.structure()
    x = case.input()
    assert_equal(run(fresh.eval(), x), run(trained.eval(), x))


@each_case
def test_a_grown_model_shrinks_to_what_it_loads(case: Case):
    # Not the reverse of growing: a plain state dict says nothing about dendrites.
    small = pbfx.grow(pbfx.transform(case.build(seed=9)), 1, sites=case.sites[:1])
    randomise(small)
    for phase in ("neuron", "dendrite"):
        large = source(case, phase)
        large.load_state_dict(small.state_dict())
        assert large.structure() == small.structure()
        assert large.perforation.phase is Phase.NEURON
        assert not candidate_parameters(large)
        assert list(large.state_dict()) == list(small.state_dict())
        for name, parameter in small.named_parameters():
            large.get_parameter(name).requires_grad_(parameter.requires_grad)
        assert_equal(run(large, case.input()), run(small, case.input()))


@each_case
def test_a_plain_checkpoint_loads_before_growth(case: Case):
    plain = case.build(seed=9)
    model = pbfx.transform(case.build())
    model.load_state_dict(plain.state_dict())
    assert_equal(run(model, case.input()), run(plain, case.input()))


@each_case
def test_a_plain_checkpoint_loads_after_growth(case: Case):
    """It speaks of the network only: the dendrites stay, and a strict load says that."""
    model, plain = source(case, "neuron"), case.build(seed=9)
    grown = {k: v.clone() for k, v in model.state_dict().items() if k not in plain.state_dict()}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"[\w.]*dendrites"):
        model.load_state_dict(plain.state_dict())
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert sorted(set(missing)) == sorted(grown)
    for key, value in (plain.state_dict() | grown).items():
        assert torch.equal(model.state_dict()[key], value), key


@each_case
def test_an_ungrown_model_gives_a_plain_checkpoint(case: Case):
    model, plain = pbfx.transform(case.build(seed=9)), case.build()
    plain.load_state_dict(model.state_dict())
    assert_equal(run(plain, case.input()), run(model, case.input()))


@each_case
def test_new_keys_nest_under_what_they_belong_to(case: Case):
    plain = case.build()
    model = pbfx.grow(pbfx.transform(plain), 3)
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    expected = {}
    for site in model.perforation.sites:
        # A module owns its weight; any other parameter has its dendrites beside it.
        path = f"{site.name}_dendrites" if site.name in parameters else f"{site.name}.dendrites"
        expected[f"{path}.weight"] = (3, *site.shape)
        expected[f"{path}.to_soma"] = (3, site.shape[0])
        expected[f"{path}.to_dendrite"] = (3, 3, site.shape[0])
        if site.biased:
            expected[f"{path}.bias"] = (3, site.shape[0])
    added = {name: p.shape for name, p in model.named_parameters() if name not in parameters}
    assert added == expected
    kept = [key for key in model.state_dict() if key in plain.state_dict()]
    assert kept == list(plain.state_dict())


def test_loading_replaces_no_object_if_the_structure_is_the_same():
    case = CASES["convolutional"]
    model, other = source(case, "neuron"), source(case, "neuron", seed=9)
    before = dict(model.named_parameters())
    model.load_state_dict(other.state_dict())
    assert all(before[name] is p for name, p in model.named_parameters())


def test_a_wrong_shape_is_torchs_error():
    model = pbfx.transform(perceptron())
    state = pbfx.grow(pbfx.transform(perceptron())).state_dict()
    state["0.dendrites.weight"] = torch.zeros(1, 2, 2)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.dendrites\.weight"):
        model.load_state_dict(state)
