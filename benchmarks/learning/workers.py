"""Hand tasks to worker processes, some to each device, and take rows back as runs end.

A worker asks for a task whenever one of its lanes is free, so the fast ones do more. One that dies
costs the runs that it was doing; they are done again when the study is.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.learning import data, rows
from benchmarks.learning.lanes import run_all
from benchmarks.learning.problem import Problem
from benchmarks.learning.run import start
from benchmarks.learning.task import Task

# Seconds for a process to end by itself.
_PATIENCE = 2.0
_PRELOAD = ("pbfx", "benchmarks.learning.workers")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where runs compute, and how many at a time.

    Attributes:
        devices: `cpu`, `cuda:0`, ...
        jobs: processes for each device.
        lanes: runs at a time in each process.
        steps_per_graph: see `Trainer`.
        data_directory: the folder with the data sets.
        revision: to record, see `environment`.
        own_kernels: see `Study.make_optimizer`.
    """

    devices: tuple[str, ...]
    jobs: int
    lanes: int
    steps_per_graph: int = 8
    data_directory: Path | None = None
    revision: str | None = None
    own_kernels: bool = True

    @property
    def beside(self) -> int:
        """Runs at a time on each device."""
        return self.jobs * self.lanes


@dataclasses.dataclass(frozen=True)
class Report:
    """A run that has ended: the cells of its row, or the fault; `task` is None for a worker's."""

    task: Task | None
    cells: dict[str, str] | None
    fault: str | None = None


def work_off(
    tasks: Sequence[Task], placement: Placement, budget: float | None = None
) -> Generator[Report, None, None]:
    """Yield reports as runs end; tasks are begun in the order given.

    Args:
        tasks: what to do.
        placement: where.
        budget: seconds after which what still runs is given up, without a report; None for none.
            A run is not begun where those before it took longer than what is left.
    """
    if placement.devices == ("cpu",) and placement.jobs == 1:
        yield from _here(tasks, placement, budget)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    waiting = list(tasks)
    with _environment(placement.lanes), contextlib.ExitStack() as stack:
        count = min(placement.jobs * len(placement.devices), len(tasks))
        # Each lane asks as soon as it can: with few tasks, some processes would have them all.
        lanes = min(placement.lanes, -(-len(tasks) // max(count, 1)))
        placement = dataclasses.replace(placement, lanes=lanes)
        connections: dict[Connection, Any] = {}
        doing: dict[Connection, list[Task]] = collections.defaultdict(list)
        for number in range(count):
            device = placement.devices[number % len(placement.devices)]
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(device, placement, theirs), daemon=True)
            process.start()
            theirs.close()
            stack.callback(_end, process, ours)
            connections[ours] = process
        end = None if budget is None else time.monotonic() + budget
        took: collections.deque[float] = collections.deque(maxlen=count)
        while connections and (end is None or time.monotonic() < end):
            for connection in wait(list(connections), 0.5):
                assert isinstance(connection, Connection)
                try:
                    report = connection.recv()
                    if report is None:
                        usual = sum(took) / len(took) if took else 0.0
                        late = end is not None and time.monotonic() + usual > end
                        task = waiting.pop(0) if waiting and not late else None
                        connection.send(task)
                        if task is not None:
                            doing[connection].append(task)
                except (EOFError, OSError):
                    process = connections.pop(connection)
                    code = _ended(process)
                    if code:
                        names = "; ".join(" ".join(task.key[:4]) for task in doing[connection])
                        fault = f"a worker process died with exit code {code}, doing {names}"
                        yield Report(None, None, fault)
                    continue
                if report is not None:
                    if report.task is not None:
                        doing[connection].remove(report.task)
                    if report.cells is not None:
                        took.append(float(report.cells["seconds"]))
                    alive = lanes * len(connections) / len(placement.devices)
                    yield report if report.cells is None else _shared(report, report.cells, alive)


def _shared(report: Report, cells: dict[str, str], beside: float) -> Report:
    """Count the run's time as shared by the runs beside it that are really there."""
    return dataclasses.replace(report, cells=cells | rows.gpu_seconds(cells, beside))


def _ended(process: Any) -> int:
    """Return the exit code of a process that has hung up."""
    process.join(_PATIENCE)
    # After a fault of the GPU the driver may take minutes to let it go.
    process.kill()
    process.join()
    return process.exitcode


def _end(process: Any, connection: Connection) -> None:
    process.kill()
    process.join()
    connection.close()


@contextlib.contextmanager
def _environment(lanes: int) -> Iterator[None]:
    """Let processes that are started in the body have one core each, and few queues to the GPU.

    The Multi-Process Service turns processes away once all have some hundred queues together: with
    32 for each, the fourth on an H200.
    """
    outside = dict(os.environ)
    # The lanes' streams, and the default one.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": str(min(32, lanes + 1))}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(outside)


def _here(tasks: Sequence[Task], placement: Placement, budget: float | None) -> Iterator[Report]:
    """Do the tasks in this process, for one core is all there is to use."""
    begun, waiting = time.monotonic(), list(tasks)

    def next_task() -> Task | None:
        late = budget is not None and time.monotonic() - begun > budget
        return None if late or not waiting else waiting.pop(0)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _reports(next_task, torch.device("cpu"), placement)
    finally:
        torch.set_num_threads(threads)


def _work(device: str, placement: Placement, connection: Connection) -> None:
    """Be a worker process."""

    def next_task() -> Task | None:
        connection.send(None)
        return connection.recv()

    torch.set_num_threads(1)
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
        # Both are the same arithmetic; convolutions have it by default.
        torch.set_float32_matmul_precision("high")
    try:
        for report in _reports(next_task, where, placement):
            connection.send(report)
    # The parent is gone, and so is the reason to go on.
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception:
        connection.send(Report(None, None, traceback.format_exc()))
        raise


def _reports(next_task: Any, device: torch.device, placement: Placement) -> Iterator[Report]:
    problems: dict[str, Problem] = {}

    def begin(task: Task, pool: Any) -> Any:
        name = task.of.data
        if name not in problems:
            problems[name] = data.load(name, placement.data_directory).to(device)
            if device.type == "cuda":
                # Lanes read it on streams of their own.
                torch.cuda.synchronize(device)
        how = placement.steps_per_graph, pool, placement.own_kernels
        return start(task, problems[name], *how)

    where = environment("learning", device, "tf32", 0, placement.revision)
    for ended in run_all(next_task, begin, placement.lanes, device):
        if ended.outcome is None:
            yield Report(ended.task, None, ended.fault)
            continue
        where["utc"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        yield Report(ended.task, rows.encode(ended.task, ended.outcome, placement.beside, where))
