"""What a script does with modules and parameters by name goes on as with the plain model."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import pbfx
from models import Case, assert_equal, run
from pbfx.candidates import Candidates
from pbfx.dendrites import Dendrites
from subjects import SUBJECTS, bring, each_stage, each_subject, loss_of, make


def ours(name: str) -> bool:
    return "dendrites" in name


@each_subject
@each_stage
def test_names_are_the_original_ones_in_their_order(case: Case, stage: str):
    plain, model = case.build(), make(case, stage)
    for kind in ("named_modules", "named_parameters", "named_children"):
        before = [name for name, _ in getattr(plain, kind)()]
        assert [name for name, _ in getattr(model, kind)() if not ours(name)] == before
    for name, module in plain.named_modules():
        assert type(model.get_submodule(name)).__name__ == type(module).__name__
        assert isinstance(model.get_submodule(name), type(module))
    # The constants of a forward are buffers of ours, and in no state dict.
    persistent = {name for name, _ in plain.named_buffers()}
    added = {n for n, _ in model.named_buffers() if not ours(n)} - persistent
    assert all("_constant" in name for name in added)
    kept = [key for key in model.state_dict() if not ours(key)]
    assert kept == list(plain.state_dict())


@each_subject
@each_stage
def test_zero_grad_requires_grad_and_apply_reach_everything(case: Case, stage: str):
    model = make(case, stage)
    loss_of(model, case.input()).backward()
    model.zero_grad(set_to_none=False)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    seen: list[nn.Module] = []
    assert model.apply(seen.append) is model
    assert {id(m) for m in seen} == {id(m) for m in model.modules()}
    dendrites = {type(m) for m in seen if isinstance(m, (Dendrites, Candidates))}
    assert len(dendrites) == {"plain": 0, "grown": 1, "dendrite": 2}[stage]


def initialise(module: nn.Module) -> None:
    """Initialise as scripts do, by the class of a layer."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.constant_(module.weight, 0.125)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@each_subject
def test_initialising_after_the_transform_is_the_same(case: Case):
    plain, model = case.build().apply(initialise), make(case, "plain").apply(initialise)
    assert_equal(run(model, case.input()), run(plain, case.input()))


class Log:
    """Records what hooks are told, as copies."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[Tensor]]] = []

    def note(self, name: str, *values: Any) -> None:
        flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
        self.seen.append((name, [v.detach().clone() for v in flat if isinstance(v, Tensor)]))

    def listen(self, model: nn.Module) -> list[Any]:
        """Register each kind of hook on every original layer that the forward calls."""
        handles = []
        for name, module in model.named_modules():
            if next(module.children(), None) and not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            if ours(name) or not isinstance(module, nn.Linear | nn.Conv2d | nn.Tanh):
                continue
            handles += [
                module.register_forward_pre_hook(lambda m, a, n=name: self.note(f"pre {n}", *a)),
                module.register_forward_hook(lambda m, a, y, n=name: self.note(n, *a, y)),
                module.register_full_backward_hook(
                    lambda m, i, o, n=name: self.note(f"back {n}", *i, *o)
                ),
            ]
        return handles


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["convolutional", "parts", "nested", "shared"])
def test_hooks_on_layers_fire_with_the_plain_models_values(name: str, when: str):
    case = SUBJECTS[name]
    plain, source = case.build(), case.build()
    expected, found = Log(), Log()
    expected.listen(plain)
    if when == "before":
        found.listen(source)
    model = pbfx.transform(source)
    handles = found.listen(model) if when == "after" else []
    x = case.input().requires_grad_()
    loss_of(plain, x).backward()
    loss_of(model, x).backward()
    assert [name for name, _ in found.seen] == [name for name, _ in expected.seen]
    for (_, mine), (_, theirs) in zip(found.seen, expected.seen, strict=True):
        assert_equal(mine, theirs)
    for handle in handles:
        handle.remove()
    found.seen.clear()
    loss_of(model, x)
    assert bool(found.seen) is (when == "before")


@each_stage
@pytest.mark.parametrize("name", ["convolutional", "parts"])
def test_hooks_fire_at_every_stage(name: str, stage: str):
    case = SUBJECTS[name]
    log = Log()
    model = make(case, "plain")
    log.listen(model)
    bring(model, stage)
    loss_of(model, case.input().requires_grad_()).backward()
    kinds = {name.partition(" ")[0] for name, _ in log.seen}
    assert {"pre", "back"} < kinds


def test_a_hook_may_change_what_a_layer_returns():
    case = SUBJECTS["convolutional"]
    plain, model, x = case.build().eval(), make(case, "plain").eval(), case.input()
    for each in (plain, model):
        each.fc.register_forward_hook(lambda m, a, y: y * 2)
        each.conv2.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    assert_equal(run(model, x), run(plain, x))
    before = run(model, x)
    assert_equal(run(pbfx.grow(model), x), before)


def test_a_hook_hears_the_soma_in_a_graph_and_the_neuron_of_an_op():
    """What a layer of a graph returns is the soma's; an op that code calls is a whole neuron."""
    heard: list[Tensor] = []
    graph = make(SUBJECTS["convolutional"], "grown").eval()
    graph.fc.register_forward_hook(lambda m, a, y: heard.append(y - nn.Linear.forward(m, *a)))
    graph(SUBJECTS["convolutional"].input())
    assert not heard.pop().any()
    parts = make(SUBJECTS["parts"], "grown").eval()
    parts.up.register_forward_hook(
        lambda m, a, y: heard.append(y - nn.functional.linear(a[0], m.weight, m.bias))
    )
    parts(SUBJECTS["parts"].input())
    assert heard.pop().any()
