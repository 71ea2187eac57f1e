"""`torch.compile` runs each new graph on the same compiled object, once compiled per graph."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import pbfx
from models import CASES, Case, randomise, run
from pbfx.restructure import promote, start_dendrite_phase, thaw


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model: nn.Module, owner: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run one step; return output, gradients and buffers by name, and clear the gradients."""
    owner.zero_grad(set_to_none=True)
    (y,) = run(model, x)
    y.square().sum().backward()
    found = {f"grad of {n}": p.grad for n, p in owner.named_parameters() if p.grad is not None}
    owner.zero_grad(set_to_none=True)
    buffers = {name: buffer.clone() for name, buffer in owner.named_buffers()}
    return {"output": y.detach()} | found | buffers


class Watched:
    """A model, its compiled wrapper, and a count of what was compiled since the last look."""

    def __init__(self, case: Case, backend: str) -> None:
        self.model, self.x = pbfx.transform(case.build()), case.input()
        self.counter = CompileCounterWithBackend(backend)
        self.compiled = torch.compile(self.model, backend=self.counter, fullgraph=True)
        self.seen = 0

    def check(self, expected_compilations: int) -> None:
        """Two steps agree with eager's, having compiled as often as expected."""
        for _ in range(2):
            state = {name: value.clone() for name, value in self.model.state_dict().items()}
            found = step(self.compiled, self.model, self.x)
            with torch.no_grad():
                for name, value in self.model.state_dict().items():
                    value.copy_(state[name])
            eager = step(self.model, self.model, self.x)
            assert found.keys() == eager.keys()
            for name, value in eager.items():
                torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")
        assert self.counter.frame_count - self.seen == expected_compilations
        self.seen = self.counter.frame_count


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("perceptron", "eager"),
        ("convolutional", "eager"),
        ("functional", "eager"),
        ("shared", "eager"),
        ("perceptron", "aot_eager"),
        ("convolutional", "aot_eager"),
    ],
)
def test_one_compilation_per_graph_and_mode(name: str, backend: str):
    watched = Watched(CASES[name], backend)
    model = watched.model
    watched.check(1)
    watched.check(0)
    model.eval()
    watched.check(1)
    model.train()
    watched.check(0)

    pbfx.grow(model)
    randomise(model)
    watched.check(1)
    model.eval()
    watched.check(1)
    model.train()
    watched.check(0)
    pbfx.grow(model, 1, sites=CASES[name].sites[:1])
    watched.check(1)

    frozen, learners = start_dendrite_phase(model)
    watched.check(1)
    # This graph does not read the mode of anything.
    model.eval()
    watched.check(0)
    model.train()
    watched.check(0)

    promote(model, learners)
    thaw(model, frozen)
    watched.check(1)
    model.eval()
    watched.check(1)


def test_a_part_of_a_compiled_model_may_change():
    part = pbfx.transform(CASES["perceptron"].build())
    model = nn.Sequential(part, nn.Linear(3, 2))
    counter = CompileCounterWithBackend("eager")
    compiled, x = torch.compile(model, backend=counter, fullgraph=True), CASES["perceptron"].input()
    for expected in (1, 2):
        for _ in range(2):
            found, eager = step(compiled, model, x), step(model, model, x)
            torch.testing.assert_close(found["output"], eager["output"])
            assert found.keys() == eager.keys()
        assert counter.frame_count == expected
        randomise(pbfx.grow(model))


def test_compiling_in_place():
    model, x = pbfx.transform(CASES["perceptron"].build()).eval(), CASES["perceptron"].input()
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter, fullgraph=True)
    before = run(model, x)[0]
    randomise(pbfx.grow(model))
    after = run(model, x)[0]
    assert counter.frame_count == 2
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model.forward(x))


def test_many_restructures_do_not_reach_the_recompile_limit():
    model, x = pbfx.transform(CASES["perceptron"].build()), CASES["perceptron"].input()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    rounds = torch._dynamo.config.recompile_limit + 3
    for _ in range(rounds):
        run(compiled, x)
        pbfx.grow(model, 1, sites="4")
    assert counter.frame_count == rounds


@pytest.mark.parametrize("modes", [1, 2])
def test_twelve_restructures_inside_a_larger_model(modes):
    """The larger model's code object stays the same, and what has gone stale must not fill it."""

    class Larger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = pbfx.transform(CASES["perceptron"].build())
            self.head = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.part(x))

    model, other, x = Larger(), nn.Linear(5, 2), CASES["perceptron"].input()
    counter, others = CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    bystander = torch.compile(other, backend=others, fullgraph=True)
    for restructures in range(13):
        for training in (True, False)[:modes]:
            model.train(training)
            for _ in range(2):
                torch.testing.assert_close(run(compiled, x)[0], run(model, x)[0])
        bystander(x)
        assert counter.frame_count == modes * (restructures + 1)
        randomise(pbfx.grow(model, 1))
    # What does not contain the part is never compiled again.
    assert others.frame_count == 1


def test_a_state_dict_that_grows_a_part_is_noticed():
    part = pbfx.transform(CASES["perceptron"].build())
    grown = pbfx.grow(pbfx.transform(CASES["perceptron"].build()))
    randomise(grown)
    model, x = nn.Sequential(part, nn.Linear(3, 2)).eval(), CASES["perceptron"].input()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = compiled(x)
    part.load_state_dict(grown.state_dict())
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.equal(compiled(x), before)


def test_dendrites_see_gradients_that_were_frozen_when_first_compiled():
    """On torch 2.11 a parameter frozen at compile time gets no gradient later, and no error."""
    model, x = pbfx.transform(CASES["perceptron"].build()), CASES["perceptron"].input()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    frozen, learners = start_dendrite_phase(model)
    run(compiled, x)[0].square().sum().backward()
    assert model.get_parameter("0.weight").grad is None
    promote(model, learners)
    thaw(model, frozen)
    run(compiled, x)[0].square().sum().backward()
    assert model.get_parameter("0.weight").grad.abs().sum() > 0
    assert model.get_parameter("4.dendrites.to_soma").grad.abs().sum() > 0


@pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="no C++ compiler")
def test_inductor():
    # Its dropout draws other numbers than eager's unless told not to.
    with torch._inductor.config.patch(fallback_random=True, compile_threads=1):
        watched = Watched(CASES["perceptron"], "inductor")
        randomise(pbfx.grow(watched.model))
        watched.check(1)
        start_dendrite_phase(watched.model)
        watched.check(1)
