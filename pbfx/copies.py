"""Copies of many tensors at once: one call of torch's for all, not one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a copy of each tensor, detached, in memory of its own."""
    plain = [_is_plain(tensor) for tensor in tensors]
    copies = [
        torch.empty_like(tensor, requires_grad=False) if simple else tensor.detach().clone()
        for tensor, simple in zip(tensors, plain, strict=True)
    ]
    pairs = zip(copies, tensors, plain, strict=True)
    copy_into(*_columns([(copy, tensor) for copy, tensor, simple in pairs if simple]))
    return copies


@torch.no_grad()
def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Overwrite each of `targets` with the one of `sources` in its place, of the same shape."""
    pairs = list(zip(targets, sources, strict=True))
    together = [pair for pair in pairs if all(map(_is_plain, pair))]
    if together:
        _foreach_copy_(*_columns(together))
    if len(together) < len(pairs):
        for target, source in pairs:
            if not (_is_plain(target) and _is_plain(source)):
                target.copy_(source)


def _columns(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [target for target, _ in pairs], [source.detach() for _, source in pairs]


def _is_plain(tensor: Tensor) -> bool:
    """Return whether `tensor` is no subclass with ways of its own, and no sparse one."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


# It has no public name.
_foreach_copy_: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
