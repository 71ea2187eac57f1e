"""Recomputed activations: the same gradients, and every batch counts once for the candidates."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import pbfx
from models import Case
from pbfx.parts import candidate_parameters, parts_of
from pbfx.restructure import learners_of
from subjects import SUBJECTS, Branch, Coder, each_stage, each_subject, gradients, loss_of, make

each_way = pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])


class Saving(nn.Module):
    """Recomputes one of its layers in the backward, as models for large inputs do themselves."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = Branch(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2)))
        self.head, self.reentrant = nn.Linear(4, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=self.reentrant))


def recomputed(model: nn.Module, reentrant: bool) -> Callable[[Tensor], Tensor]:
    return functools.partial(checkpoint, model, use_reentrant=reentrant)


@each_subject
@each_stage
@each_way
def test_around_the_whole_model(case: Case, stage: str, reentrant: bool):
    model, x = make(case, stage), case.input().requires_grad_()
    loss_of(model, x).backward()
    expected, wanted = gradients(model), x.grad
    model.zero_grad()
    x.grad = None
    loss_of(recomputed(model, reentrant), x).backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(x.grad, wanted)


@each_stage
@each_way
def test_inside_a_users_forward(stage: str, reentrant: bool):
    def build() -> nn.Module:
        return Saving(reentrant)

    case = Case(build, (5, 4), ("head",))
    x = case.input().requires_grad_()
    model, plain = make(case, stage), case.build()
    assert set(parts_of(model)) == {"inner.inner", "head"}
    loss_of(model, x).backward()
    if stage == "plain":
        loss_of(plain, x).backward()
        for name, value in gradients(plain).items():
            assert torch.equal(model.get_parameter(name).grad, value)
    assert gradients(model)


@each_way
@pytest.mark.parametrize("name", ["convolutional", "parts", "nested"])
def test_candidates_count_each_batch_once(name: str, reentrant: bool):
    """With and without recomputation, candidates see the same batches and end up the same."""
    case = SUBJECTS[name]
    ends = []
    for call in (lambda model: model, functools.partial(recomputed, reentrant=reentrant)):
        config = pbfx.Config(priming_batches=1, measure_every=3)
        model = make(case, "dendrite", config)
        learners = learners_of(model)
        for learner in learners.values():
            learner.attach()
        for seed in range(7):
            loss_of(call(model), case.input(seed).requires_grad_()).backward()
        assert {learner.batches for learner in learners.values()} == {7}
        ends.append({n: p.detach().clone() for n, p in candidate_parameters(model).items()})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@each_way
def test_a_reentrant_checkpoint_without_a_learning_input_warns_as_for_the_plain_model(
    reentrant: bool,
):
    x = torch.randn(5, 4)
    for model in (Coder(), pbfx.transform(Coder())):
        if reentrant:
            with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
                assert not recomputed(model, reentrant)(x).requires_grad
        else:
            assert recomputed(model, reentrant)(x).requires_grad


def blocks() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))


@each_stage
def test_a_sequence_in_segments(stage: str):
    """The segments call the blocks by themselves, past the graph of the whole."""
    model, x = make(Case(blocks, (5, 4), ()), stage), torch.randn(5, 4, requires_grad=True)
    loss_of(model, x).backward()
    expected = gradients(model)
    model.zero_grad()
    loss_of(lambda y: checkpoint_sequential(model, 2, y, use_reentrant=False), x).backward()
    assert gradients(model).keys() == expected.keys()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name])
