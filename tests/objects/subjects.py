"""Models on every rung of the capture ladder, at every stage of their growth.

At the top level of a module, because pickle has to find their classes in another process.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pbfx
from models import CASES, Branch, Case, outputs, randomise
from pbfx.restructure import start_dendrite_phase


class Coder(nn.Module):
    """Offers methods of its own: a submodule and an op are parts, the rest is the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 2))
        self.up = nn.Linear(2, 4)
        self.note = {"size": 2}

    def encode(self, x: Tensor) -> Tensor:
        return self.down(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.up(self.encode(x)))


def nested() -> nn.Module:
    """A graph around forwards that are kept, with a submodule and an op inside of those."""
    return nn.Sequential(
        nn.Linear(4, 4),
        Branch(nn.Linear(4, 4)),
        nn.Sequential(Branch(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))),
    )


SUBJECTS = {name: CASES[name] for name in ("convolutional", "functional", "shared")} | {
    "parts": Case(Coder, (5, 4), ("down.0", "down.3", "up")),
    "nested": Case(nested, (5, 4), ("0", "1.inner", "2.0.inner.0")),
}
STAGES = ("plain", "grown", "dendrite")

each_subject = pytest.mark.parametrize("case", SUBJECTS.values(), ids=SUBJECTS.keys())
each_stage = pytest.mark.parametrize("stage", STAGES)


def make(case: Case, stage: str, config: pbfx.Config | None = None, seed: int = 0) -> nn.Module:
    """Return a transformed model at a stage; what there is of dendrites carries weight."""
    return bring(pbfx.transform(case.build(seed), config), stage)


def bring(model: nn.Module, stage: str) -> nn.Module:
    """Grow `model` to a stage."""
    if stage != "plain":
        randomise(pbfx.grow(model, 2))
    if stage == "dendrite":
        start_dendrite_phase(model)
    return model


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Run `model` with torch's global stream at a fixed place, and return a loss."""
    torch.manual_seed(3)
    return torch.stack([value.float().pow(2).mean() for value in outputs(model(x))]).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients that there are, by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
