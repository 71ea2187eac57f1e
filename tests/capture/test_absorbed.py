"""Containers inside a graph: hooks fire, calls see the dendrites, flags are followed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pbfx
from models import randomise
from pbfx.errors import CaptureError
from pbfx.kept import kept_modules
from pbfx.parts import candidate_parameters, parts_of
from pbfx.phase import Phase


class Block(nn.Module):
    def __init__(self, shortcut: bool = True) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity()) if shortcut else None
        self.scale, self.checks = 0.5, False

    def forward(self, x: Tensor) -> Tensor:
        if self.checks and x.sum() > 0:
            return x
        y = self.norm(self.conv(x)).relu() * self.scale
        return y + (x if self.shortcut is None else self.shortcut(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3)
        self.blocks = nn.Sequential(Block(), Block(shortcut=False))
        self.head = nn.Linear(3, 2)
        self.bias, self.checks = 0.0, False

    def forward(self, x: Tensor) -> Tensor:
        if self.checks and x.sum() > 0:
            return x
        return self.head(self.blocks(self.stem(x)).mean((2, 3))) + self.bias


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = pbfx.transform(Net()).eval()
    pbfx.grow(model)
    randomise(model)
    return model


KINDS = {
    "register_forward_hook": lambda seen: lambda module, args, out: seen.append(out),
    "register_forward_pre_hook": lambda seen: lambda module, args: seen.append(args[0]),
    "register_full_backward_hook": lambda seen: lambda module, into, out: seen.append(out[0]),
    "register_full_backward_pre_hook": lambda seen: lambda module, out: seen.append(out[0]),
}


@pytest.mark.parametrize("path", ["blocks", "blocks.0", "blocks.0.shortcut", "blocks.1", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_fire_with_what_the_plain_model_would_give(
    model: nn.Module, x: Tensor, path: str, kind: str
):
    expected, keys = model(x), list(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    seen: list[Tensor] = []
    handle = getattr(model.get_submodule(path), kind)(KINDS[kind](seen))
    out = model(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert len(seen) == 1
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    handle.remove()
    model(x).sum().backward()
    assert len(seen) == 1


def test_a_hook_may_change_what_flows(model: nn.Module, x: Tensor):
    model.blocks[0].register_forward_hook(lambda module, args, out: out * 0)
    hidden = model.blocks[1](torch.zeros(2, 3, 4, 4)).mean((2, 3))
    assert torch.equal(model(x), model.head.dendrites(model.head(hidden), hidden)[0])


def test_a_container_called_by_itself_sees_its_dendrites(model: nn.Module, x: Tensor):
    expected, held = model(x), model.blocks
    hidden = held(model.stem(x))
    # The stem is an op of the graph: by itself it is the soma.
    stem = model.stem(x)
    features = model.stem.dendrites(stem, x)[0]
    assert not torch.equal(features, stem)
    out = model.head.dendrites(
        model.head(held(features).mean((2, 3))), held(features).mean((2, 3))
    )[0]
    torch.testing.assert_close(out, expected)
    assert isinstance(model.blocks, nn.Sequential)
    assert torch.equal(held(model.stem(x)), hidden)
    assert torch.equal(model.blocks(model.stem(x)), hidden)
    assert [str(part.perforation.rung) for part in parts_of(model).values()] == [
        "whole",
        "submodule",
    ]
    assert parts_of(model)["blocks"].perforation.reason == "it is called by itself"
    assert torch.equal(model(x), expected)


def test_attributes_are_followed(model: nn.Module, x: Tensor):
    before, code = model(x), model.code
    model.blocks[1].scale = 0.5
    assert model.code == code
    model.blocks[1].scale = 3.0
    assert not torch.equal(model(x), before)
    model.blocks[1].scale = 0.5
    assert torch.equal(model(x), before)
    model.bias = 1.0
    assert torch.equal(model(x), before + 1)
    assert model.bias == 1.0
    model.bias = 0.0
    held = model.blocks[1]
    held.register_forward_hook(lambda module, args, out: None)
    held.scale = 3.0
    assert model.blocks[1].scale == 3.0
    assert not torch.equal(model(x), before)


def test_an_attribute_that_no_graph_can_follow_is_refused(model: nn.Module, x: Tensor):
    before = model(x)
    with pytest.raises(CaptureError, match=r"cannot follow this change.*make it before"):
        model.checks = True
    assert model.checks is False
    assert torch.equal(model(x), before)
    # One inside goes on with its own forward, and its ops become parts.
    model.blocks[0].checks = True
    assert {"blocks.0.conv", "blocks.0.shortcut"} <= parts_of(model).keys()
    assert "shapes of its inputs" in kept_modules(model)["blocks.0"].reason
    assert torch.equal(model(-x.abs()), model(-x.abs()))


def test_copies_are_followed_apart(model: nn.Module, x: Tensor):
    twin, before = copy.deepcopy(model), model(x)
    twin.blocks[1].scale = 3.0
    twin.blocks[0].register_forward_hook(lambda module, args, out: out * 2)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    assert parts_of(model).keys() == {""}
    assert parts_of(twin).keys() == {"", "blocks.0"}
    again = copy.deepcopy(twin)
    assert torch.equal(again(x), twin(x))


def test_hooks_come_and_a_run_goes_on(x: Tensor, tmp_path):
    """Splitting a graph under a tracker, in the dendrite phase, loses nothing."""

    def run(hooked: bool) -> tuple[nn.Module, pbfx.Tracker, list[Tensor]]:
        torch.manual_seed(0)
        model = pbfx.transform(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(2, 2), max_dendrites=1)
        seen: list[Tensor] = []
        while not tracker.complete:
            if hooked and len(tracker.history) == 3:
                assert tracker.phase is Phase.DENDRITE
                model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out))
            model.train()
            for step in range(12):
                batch = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                (model(batch).tanh() - 0.3).square().sum().backward()
                optimizer.step()
            tracker.step(len(tracker.history))
        return model, tracker, seen

    (plain, tracker, _), (hooked, other, seen) = run(False), run(True)
    assert seen
    assert parts_of(hooked).keys() == {"", "blocks.0"}
    assert plain.state_dict().keys() == hooked.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(hooked.state_dict()[name], value), name
    assert [epoch.candidate_score for epoch in tracker.history] == [
        epoch.candidate_score for epoch in other.history
    ]
    assert not candidate_parameters(hooked)
    pbfx.save(hooked, tmp_path / "hooked.safetensors")
    fresh = pbfx.load(tmp_path / "hooked.safetensors", Net())
    torch.testing.assert_close(fresh.eval()(x), hooked.eval()(x))
    pbfx.save(plain, tmp_path / "plain.safetensors")
    pbfx.load(tmp_path / "plain.safetensors", hooked)


def test_compiled_models_follow(model: nn.Module, x: Tensor):
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    model.blocks[1].scale = 3.0
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), before)
