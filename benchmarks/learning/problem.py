"""A data set on one device, in three splits, and how a net's answer to it is judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Inputs `(n, ...)` with their targets `(n,)`, or `(n, time)` where every step has one."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Split:
        """Hold the split on `device`."""
        return Split(_moved(self.inputs, device), _moved(self.targets, device))


@dataclass(frozen=True)
class Problem:
    """Learn from `train`, choose by `validation`; `test` chooses nothing."""

    name: str
    train: Split
    validation: Split
    test: Split

    def to(self, device: torch.device) -> Problem:
        """Hold all splits on `device`."""
        splits = (split.to(device) for split in (self.train, self.validation, self.test))
        return Problem(self.name, *splits)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor, and windows that overlap as the few numbers that they show."""
    shown = tensor.untyped_storage().nbytes() // tensor.element_size()
    if shown >= tensor.numel():
        return tensor.to(device)
    flat = tensor.as_strided((shown,), (1,), 0).to(device)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of `logits (..., classes)`, in nats."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def judge(logits: Tensor, targets: Tensor) -> Tensor:
    """Return `(2,)`: the number of wrong answers, and the sum of the cross entropies."""
    flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    wrong = (flat.argmax(-1) != wanted).sum()
    return torch.stack((wrong.float(), F.cross_entropy(flat, wanted, reduction="sum")))
