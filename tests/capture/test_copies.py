"""A copy computes the same and is nobody's alias."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pbfx
from models import Case, assert_equal, each_case, perceptron, randomise, run
from pbfx.perforated import PerforatedModule
from pbfx.phase import Phase
from pbfx.restructure import start_dendrite_phase


def make(case: Case, phase: str) -> PerforatedModule:
    model = pbfx.transform(case.build())
    if phase != "plain":
        randomise(pbfx.grow(model, 2))
    if phase == "dendrite":
        start_dendrite_phase(model)
    return model


@each_case
@pytest.mark.parametrize("phase", ["plain", "grown", "dendrite"])
def test_a_copy_computes_the_same_and_shares_nothing(case: Case, phase: str):
    model, x = make(case, phase), case.input()
    twin = copy.deepcopy(model)
    assert type(twin).__name__ == type(model).__name__
    assert isinstance(twin, PerforatedModule)
    assert twin.code == model.code
    assert twin.structure() == model.structure()
    assert twin.perforation.phase == model.perforation.phase
    assert list(twin.state_dict()) == list(model.state_dict())
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert mine is not theirs, name
        assert torch.equal(mine, theirs), name
        assert mine.requires_grad == theirs.requires_grad, name
    assert not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
    for training in (True, False):
        model.train(training)
        twin.train(training)
        assert_equal(run(twin, x), run(model, x))


@each_case
def test_a_copy_goes_its_own_way(case: Case):
    model, x = make(case, "grown").eval(), case.input()
    expected, state = run(model, x), {k: v.clone() for k, v in model.state_dict().items()}
    twin = copy.deepcopy(model)
    pbfx.grow(twin)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    start_dendrite_phase(twin)
    assert model.perforation.phase is Phase.NEURON
    assert_equal(run(model, x), expected)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_copy_of_a_tracked_model_is_free():
    model = pbfx.transform(perceptron())
    pbfx.Tracker(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(pbfx.RestructureError, match="a tracker manages the model"):
        pbfx.grow(model)
    assert pbfx.grow(copy.deepcopy(model)).structure().dendrites == 1


def test_sharing_inside_is_kept():
    inner = perceptron()
    model = pbfx.transform(nn.ModuleDict({"one": inner})["one"])
    both = copy.deepcopy(nn.ModuleList([model, model]))
    assert both[0] is both[1]
    assert both[0] is not model


def test_a_part_may_refer_back_to_the_whole():
    model = pbfx.transform(perceptron())
    model.get_submodule("1").__dict__["whole"] = model
    twin = copy.deepcopy(model)
    assert twin.get_submodule("1").whole is twin


def test_a_saved_state_dict_holds_tensors_only(tmp_path):
    model = pbfx.grow(pbfx.transform(perceptron()))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded.keys() == model.state_dict().keys()
