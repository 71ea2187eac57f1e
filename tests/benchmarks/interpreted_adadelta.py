"""Adadelta's kernel under Triton's interpreter, against torch's own optimizer.

pytest collects this file only if it is named, with `TRITON_INTERPRET=1` set; the suite does so in
`test_learning_adadelta.py`.
"""

import copy

import pytest
import torch
from torch.optim import Adadelta
from torch.optim.lr_scheduler import StepLR

from benchmarks.learning.adadelta import BLOCK, FusedAdadelta

# More than two launches, with tensors smaller than a block, as large, and larger.
SHAPES = [(3, 5), (BLOCK,), (1,), (7, 300), (BLOCK + 1,), (64, 3, 3, 3), (10,), (0, 4)]
SHAPES += [(2, 9), *[(size,) for size in range(1, 9)]]


def pair() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    return ours, copy.deepcopy(ours)


def test_steps_as_torch_does() -> None:
    (ours, theirs), generator = pair(), torch.Generator().manual_seed(1)
    fused = FusedAdadelta(ours, lr=torch.tensor(1.0))
    plain = Adadelta(theirs, lr=1.0)
    schedules = [StepLR(optimizer, 1, 0.7) for optimizer in (fused, plain)]
    for turn in range(6):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = torch.randn(a.shape, generator=generator)
            if a.dim() == 2:
                a.grad = a.grad.T.contiguous().T
            b.grad = a.grad.clone()
            if turn == 2 and index % 3 == 0:
                a.grad = b.grad = None
        fused.step()
        plain.step()
        if turn == 3:
            for schedule in schedules:
                schedule.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        for name in ("square_avg", "acc_delta"):
            found, wanted = fused.state[a][name], plain.state[b][name]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("changed", [{"weight_decay": 0.1}, {"maximize": True}])
def test_what_the_kernel_does_not_do_is_refused(changed: dict) -> None:
    ours, _ = pair()
    with pytest.raises(ValueError, match="no closure, weight decay or maximize"):
        FusedAdadelta(ours, lr=torch.tensor(1.0), **changed).step()


@pytest.mark.parametrize("tensor", [torch.zeros(3, dtype=torch.float64), torch.zeros(3, 4).T])
def test_tensors_that_it_does_not_step_are_refused(tensor: torch.Tensor) -> None:
    parameter = tensor.requires_grad_()
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(ValueError, match="contiguous float32"):
        FusedAdadelta([parameter], lr=torch.tensor(1.0)).step()
