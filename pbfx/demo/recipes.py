"""A recipe: the net, the optimizer and the default schedule that belong to a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import Adadelta, Adam, Optimizer

from pbfx.demo.nets import DigitsNet, MnistNet


@dataclass(frozen=True)
class Recipe:
    """What the arms of one data set share.

    Args:
        net: builds the net for a width.
        optimizer: builds the optimizer for the net's parameters.
        final_rate: the share of its first rate that a phase ends with.
    """

    net: Callable[[float], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    final_rate: float


RECIPES = {
    "digits": Recipe(DigitsNet, lambda parameters: Adam(parameters, lr=0.01), final_rate=0.05),
    "mnist": Recipe(MnistNet, lambda parameters: Adadelta(parameters, lr=1.0), final_rate=0.03),
}
