"""State dicts and files, in both directions, for models whose parts nest."""

from __future__ import annotations

import collections
import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import pbfx
from models import Case, assert_equal, run
from pbfx.parts import parts_of, structure_of
from subjects import SUBJECTS, each_stage, each_subject, make

PLAIN_KEYS = "All keys matched successfully"


def alike(model: nn.Module, other: nn.Module, case: Case) -> None:
    """Assert that both compute the same in both modes; torch picks kernels by what is frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(other.get_parameter(name).requires_grad)
    # Copies, since a batch in train mode moves running statistics.
    model, other = copy.deepcopy(model), copy.deepcopy(other)
    for training in (True, False):
        expected = run(other.train(training), case.input())
        assert_equal(run(model.train(training), case.input()), expected)


@each_subject
@each_stage
@pytest.mark.parametrize("assign", [True, False])
def test_a_perforated_state_into_a_fresh_model(case: Case, stage: str, assign: bool):
    source, model = make(case, stage), make(case, "plain", seed=4)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    assert PLAIN_KEYS in str(model.load_state_dict(state, strict=not assign, assign=assign))
    assert structure_of(model) == structure_of(source)
    alike(model, source, case)


@each_subject
@pytest.mark.parametrize("stage", ["plain", "grown"])
def test_a_plain_state_into_a_perforated_model(case: Case, stage: str):
    plain, model = case.build(seed=4), make(case, stage)
    found = model.load_state_dict(plain.state_dict(), strict=stage == "plain")
    assert not found.unexpected_keys
    assert all("dendrites" in name for name in found.missing_keys)
    assert bool(found.missing_keys) is (stage == "grown")
    if stage == "plain":
        alike(model, plain, case)


@each_subject
@each_stage
def test_a_perforated_state_into_a_plain_model_says_what_it_cannot_take(case: Case, stage: str):
    source, plain = make(case, stage), case.build(seed=4)
    found = plain.load_state_dict(source.state_dict(), strict=False)
    assert not found.missing_keys
    assert all("dendrites" in name for name in found.unexpected_keys)
    if stage == "plain":
        alike(source, plain, case)
    else:
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*dendrites"):
            plain.load_state_dict(source.state_dict())


@each_subject
@each_stage
def test_prefixes_and_files_of_torch(case: Case, stage: str, tmp_path: Path):
    source = nn.ModuleDict({"encoder": make(case, stage), "other": nn.Linear(2, 2)})
    torch.save(source.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = nn.ModuleDict({"encoder": make(case, "plain", seed=4), "other": nn.Linear(2, 2)})
    assert PLAIN_KEYS in str(fresh.load_state_dict(state))
    alike(fresh["encoder"], source["encoder"], case)
    # Taken out of the whole, and put under another prefix.
    inner = collections.OrderedDict(
        (name.removeprefix("encoder."), value)
        for name, value in state.items()
        if name.startswith("encoder.")
    )
    alone = make(case, "plain", seed=5)
    assert PLAIN_KEYS in str(alone.load_state_dict(inner))
    alike(alone, source["encoder"], case)
    assert list(source["encoder"].state_dict(prefix="encoder.")) == list(state)[: len(inner)]


@each_subject
@pytest.mark.parametrize("stage", ["plain", "grown"])
def test_files_of_pbfx(case: Case, stage: str, tmp_path: Path):
    source = make(case, stage)
    pbfx.save(source, tmp_path / "model.safetensors")
    for target in (case.build(seed=4), make(case, "grown", seed=4)):
        alike(pbfx.load(tmp_path / "model.safetensors", target), source, case)


def test_a_part_of_the_keys_grows_a_part_of_the_model():
    case = SUBJECTS["parts"]
    source, model = make(case, "grown"), make(case, "plain")
    up = {name: value for name, value in source.state_dict().items() if name.startswith("up.")}
    model.load_state_dict(up, strict=False)
    grown = {path: part.structure().dendrites for path, part in parts_of(model).items()}
    assert grown == {"down": 0, "up": 2}
