"""Do model, optimizer and settings belong together? Asked before a tracker touches anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pbfx.errors import TrackerError
from pbfx.parts import parts_of
from pbfx.phase import Phase
from pbfx.policy import fault_of
from pbfx.rates import RateSearch


def check(
    model: nn.Module, optimizer: Any, policy: Any, max_dendrites: Any, learning_rates: Any
) -> None:
    """Raise if a tracker cannot be made of these.

    Raises:
        TrackerError: naming what does not fit.
        RestructureError: if the model has no perforated parts.
    """
    parts = parts_of(model)
    check_optimizer(model, optimizer)
    if fault := fault_of(policy):
        raise TrackerError(fault)
    count = max_dendrites
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise TrackerError(f"max_dendrites must be a whole number of at least 0, got {count!r}")
    if not isinstance(learning_rates, RateSearch | None):
        raise TrackerError(
            f"learning_rates must be a pbfx.RateSearch or None, got {learning_rates!r}"
        )
    for path, part in parts.items():
        if part.perforation.phase is Phase.DENDRITE:
            raise TrackerError(
                f"the perforated part {path or type(part).__name__!r} is in its dendrite "
                "phase; to resume a run, make the tracker on the plain transformed model, "
                "then pbfx.load"
            )


def check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Raise if a tracker of `model` cannot do with `optimizer`.

    Raises:
        TrackerError: naming what does not fit.
        RestructureError: if the model has no perforated parts.
    """
    if not isinstance(optimizer, Optimizer):
        raise TrackerError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if trainable and not any(id(p) in held for p in trainable):
        raise TrackerError(
            "the optimizer holds none of the model's parameters; make it from the transformed "
            "model: optimizer = torch.optim.SGD(model.parameters(), ...)"
        )
    configs = [part.perforation.config for part in parts_of(model).values()]
    if isinstance(optimizer, torch.optim.Muon) and any(c.trains_stacks for c in configs):
        raise TrackerError(
            "Muon steps matrices only, and the weights of dendrites, which "
            f"tuning={configs[0].tuning!r} with finish={configs[0].finish} trains, are stacks "
            "of them; use another optimizer, or tuning='links' with finish=False"
        )
