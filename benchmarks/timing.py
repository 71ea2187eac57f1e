"""Time functions side by side: interleaved rounds, so that drift hits all of them alike."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

# A sample shorter than this is mostly the clock and, on a GPU, the first launch.
SAMPLE_SECONDS = 0.005
MIN_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Quantiles:
    """The 20th, 50th and 80th percentiles of a sample."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Return the quantiles of `values`, interpolated linearly."""
        points = torch.tensor(values, dtype=torch.float64)
        marks = torch.quantile(points, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
        return cls(*marks.tolist())


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `call` takes from start to finish, the device's share included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def sample(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Return the mean seconds per call of `calls` calls in a row, by events on a GPU.

    Successive calls queue up behind each other, as the steps of a training loop do.
    """
    if device.type != "cuda":
        return wall(lambda: [call() for _ in range(calls)], device) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / calls


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    cycles: Mapping[str, int],
    prepare: Callable[[str], object],
) -> dict[str, list[float]]:
    """Time each function once per round until `seconds` are over, for `MIN_ROUNDS` at least.

    Args:
        calls: functions that are warm already.
        device: where they compute.
        seconds: how long to go on.
        cycles: after how many calls the work of a function repeats; a sample holds whole cycles.
        prepare: called with the name before each sample, outside its time.

    Returns:
        Seconds per call for every round, by name; rounds correspond.
    """
    counts = {}
    for name, call in calls.items():
        prepare(name)
        cycle = cycles[name]
        each = sample(call, cycle, device)
        counts[name] = math.ceil(max(SAMPLE_SECONDS / max(each, 1e-9), 1) / cycle) * cycle
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < MIN_ROUNDS or time.perf_counter() < end:
        # Each round starts with the next one, so that nobody always follows the same neighbour.
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            prepare(name)
            times[name].append(sample(calls[name], counts[name], device))
        rounds += 1
    return times


def ratios(times: Sequence[float], base: Sequence[float]) -> Quantiles:
    """Return the quantiles of the ratios, round by round."""
    return Quantiles.of([a / b for a, b in zip(times, base, strict=True)])
