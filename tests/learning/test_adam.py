"""Adam's state is kept without torch's optimizer, and is that optimizer's in a file."""

from __future__ import annotations

import torch
from torch import nn

from pbfx.copies import Filling
from pbfx.learning.adam import Adam


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 3))]


def made(learnt: list[nn.Parameter], lr: float = 0.05) -> Adam:
    memory = Filling()
    adam = Adam(learnt, lr, memory)
    memory.fill()
    return adam


def stepped(learnt: list[nn.Parameter], **settings: object) -> torch.optim.Adam:
    theirs = torch.optim.Adam(learnt, fused=True, **settings)  # pyright: ignore[reportArgumentType]
    for parameter in learnt:
        parameter.grad = torch.ones_like(parameter)
    theirs.step()
    return theirs


def test_its_state_dict_is_the_one_of_torch() -> None:
    theirs = torch.optim.Adam(parameters(), lr=0.05, fused=True).state_dict()
    ours = made(parameters()).state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == {0, 1}
    for parameter, state in zip(parameters(), ours["state"].values(), strict=True):
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert (state["step"].shape, state["step"].dtype) == ((), torch.float32)
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert not any(tensor.any() for tensor in state.values())


def test_it_goes_on_from_a_state_of_torch() -> None:
    theirs = stepped(parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    ours = made(parameters())
    ours.load_state_dict(theirs.state_dict())
    assert (ours.lr, tuple(ours.betas), ours.eps, ours.weight_decay) == (
        0.01,
        (0.8, 0.9),
        1e-6,
        0.1,
    )
    for own, state in zip(ours.state, theirs.state.values(), strict=True):
        assert own.keys() == state.keys()
        assert all(torch.equal(own[name], state[name]) for name in own)
    again = ours.state_dict()
    assert again["param_groups"] == theirs.state_dict()["param_groups"]


def test_a_state_from_before_the_first_step_starts_at_zero() -> None:
    theirs = torch.optim.Adam(parameters(), lr=0.01, fused=True).state_dict()
    ours = made(parameters())
    ours.load_state_dict(theirs)
    assert ours.lr == 0.01
    assert all(not tensor.any() for state in ours.state for tensor in state.values())
