"""All or nothing: put a model, its optimizer and its schedule back when a change of them fails."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pbfx.compiled import drop_compiled_code
from pbfx.copies import Backup
from pbfx.dendrites import Dendrites
from pbfx.errors import RestructureError
from pbfx.optimizers import Schedule
from pbfx.parts import Walk, Walked, walk
from pbfx.perforated import PerforatedModule, update_followers


@contextmanager
def undoing(
    model: Walked,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    *,
    values: bool = True,
) -> Iterator[None]:
    """Run the body; if it fails, put model, optimizer and schedule back as they were.

    Args:
        model: and what follows: what the body may change.
        optimizer: likewise.
        schedule: likewise.
        values: whether the body writes into tensors of the model that exist already, so that they
            have to be copied first.

    Raises:
        RestructureError: from whatever failed.
    """
    found = walk(model)
    with _uncollected():
        undo = _Undo(found, optimizer, schedule, values)
        try:
            yield
            for part in found.parts.values():
                update_followers(part)
        # Whatever went wrong, user's code or ours or Ctrl-C, must not leave half a model behind.
        except BaseException as error:
            undo()
            if isinstance(error, RestructureError) or not isinstance(error, Exception):
                raise
            raise RestructureError(
                f"restructuring failed and was undone: {type(error).__name__}: {error}"
            ) from error


@contextmanager
def _uncollected() -> Iterator[None]:
    """Let the garbage collector wait for the end of the body.

    A graph, and what is kept to undo it, is many small objects that stay: as they are made the
    collector would walk over all that the process holds, which takes longer than the rest.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Undo:
    """Everything that a restructuring may change, and how to put it back.

    Putting back runs no code of the user's, such as a scheduler's `load_state_dict`: that may be
    what failed.
    """

    def __init__(
        self,
        found: Walk,
        optimizer: Optimizer | None,
        schedule: Schedule | None,
        values: bool,
    ) -> None:
        averaged = {copy for part in found.parts.values() for copy in part.perforation.followers}
        walks = found, *(walk(copy) for copy in averaged)
        modules = list({id(m): m for each in walks for m in each.modules.values()}.values())
        tables: list[dict[str, Any]] = []
        for module in modules:
            tables += module._modules, module._parameters, module._buffers
        self.tables = [(table, dict(table)) for table in tables]
        self.training = [(module, module.training) for module in modules]
        grown = [module for module in modules if isinstance(module, Dendrites)]
        self.grown = [(module, module.finishing, module.alive) for module in grown]
        # Where slots are reserved, growing is writing.
        values = values or any(module.alive is not None for module in grown)
        self.parts = [
            (part, part.perforation, dataclasses.replace(part.perforation), part._graph)
            for part in modules
            if isinstance(part, PerforatedModule)
        ]
        learning = _distinct(t for m in modules for t in m._parameters.values())
        self.flags = [(t, t.requires_grad, t.grad) for t in learning]
        written = []
        if values:
            written = _distinct([*learning, *(t for m in modules for t in m._buffers.values())])
        kept: list[dict[Any, Any]] = []
        lists: list[list[Any]] = []
        if optimizer is not None:
            kept += [vars(optimizer), optimizer.state, *optimizer.state.values()]
            kept += optimizer.param_groups
            lists.append(optimizer.param_groups)
            # A rate can be a tensor, which schedulers write in place.
            entries = (value for group in optimizer.param_groups for value in group.values())
            rates = [value for value in entries if isinstance(value, Tensor)]
            written = _distinct([*written, *rates])
        if schedule is not None:
            kept += [vars(part) for part in schedule.parts()]
        self.dicts = [(d, dict(d)) for d in kept]
        lists += [v for _, items in self.dicts for v in items.values() if isinstance(v, list)]
        self.lists = [(values, list(values)) for values in lists]
        self.values = Backup(written)

    @torch.no_grad()
    def __call__(self) -> None:
        for mapping, items in (*self.tables, *self.dicts):
            mapping.clear()
            mapping.update(items)
        for values, members in self.lists:
            values[:] = members
        for module, training in self.training:
            module.training = training
        for dendrites, finishing, alive in self.grown:
            dendrites.finishing, dendrites.alive = finishing, alive
        for tensor, requires_grad, grad in self.flags:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad
        self.values.write_back()
        for part, perforation, fields, graph in self.parts:
            perforation.__dict__.update(fields.__dict__)
            part._graph = graph
            part.recompile()
        drop_compiled_code(*(part for part, *_ in self.parts))


def _distinct(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Return each tensor once. By identity: to hash one is a call of Python's."""
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())
