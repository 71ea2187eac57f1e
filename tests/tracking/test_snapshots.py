"""Copies of the best network: what is remembered of where its tensors lie, and what is not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pbfx
from pbfx import snapshot
from pbfx.snapshot import Snapshot


def net() -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    return pbfx.grow(pbfx.transform(plain))


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += 1


def renewed(kept: Snapshot, model: nn.Module) -> Snapshot:
    return kept.renewed(model, 2.0)


def assert_holds(kept: Snapshot, state: dict[str, Tensor]) -> None:
    assert kept.score == 2.0
    assert kept.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(kept.tensors[name], tensor), name
        assert kept.tensors[name].dtype is tensor.dtype


def test_a_better_network_is_copied_without_asking_for_names(monkeypatch):
    model = net()
    first = Snapshot.take(model, 1.0)
    memory = {name: tensor.data_ptr() for name, tensor in first.tensors.items()}
    change(model)
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "network_state", lambda model: pytest.fail("walked over again"))
        kept = renewed(first, model)
    assert_holds(kept, model.state_dict())
    assert {name: tensor.data_ptr() for name, tensor in kept.tensors.items()} == memory


def other_parameter(model: nn.Module) -> None:
    model.get_submodule("0").weight = nn.Parameter(torch.full((4, 3), 7.0))


def other_dtype(model: nn.Module) -> None:
    model.double()


def other_shape(model: nn.Module) -> None:
    weight = model.get_submodule("0").weight
    weight.data = torch.ones(4, 3, 1)[..., 0].T.contiguous().T


def another_buffer(model: nn.Module) -> None:
    model.register_buffer("more", torch.ones(2))


def another_module(model: nn.Module) -> None:
    model.add_module("extra", nn.Linear(1, 1))


@pytest.mark.parametrize(
    "edit", [other_parameter, other_dtype, other_shape, another_buffer, another_module]
)
def test_what_has_been_exchanged_is_copied_all_the_same(edit: Callable[[nn.Module], None]):
    model = net()
    first = Snapshot.take(model, 1.0)
    edit(model)
    change(model)
    assert_holds(renewed(first, model), model.state_dict())


def test_a_tensor_under_two_names():
    model = net()
    model.get_submodule("1").bias = model.get_submodule("0").bias
    first = Snapshot.take(model, 1.0)
    change(model)
    assert_holds(renewed(first, model), model.state_dict())


def test_a_state_dict_of_ones_own_is_asked_for():
    class Doubled(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}weight"] = self.weight * 2

    model = nn.Sequential(Doubled(3, 4), pbfx.transform(nn.Linear(4, 2)))
    first = Snapshot.take(model, 1.0)
    change(model)
    assert_holds(renewed(first, model), model.state_dict())


def test_slots_that_are_reserved_are_no_part_of_it():
    model = pbfx.grow(pbfx.transform(nn.Linear(4, 2), pbfx.Config(reserve=3)))
    first = Snapshot.take(model, 1.0)
    change(model)
    kept = renewed(first, model)
    assert_holds(kept, model.state_dict())
    assert kept.tensors["dendrites.weight"].shape == (1, 2, 4)


def test_a_copy_of_it_is_of_other_tensors():
    model = net()
    first = Snapshot.take(model, 1.0)
    twin = copy.deepcopy(first)
    change(model)
    before = {name: tensor.clone() for name, tensor in twin.tensors.items()}
    renewed(first, model)
    assert all(torch.equal(twin.tensors[name], tensor) for name, tensor in before.items())
    assert_holds(renewed(twin, model), model.state_dict())
