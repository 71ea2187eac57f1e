"""Hold older dendrites still while the newest one's weights train.

All D dendrites of a site are one parameter, which an optimizer steps as a whole: weight decay and
momentum from the time when an older row was the newest would move it without any gradient. So what
a step does to older rows is undone, within the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pbfx.dendrites import Dendrites


def hold_older(modules: Iterable[nn.Module], optimizer: Optimizer) -> list[RemovableHandle]:
    """Keep `optimizer` from moving the weights of older dendrites, until the handles are removed.

    Args:
        modules: of a model; the dendrites among them are asked now. Call it again after a
            restructure.
        optimizer: any of torch's. Nothing of its state is touched.

    Returns:
        No handles if no dendrite has to be held.
    """
    held = [m for m in modules if isinstance(m, Dendrites) and m.holds_older]
    if not held:
        return []
    hold = _Hold(held)
    return [
        optimizer.register_step_pre_hook(hold.before),
        optimizer.register_step_post_hook(hold.after),
    ]


class _Hold:
    """The rows of older dendrites as they were before the step that runs now."""

    def __init__(self, dendrites: Sequence[Dendrites]) -> None:
        self._dendrites = dendrites
        self._rows: list[tuple[Tensor, Tensor]] = []

    def before(self, optimizer: Optimizer, args: Any, named: Any) -> None:
        """Copy them: whatever they are now, somebody may have loaded others since."""
        self._rows = [
            (role[:-1], role[:-1].clone())
            for dendrites in self._dendrites
            if dendrites.holds_older
            for role in (p.detach() for p in dendrites.tuned())
        ]

    @torch.no_grad()
    def after(self, optimizer: Optimizer, args: Any, named: Any) -> None:
        """Put them back."""
        for rows, before in self._rows:
            rows.copy_(before)
        self._rows = []
