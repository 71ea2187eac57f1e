"""How much of a GPU a step needs at most, its model and optimizer, if any, included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.timing import synchronize


def peak_mib(
    step: Callable[[], object], model: nn.Module, optimizer: Optimizer | None, device: torch.device
) -> float | None:
    """Run `step` once and return its peak in MiB; None, without running it, where there is no GPU.

    Others' models lie on the device too: what this one holds is counted, and what the step adds.
    """
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    added = torch.cuda.max_memory_allocated(device) - before
    return (added + _resident(model, optimizer)) / 2**20


def _resident(model: nn.Module, optimizer: Optimizer | None) -> int:
    """Return the bytes of a model's weights, buffers, gradients and optimizer state."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    for state in () if optimizer is None else optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
