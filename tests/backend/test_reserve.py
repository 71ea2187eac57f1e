"""`Config(reserve=...)`: growth without recompilation, and nothing else that one could notice."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import pbfx
from models import CASES, randomise, run

RESERVE = 12


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name: str, **settings: object) -> nn.Module:
    return pbfx.transform(CASES[name].build(), pbfx.Config(**settings))


def gradients(call: nn.Module, model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict]:
    state = copy.deepcopy(model.state_dict())
    outs = run(call, x)
    sum((out.square().sum() for out in outs), torch.zeros(())).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state)
    return [out.detach() for out in outs], grads


def assert_alike(call: nn.Module, model: nn.Module, x: Tensor) -> None:
    (found, grads), (wanted, wanted_grads) = gradients(call, model, x), gradients(model, model, x)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert grads.keys() == wanted_grads.keys()
    for name, value in wanted_grads.items():
        torch.testing.assert_close(grads[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["perceptron", "convolutional"])
def test_twelve_growths_recompile_nothing(name, inside):
    model = build(name, reserve=RESERVE)
    whole = nn.Sequential(model, nn.Identity()) if inside else model
    counter = CompileCounterWithBackend("aot_eager")
    call, x = torch.compile(whole, backend=counter, fullgraph=True), CASES[name].input()
    parameters = dict(model.named_parameters())
    for growth in range(RESERVE + 1):
        assert_alike(call, whole, x)
        assert counter.frame_count == 1
        if growth < RESERVE:
            pbfx.grow(model)
            randomise_alive(model, growth)
    assert all(parameters[n] is p for n, p in model.named_parameters())
    # Past the reserve it grows as without one.
    pbfx.grow(model)
    assert_alike(call, whole, x)
    assert counter.frame_count == 2


def randomise_alive(model: nn.Module, seed: int) -> None:
    """Give the dendrites that exist links that matter."""
    state = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for key, value in state.items():
        if key.endswith(("to_soma", "to_dendrite")):
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    model.load_state_dict(state)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_it_computes_and_learns_as_without(activation):
    """Cycle by cycle: outputs, gradients of what is alive, state dicts, candidates."""
    settings = {"activation": activation, "priming_batches": 1, "measure_every": 2}
    pairs = [build("perceptron", reserve=reserve, **settings).double() for reserve in (0, 3)]
    x = CASES["perceptron"].input(dtype=torch.float64)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in pairs]
    policy = pbfx.Interval(neuron_epochs=1, dendrite_epochs=1)
    trackers = [
        pbfx.Tracker(m, o, policy=policy, max_dendrites=2)
        for m, o in zip(pairs, optimizers, strict=True)
    ]
    for epoch in range(5):
        for model, optimizer in zip(pairs, optimizers, strict=True):
            for seed in range(4):
                optimizer.zero_grad()
                run(model.train(), x, seed)[0].square().sum().backward()
                optimizer.step()
        plain, reserved = (model.state_dict() for model in pairs)
        assert plain.keys() == reserved.keys()
        for key, value in plain.items():
            torch.testing.assert_close(reserved[key], value, msg=lambda m, n=key: f"{n}: {m}")
        counts = [tracker.history[-1].parameters for tracker in trackers if tracker.history]
        assert len(set(counts)) <= 1
        for tracker in trackers:
            tracker.step(epoch)
    assert {tracker.dendrites for tracker in trackers} == {2}
    for dendrites in pairs[1].perforation.sites:
        module = pairs[1].get_submodule(dendrites.dendrites)
        assert module.slots == 3
        assert not module.weight[2:].any()
        assert not module.to_soma[2:].any()


def test_phases_are_compiled_once_each():
    model = build("perceptron", reserve=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    policy = pbfx.Interval(neuron_epochs=1, dendrite_epochs=1)
    tracker = pbfx.Tracker(model, optimizer, policy=policy, max_dendrites=4)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(model, backend=counter, fullgraph=True)
    x, seen = CASES["perceptron"].input(), []
    while not tracker.complete:
        for seed in range(2):
            optimizer.zero_grad()
            run(call, x, seed)[0].square().sum().backward()
            assert all(
                (p.grad is not None) == p.requires_grad
                for n, p in model.named_parameters()
                if ".candidates." not in n
            )
            optimizer.step()
        seen.append(counter.frame_count)
        tracker.step(len(seen))
    assert tracker.dendrites == 4
    # One for the neuron phase, one for the dendrite phase.
    assert seen[0] == 1
    assert seen[1:] == [2] * (len(seen) - 1)


def test_files_hold_live_dendrites_only(tmp_path):
    model = build("convolutional", reserve=5)
    assert list(model.state_dict()) == list(CASES["convolutional"].build().state_dict())
    pbfx.grow(model, 2)
    randomise_alive(model, 0)
    state = model.state_dict()
    assert state["fc.dendrites.weight"].shape[0] == 2
    assert state["fc.dendrites.to_dendrite"].shape[:2] == (2, 2)
    model.eval()
    x = CASES["convolutional"].input()
    pbfx.save(model, tmp_path / "model.safetensors")
    for target in (
        CASES["convolutional"].build(9),
        pbfx.transform(CASES["convolutional"].build(9)),
        build("convolutional", reserve=3),
        # Too small a reserve grows.
        build("convolutional", reserve=1),
    ):
        loaded = pbfx.load(tmp_path / "model.safetensors", target).eval()
        torch.testing.assert_close(run(loaded, x)[0], run(model, x)[0])


def test_a_failed_growth_is_undone(monkeypatch):
    model = pbfx.grow(build("perceptron", reserve=3))
    randomise(model)
    before = copy.deepcopy(model.state_dict())
    # The numbers have been written when the graph is to be taken up again.
    monkeypatch.setattr(
        "pbfx.derived.DerivedGraphs.take_up", lambda *_: (_ for _ in ()).throw(RuntimeError("no"))
    )
    with pytest.raises(pbfx.RestructureError):
        pbfx.grow(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    monkeypatch.undo()
    copy.deepcopy(pbfx.grow(model))


def test_reserve_is_checked():
    with pytest.raises(pbfx.ConfigError, match="reserve must be a whole number of at least 0"):
        pbfx.Config(reserve=-1)
    with pytest.raises(pbfx.ConfigError, match="reserve goes with tuning 'links' or 'all'"):
        pbfx.Config(reserve=2, tuning="newest")
