"""Nets whose files and outputs are compared with the other package's, small enough to commit.

`group` makes one module of a layer and its norm: `nn.Sequential` in the plain net, PAISequential
where the other package wraps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Group = Callable[[list[nn.Module]], nn.Module]


def sequential(modules: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*modules)


class Mixed(nn.Module):
    """Grouped, strided and padded convolution, one without bias, linear."""

    def __init__(self, group: Group = sequential) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.conv2 = nn.Conv2d(4, 3, 2, bias=False)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        return self.fc(F.relu(self.conv2(x)).flatten(1))


class Normed(nn.Module):
    """Batch norms, in a group with their layer and not; a layer under two names; a parameter."""

    def __init__(self, group: Group = sequential) -> None:
        super().__init__()
        self.block = group([nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3, eps=1e-3)])
        self.conv = nn.Conv2d(3, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.body = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4))
        self.head = self.body[1]
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.block(x))
        x = F.relu(self.norm(self.conv(x)))
        return self.body(x.mean((2, 3))) * self.scale


class Tokens(nn.Module):
    """A linear layer over three axes, and a convolution over one."""

    # The other package has to be told which axis holds the neurons.
    axes: ClassVar[dict[str, list[int]]] = {"up": [-1, -1, 0], "conv": [-1, 0, -1]}

    def __init__(self, group: Group = sequential) -> None:
        super().__init__()
        self.up = nn.Linear(3, 4)
        self.conv = nn.Conv1d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.up(x)).transpose(1, 2))


class OneLinear(nn.Module):
    """One linear layer of odd sizes, so that its output is the net's."""

    def __init__(self, group: Group = sequential) -> None:
        super().__init__()
        self.layer = nn.Linear(63, 127)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class OneConv(nn.Module):
    """One convolution of odd sizes."""

    def __init__(self, group: Group = sequential) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 17, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


NETS: dict[str, type[nn.Module]] = {
    "mixed": Mixed,
    "normed": Normed,
    "tokens": Tokens,
    "linear": OneLinear,
    "conv": OneConv,
}
INPUTS = {
    "mixed": (4, 2, 5, 5),
    "normed": (4, 2, 6, 6),
    "tokens": (2, 5, 3),
    "linear": (33, 63),
    "conv": (5, 3, 15, 13),
}
