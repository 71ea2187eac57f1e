"""A run as it was at one moment, to go back to: the network, the optimizer, the schedule."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pbfx.optimizers import Schedule, return_to
from pbfx.parts import parts_of
from pbfx.snapshot import Snapshot


@dataclasses.dataclass(frozen=True)
class Waypoint:
    """Copies of all that training changes, in a neuron phase.

    Attributes:
        network: structure and tensors.
        buffers: those that no state dict holds.
        optimizer: its state dict.
        schedule: see `Schedule.state_dict`.
        draws: how many pools each part had drawn.
    """

    network: Snapshot
    buffers: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    draws: dict[str, int]

    @classmethod
    def take(cls, model: nn.Module, optimizer: Optimizer, schedule: Schedule) -> Waypoint:
        """Copy everything."""
        network = Snapshot.take(model, 0.0)
        return cls(
            network,
            {n: b.detach().clone() for n, b in model.named_buffers() if n not in network.tensors},
            copy.deepcopy(optimizer.state_dict()),
            schedule.state_dict(),
            {path: part.perforation.draws for path, part in parts_of(model).items()},
        )

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: Optimizer, schedule: Schedule) -> None:
        """Copy everything back; the optimizer must hold the parameters that it held.

        Gradients are dropped. Pools are not drawn again: a new one differs from those before.
        """
        self.network.restore(model)
        for name, buffer in model.named_buffers():
            if name in self.buffers:
                buffer.copy_(self.buffers[name])
        return_to(optimizer, self.optimizer)
        schedule.load_state_dict(self.schedule)
        for parameter in model.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the waypoint as plain data and tensors."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"network": self.network.state_dict()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Waypoint:
        """Return the waypoint that `state_dict` described."""
        network: Any = Snapshot.from_state_dict(state["network"])
        return cls(**(state | {"network": network}))
