"""torch.func over transformed models: the plain model's answers, and the perforated gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import pbfx
from models import Case, assert_equal, outputs, run
from pbfx.parts import candidate_parameters
from subjects import SUBJECTS, each_stage, each_subject, gradients, loss_of, make

# A module under two names loses its parameters' class in torch's own functional_call, plain or not.
DIFFERENTIABLE = {name: case for name, case in SUBJECTS.items() if name != "shared"}
each_case = pytest.mark.parametrize("case", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())


def scaled(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() * 1.5 for name, p in model.named_parameters()}


@each_subject
def test_functional_call_is_the_plain_models(case: Case):
    plain, model, x = case.build().eval(), make(case, "plain").eval(), case.input()
    parameters = scaled(plain)
    expected = outputs(functional_call(plain, parameters, (x,)))
    assert_equal(outputs(functional_call(model, parameters, (x,))), expected)


@each_case
@each_stage
def test_functional_call_takes_dendrites_from_outside(case: Case, stage: str):
    model, x = make(case, stage).eval(), case.input()
    found = outputs(functional_call(model, scaled(model), (x,)))
    parameters = scaled(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    assert_equal(found, run(model, x))


@each_case
@each_stage
def test_grad_is_what_backward_gives(case: Case, stage: str):
    check_grad(make(case, stage).eval(), case.input())


@each_case
def test_grad_trains_dendrites_that_learn_by_gradient(case: Case):
    check_grad(make(case, "grown", pbfx.Config(learning="gradient")).eval(), case.input())


def check_grad(model: nn.Module, x: Tensor) -> None:
    candidates = candidate_parameters(model)
    learning_now = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        out = outputs(functional_call(model, parameters, (x,)))
        return torch.stack([value.pow(2).mean() for value in out]).sum()

    found = grad(loss)(learning_now)
    loss_of(model, x).backward()
    for name, gradient in gradients(model).items():
        if name in candidates:
            # Candidates learn from backward passes only.
            assert not found[name].any()
        else:
            torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("stage", ["plain", "grown"])
@pytest.mark.parametrize("name", ["functional", "parts"])
def test_gradients_per_sample(name: str, stage: str):
    case = SUBJECTS[name]
    model, x = make(case, stage).eval().double(), case.input().double()
    learning = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample[None],)).pow(2).sum()

    found = vmap(grad(loss), in_dims=(None, 0))(learning, x)
    for index in range(len(x)):
        model.zero_grad()
        model(x[index : index + 1]).pow(2).sum().backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(found[name][index], gradient)


# torch's own formulas of forward mode are still TorchScript.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@each_stage
def test_forward_mode_and_ensembles(stage: str):
    case = SUBJECTS["parts"]
    model, x = make(case, stage).eval(), case.input()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    out, tangent = jvp(model, (x,), (v,))
    assert torch.equal(out, model(x))
    if stage == "plain":
        _, expected = jvp(case.build().eval(), (x,), (v,))
        torch.testing.assert_close(tangent, expected)
    stacked = {n: torch.stack([p.detach(), p.detach() * 2]) for n, p in model.named_parameters()}
    found = vmap(lambda parameters: functional_call(model, parameters, (x,)))(stacked)
    torch.testing.assert_close(found[0], model(x))


@each_stage
def test_parameters_as_one_vector(stage: str):
    case = SUBJECTS["nested"]
    model, other = make(case, stage).eval(), make(case, stage, seed=1).eval()
    vector_to_parameters(parameters_to_vector(model.parameters()), other.parameters())
    assert_equal(run(other, case.input()), run(model, case.input()))
