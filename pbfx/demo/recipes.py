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
        candidate_lr: step size of the candidates.
        threads: CPU threads, None for torch's own choice.
    """

    net: Callable[[float], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    final_rate: float
    candidate_lr: float
    threads: int | None = None


# Chosen on validation scores, with seeds that are not the demo's.
RECIPES = {
    "digits": Recipe(
        DigitsNet,
        lambda parameters: Adam(parameters, lr=0.05),
        final_rate=0.05,
        # A dendrite phase has a few hundred batches here, too few for steps of 1e-3.
        candidate_lr=2e-2,
        # The tensors are too small to share: on two busy cores a run took 28 s with two threads and
        # 2.3 s with one.
        threads=1,
    ),
    "mnist": Recipe(
        MnistNet,
        lambda parameters: Adadelta(parameters, lr=1.0),
        final_rate=0.03,
        candidate_lr=1e-3,
    ),
}
