"""Copies of many tensors at once: one call of torch's for all, not one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Elements: 512 bytes of float32, as torch's allocator aligns.
_ALIGNED = 128
_SMALL = 2**20


@torch.no_grad()
def copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a copy of each tensor, detached. They share memory with each other only."""
    if not are_plain(tensors):
        return [tensor.detach().clone() for tensor in tensors]
    copies: dict[int, Tensor] = {}
    alike: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((tensor.dtype, tensor.device), []).append(index)
    for (dtype, device), indices in alike.items():
        starts: dict[int, int] = {}
        end = 0
        for index in indices:
            tensor = tensors[index]
            # Large ones gain nothing, and need not find so much memory in one piece.
            if tensor.is_contiguous() and tensor.numel() <= _SMALL:
                starts[index] = end
                # Where the parts begin, a kernel may read several numbers at once.
                end += -(-tensor.numel() // _ALIGNED) * _ALIGNED
            else:
                copies[index] = torch.empty_like(tensor, requires_grad=False)
        memory = torch.empty(end, dtype=dtype, device=device)
        for index, start in starts.items():
            tensor = tensors[index]
            copies[index] = memory.as_strided(tensor.shape, tensor.stride(), start)
        copy_alike([copies[index] for index in indices], [tensors[index] for index in indices])
    return [copies[index] for index in range(len(tensors))]


@torch.no_grad()
def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Overwrite each of `targets` with the one of `sources` in its place, of the same shape."""
    if not (are_plain(targets) and are_plain(sources)):
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
        copy_alike(*columns)


@torch.no_grad()
def copy_alike(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Do what `copy_into` does, for plain tensors of one dtype on one device."""
    _foreach_copy_(targets, sources)


class Backup:
    """The values of many tensors, to be written back if need be: that is when views are made.

    Args:
        tensors: they stay the objects that they are.
    """

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Of tensors that lie side by side in one that is flat, and of single ones.
        self._joined: list[tuple[list[Tensor], Tensor]] = []
        self._single: list[tuple[Tensor, Tensor]] = []
        alike: dict[Any, list[Tensor]] = {}
        plain = are_plain(tensors)
        for tensor in tensors:
            if plain and tensor.numel() <= _SMALL:
                alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
            else:
                self._single.append((tensor, tensor.detach().clone()))
        for together in alike.values():
            flat = _flatten_dense_tensors(together)
            # Of one tensor it may be a view.
            self._joined.append((together, flat.clone() if len(together) == 1 else flat))

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the tensors the values that they had."""
        targets, values = [], []
        for together, flat in self._joined:
            targets += together
            values += _unflatten_dense_tensors(flat, together)
        for tensor, copied in self._single:
            targets.append(tensor)
            values.append(copied)
        copy_into(targets, values)


class Filling:
    """Memory for many owners, which is written in one call for all once it is there.

    On a GPU a launch costs more than most of these tensors take to write, and to find memory for
    one tensor costs as much as for many of its shape.
    """

    def __init__(self) -> None:
        self._zeros: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._places: dict[Any, list[_Place]] = {}

    def zeros(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return what `like.new_zeros` does, to be filled, in memory of its own."""
        made = like.new_empty(shape, dtype=dtype)
        self._zeros.append(made)
        return made

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Return what `torch.zeros_like` does, without gradients, to be filled."""
        made = torch.empty_like(tensor, requires_grad=False)
        self._zeros.append(made)
        return made

    def place(
        self,
        table: dict[str, Any],
        name: str,
        like: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Let `table[name]`, None until then, be what `like.new_zeros` returns.

        It shares memory with others of its shape, so it is for what no compiled graph writes: that
        would have to look at all of them.
        """
        self._place(_Place(table, name, None), like, shape, dtype)

    def place_copy(self, table: dict[str, Any], name: str, tensor: Tensor) -> None:
        """Let `table[name]`, None until then, be a copy of `tensor`; see `place`."""
        self._place(_Place(table, name, tensor.detach()), tensor, tensor.shape, None)

    def into(self, target: Tensor, source: Tensor) -> None:
        """Do what `target.copy_(source)` does, once the zeros are there."""
        self._copies.append((target.detach(), source.detach()))

    @torch.no_grad()
    def fill(self) -> None:
        """Write all that has been asked for so far."""
        for (shape, dtype, device, zero), places in self._places.items():
            made = torch.empty((len(places), *shape), dtype=dtype, device=device)
            if zero:
                self._zeros.append(made)
            for place, tensor in zip(places, made.unbind(), strict=True):
                place.table[place.name] = tensor
                if place.source is not None:
                    self._copies.append((tensor, place.source))
        alike: dict[Any, list[Tensor]] = {}
        for tensor in self._zeros:
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for tensors in alike.values():
            _foreach_zero_(tensors)
        if self._copies:
            targets, sources = zip(*self._copies, strict=True)
            copy_into(targets, sources)
        self._zeros, self._copies, self._places = [], [], {}

    def _place(
        self, place: _Place, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None
    ) -> None:
        place.table[place.name] = None
        kind = tuple(shape), dtype or like.dtype, like.device, place.source is None
        self._places.setdefault(kind, []).append(place)


class _Place(NamedTuple):
    """Where a tensor goes that is not there yet, and what is copied into it, None for zeros."""

    table: dict[str, Any]
    name: str
    source: Tensor | None


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether none is of a class with ways of its own, or sparse."""
    kinds = set(map(type, tensors)) <= {Tensor, nn.Parameter}
    return kinds and all(tensor.layout is torch.strided for tensor in tensors)


# They have no public names.
_flatten_dense_tensors: Any = torch._C._nn.flatten_dense_tensors  # pyright: ignore[reportAttributeAccessIssue]
_unflatten_dense_tensors: Any = torch._C._nn.unflatten_dense_tensors  # pyright: ignore[reportAttributeAccessIssue]
_foreach_zero_: Any = torch._foreach_zero_  # pyright: ignore[reportPrivateImportUsage]
_foreach_copy_: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
