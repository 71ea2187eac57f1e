"""Run a function once per task, each in a process of its own, some at a time.

A process that dies or outlives its limit costs its own result and nothing else. Processes are
forked from a server that has imported the heavy libraries already and started no threads.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
# Inherited by the server and all that it forks: one core per process, no downloads, no chatter.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


# The stage of a process that has not reported any.
STARTING = "start"


@dataclasses.dataclass(frozen=True)
class Ended(Generic[Task]):
    """How a task ended.

    Attributes:
        task: the task.
        result: what the function returned; None if it did not come to that.
        stage: the last stage that it reported.
        fault: why there is no result; None if there is one.
        seconds: from its first report to the end.
    """

    task: Task
    result: Any
    stage: str
    fault: str | None
    seconds: float


@dataclasses.dataclass
class _Running:
    process: Any
    connection: Connection
    task: Any
    started: float
    stage: str = STARTING


def run_each(
    function: Callable[[Any, Callable[[str], None]], Any],
    tasks: Sequence[Task],
    jobs: int,
    time_limit: float,
    budget: float | None,
    preload: Sequence[str],
) -> Iterator[Ended[Task]]:
    """Yield the ends of tasks as they come.

    Args:
        function: a module-level `function(task, report)`; it may report stages by name.
        tasks: picklable; started in this order.
        jobs: how many run at a time.
        time_limit: seconds after its first report, or before it, after which a task is ended.
        budget: seconds after which the rest is given up, what is running too, or None. What was
            given up has no end.
        preload: modules that the server imports once for all.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    outside = dict(os.environ)
    os.environ |= _ENVIRONMENT
    begun, waiting, running = time.monotonic(), list(tasks), []
    try:
        while waiting or running:
            if budget is not None and time.monotonic() - begun > budget:
                return
            while waiting and len(running) < jobs:
                running.append(_start(context, function, waiting.pop(0)))
            wait([item for r in running for item in (r.connection, r.process.sentinel)], 0.5)
            for one in list(running):
                late = time.monotonic() - one.started > time_limit
                ended = _poll(one, f"no end within {time_limit:g} s" if late else None)
                if ended is not None:
                    running.remove(one)
                    yield ended
    finally:
        os.environ.clear()
        os.environ.update(outside)
        for one in running:
            one.process.kill()
            one.process.join()


def _start(context: Any, function: Callable[..., Any], task: Any) -> _Running:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(function, task, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Running(process, ours, task, time.monotonic())


def _poll(one: _Running, late: str | None) -> Ended | None:
    """Take in what a process has said; return its end if it has ended, or must because `late`."""
    result, said, alive = None, False, one.process.is_alive()
    try:
        while one.connection.poll():
            kind, value = one.connection.recv()
            if kind == "stage":
                if one.stage == STARTING:
                    one.started = time.monotonic()
                one.stage = value
            else:
                result, said = value, True
    except EOFError:
        alive = False
    if not said and alive and not late:
        return None
    fault = None
    if not said:
        fault = late if alive else None
        if alive:
            one.process.kill()
    one.process.join()
    if not said and fault is None:
        fault = f"the process died with exit code {one.process.exitcode}"
    one.connection.close()
    return Ended(one.task, result, one.stage, fault, time.monotonic() - one.started)


def _work(function: Callable[..., Any], task: Any, connection: Connection) -> None:
    # What libraries print would run together with fifteen others'.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    result = function(task, lambda stage: connection.send(("stage", stage)))
    connection.send(("result", result))
    connection.close()
