"""Copies of many tensors at once: one call of torch's for all, not one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a copy of each tensor, detached, in memory of its own."""
    if not _are_plain(tensors):
        return [tensor.detach().clone() for tensor in tensors]
    copies = [torch.empty_like(tensor, requires_grad=False) for tensor in tensors]
    copy_into(copies, tensors)
    return copies


@torch.no_grad()
def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Overwrite each of `targets` with the one of `sources` in its place, of the same shape."""
    if not (_are_plain(targets) and _are_plain(sources)):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return
    # On a GPU one launch is for tensors of one dtype; of several it would be one for each tensor.
    alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        columns = alike.setdefault((target.dtype, target.device, source.dtype), ([], []))
        columns[0].append(target)
        columns[1].append(source)
    for columns in alike.values():
        _foreach_copy_(*columns)


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether none is of a class with ways of its own, or sparse."""
    kinds = set(map(type, tensors)) <= {Tensor, nn.Parameter}
    return kinds and all(tensor.layout is torch.strided for tensor in tensors)


# It has no public name.
_foreach_copy_: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
