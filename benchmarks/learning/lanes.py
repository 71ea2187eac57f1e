"""Do several runs at a time in one process: on a GPU each has a stream, and the host goes round.

A small net leaves most of a GPU idle, and a replayed graph needs the host for microseconds. So one
process launches some steps of each of its runs, and tends to whichever is done.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.learning.lane import Lane
from benchmarks.learning.run import Outcome
from benchmarks.learning.task import Task
from benchmarks.learning.trainer import Ready

# Between two rounds in which no run was ready: short beside an epoch, long beside a round.
_PAUSE = 5e-4


@dataclass(frozen=True)
class Ended:
    """How a run ended: with an outcome, or with a fault, which is the traceback."""

    task: Task
    outcome: Outcome | None
    fault: str | None = None


@dataclass
class _Place:
    lane: Lane
    task: Task | None = None
    run: Generator[Ready, None, Outcome] | None = None
    ready: Ready = field(default=lambda: True)


def run_all(
    next_task: Callable[[], Task | None],
    start: Callable[[Task, Any], Generator[Ready, None, Outcome]],
    lanes: int,
    device: torch.device,
) -> Iterator[Ended]:
    """Yield runs as they end.

    Args:
        next_task: asked whenever a lane is free; None once there is no more.
        start: begins a run whose graphs live in the given pool; its generator is resumed in the
            run's lane.
        lanes: runs at a time.
        device: where they compute.
    """
    places = [_Place(Lane(device)) for _ in range(lanes)]
    while places:
        idle = True
        for place in list(places):
            if place.run is None:
                place.task = next_task()
                if place.task is None:
                    places.remove(place)
                    continue
                place.lane.seed(place.task.seed)
                place.run = start(place.task, place.lane.pool)
                place.ready = lambda: True
            if not place.ready():
                continue
            idle = False
            ended = _resume(place)
            if ended is not None:
                place.run = None
                yield ended
        if idle:
            time.sleep(_PAUSE)


def _resume(place: _Place) -> Ended | None:
    assert place.run is not None
    assert place.task is not None
    try:
        with place.lane.active():
            place.ready = next(place.run)
    except StopIteration as end:
        return Ended(place.task, end.value)
    # One run's fault must not cost the others' results; it is reported with the row that is
    # missing.
    except Exception:
        return Ended(place.task, None, traceback.format_exc())
    return None
