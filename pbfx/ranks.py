"""A model that several processes train together, under `DistributedDataParallel`.

The wrapper averages the gradients that it saw when it was made, and among those of a dendrite phase
are the moments of the candidates: with them all that learners decide is the same on every rank. Two
things are left to do. After a restructure the wrapper has to look again; and ranks whose scores
differ would grow apart, and wait for each other for ever.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pbfx.errors import RestructureError, ScoreError, TrackerError
from pbfx.history import finite_score
from pbfx.learning import SiteLearner
from pbfx.parts import parts_of

Wrappers = list[DistributedDataParallel]


def wrappers_of(model: nn.Module) -> Wrappers:
    """Return the wrappers through which several processes train `model`, or parts of it.

    A module does not know its wrapper: where there is a process group of several, all objects that
    the garbage collector tracks are looked at, which takes some hundredths of a second.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return []
    parts = {id(part) for part in parts_of(model).values()}
    # By type: some objects warn when they are asked for their class.
    alive = (o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel))
    return [
        wrapper
        for wrapper in alive
        if group_of(wrapper).size() > 1
        and any(id(module) in parts for module in wrapper.module.modules())
    ]


def group_of(wrapper: DistributedDataParallel) -> dist.ProcessGroup:
    """Return the processes that a wrapper averages over."""
    assert wrapper.process_group is not None, "it has one from when it was made"
    return wrapper.process_group


def agreed_score(score: Any, wrappers: Wrappers) -> float:
    """Return `score` as a float, the same on every rank.

    Raises:
        ScoreError: if it is not a finite number.
        TrackerError: if it is not one on another rank, or another one.
    """
    if not wrappers:
        return finite_score(score)
    try:
        value = finite_score(score)
    except ScoreError:
        # The other ranks wait for an answer.
        _gathered(None, wrappers)
        raise
    scores = _gathered(value, wrappers)
    if any(other != value for other in scores):
        raise TrackerError(
            f"the ranks give different scores, {scores} (None: not a finite number), and would "
            "grow apart; the tracker has not moved. Give all ranks the same: average it with "
            "torch.distributed.all_reduce, or broadcast that of rank 0"
        )
    return value


def check_candidates(score: float | None, wrappers: Wrappers) -> None:
    """Refuse candidates that have learnt different things on different ranks.

    Raises:
        TrackerError: if their scores differ.
    """
    scores = _gathered(score, wrappers) if wrappers else []
    if any(other != score for other in scores):
        raise TrackerError(
            f"the candidates' scores differ between ranks, {scores}: their gradients were not "
            "averaged. Every training step of a dendrite phase must run the model through its "
            "DistributedDataParallel, and outside of no_sync()"
        )


def check_renewable(wrappers: Wrappers) -> None:
    """Refuse wrappers that `renew` could not help.

    Raises:
        RestructureError: naming what to do.
    """
    if any(group_of(wrapper) is not dist.group.WORLD for wrapper in wrappers):
        raise RestructureError(
            "a DistributedDataParallel over another process group than the default one cannot "
            "follow a restructure; wrap the model without process_group"
        )


def renew(wrappers: Wrappers) -> None:
    """Let the wrappers see the parameters that learn now, as if they were made anew."""
    for wrapper in wrappers:
        state = dict(wrapper.__dict__)
        hooks = list(state.get("_comm_hooks", ()))
        for name in ("process_group", "reducer", "logger"):
            state.pop(name, None)
        ignored = wrapper.parameters_to_ignore
        named = wrapper.module.named_parameters()
        state["_module_parameters"] = [p for name, p in named if name not in ignored]
        state["_comm_hooks"], state["_has_rebuilt_buckets"] = [], False
        # Its hooks on the parameters go with it.
        del wrapper.reducer
        # What unpickling does: it makes a reducer, and asks no other rank.
        wrapper.__setstate__(state)
        for hook, of_hook in hooks:
            wrapper.register_comm_hook(of_hook, hook)


def listen_together(learners: Mapping[str, SiteLearner], wrappers: Wrappers) -> None:
    """Let learners know the processes that their model is trained by."""
    for learner in learners.values():
        learner.group = group_of(wrappers[0]) if wrappers else None


def _gathered(value: float | None, wrappers: Wrappers) -> list[float | None]:
    """Return what every rank has given, in their order."""
    group = group_of(wrappers[0])
    found: list[float | None] = [None] * group.size()
    dist.all_gather_object(found, value, group=group)
    return found
