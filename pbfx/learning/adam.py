"""What Adam remembers of a few tensors, without what torch's optimizer keeps around it.

A restructure makes one for every site, and torch's takes longer to make than the site's candidates.
To a file it is the state dict of `torch.optim.Adam`, which also reads it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pbfx.copies import Filling


class Adam:
    """Settings and state; whoever steps calls the kernel.

    Args:
        parameters: that learn.
        lr: the step size.
        memory: writes the zeros that all moments start from.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float, memory: Filling) -> None:
        self.parameters = list(parameters)
        self.lr, self.betas, self.eps, self.weight_decay = lr, (0.9, 0.999), 1e-8, 0.0
        self.state: list[dict[str, Tensor]] = [{} for _ in self.parameters]
        for parameter, state in zip(self.parameters, self.state, strict=True):
            memory.place(state, "step", parameter, (), torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                if parameter.is_contiguous():
                    memory.place(state, name, parameter, parameter.shape)
                else:
                    # The kernel wants them to lie as the parameter does.
                    state[name] = memory.zeros_like(parameter)

    def state_dict(self) -> dict[str, Any]:
        """Return what `torch.optim.Adam.state_dict` does; its tensors are the ones here."""
        torchs = self._torchs()
        torchs.state.update(zip(self.parameters, self.state, strict=True))
        return torchs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state` left off.

        Raises:
            ValueError: from torch, if it is of other parameters.
        """
        torchs = self._torchs()
        torchs.load_state_dict(state)
        group = torchs.param_groups[0]
        self.lr, self.betas, self.eps = group["lr"], group["betas"], group["eps"]
        self.weight_decay = group["weight_decay"]
        for parameter, own in zip(self.parameters, self.state, strict=True):
            # A state that was saved before the first step may hold none.
            own |= torchs.state.get(parameter, {})

    def _torchs(self) -> torch.optim.Adam:
        return torch.optim.Adam(
            self.parameters,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )
