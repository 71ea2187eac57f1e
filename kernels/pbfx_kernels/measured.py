"""Which way of computing a site is the fastest here: measured at first use, kept on disk. Opt-in.

    with pbfx_kernels.measure():
        train(model)

The choice is else a pure function (`strategy.choose`). Inside `measure`, or with `PBFX_MEASURE=1`
in the environment, every way that can compute a site is timed once for each *question*: shape,
with the number of positions rounded up to a power of two, dtype, layout, kind of activation, GPU.
The answer is a small JSON file of its own, so that processes which measure at the same time need no
lock: each writes beside its file and renames. Folders carry the GPU's name, the versions of torch
and Triton, and a digest of these kernels, so that whatever changes is measured anew.

Nothing is measured while a graph is captured or compiled, and nothing that is read is ever run: a
file gives times by name, and names that are not on offer are passed over. A file that is damaged or
not ours is ignored, with one warning, and overwritten by the next measurement.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pbfx_kernels.launching import power_of_two
from pbfx_kernels.problem import Problem

SWITCH, FOLDER = "PBFX_MEASURE", "PBFX_CACHE_DIR"
_FORMAT = 1
# A file of ours has less than 1 KiB.
_MOST_BYTES = 2**16
# For one question, compilation included: after that, what has not been timed yet is not.
MOST_SECONDS = 20.0
_SAMPLES, _SAMPLE_SECONDS, _MOST_CALLS = 5, 0.002, 64
# How much arithmetic an activation is: one instruction, an exponential, or erf's polynomials.
_ACTIVATION_KINDS = {"relu": "cheap", "gelu": "erf"}

Ways = Mapping[str, Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Question:
    """What the fastest way of computing a site depends on.

    Attributes:
        op: `dendrites`, `gradient` or `neuron`.
        device: the GPU's name.
        dtype: of the soma, such as `bfloat16`.
        tf32: whether float32 products may round their factors to TF32.
        stride: of a convolution; empty for a linear op.
        dilation: likewise.
        groups: likewise, 1 for a linear op.
        positions: P, rounded up to a power of two.
        neurons: N.
        channels: K of a linear op, channels per group of a convolution.
        taps: of the kernel, 1 for a linear op.
        dendrites: D.
        channels_last: whether the neurons are neighbours in memory.
        activation: kind of f: `cheap`, `exponential` or `erf`.
        keep: whether activations are written.
    """

    op: str
    device: str
    dtype: str
    tf32: bool
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    positions: int
    neurons: int
    channels: int
    taps: int
    dendrites: int
    channels_last: bool
    activation: str
    keep: bool


def question_of(op: str, device: str, problem: Problem, activation: str, keep: bool) -> Question:
    """Describe a site, as coarsely as its fastest way allows.

    Args:
        op: `dendrites`, `gradient` or `neuron`.
        device: the GPU's name.
        problem: the site; not empty.
        activation: f, one of `ACTIVATIONS`.
        keep: whether activations are written.
    """
    geometry = problem.geometry
    return Question(
        op,
        device,
        str(problem.dtype).removeprefix("torch."),
        problem.tf32,
        geometry.stride,
        geometry.dilation,
        geometry.groups,
        power_of_two(problem.positions),
        problem.neurons,
        problem.channels,
        problem.taps,
        problem.dendrites,
        problem.channels_last,
        _ACTIVATION_KINDS.get(activation, "exponential"),
        keep,
    )


@dataclass(frozen=True, slots=True)
class _Settings:
    """What `measure` sets for its body: whether recorded times are used, and new ones taken."""

    uses: bool
    takes: bool


_settings: _Settings | None = None
# Answers of this process; None where nothing could be measured.
_answers: dict[Question, str | None] = {}


@contextlib.contextmanager
def measure(new: bool = True) -> Iterator[None]:
    """Choose kernels by time for the length of the body, in all threads of this process.

    The first call of a site takes up to some seconds more than the others; the times are kept in
    `$PBFX_CACHE_DIR`, by default `pbfx` in the user's cache folder, and serve later processes.
    `PBFX_MEASURE=1` in the environment does the same for a whole process, `PBFX_MEASURE=0` keeps
    it off whatever a program says.

    Args:
        new: whether to measure; if not, only what has been measured before is used.
    """
    global _settings
    before, _settings = _settings, _Settings(True, new)
    try:
        yield
    finally:
        _settings = before


def active() -> bool:
    """Return whether times decide, and not the table alone."""
    return _current().uses


def inside() -> bool:
    """Return whether a body of `measure` runs, whatever the environment says of it."""
    return _settings is not None


def _current() -> _Settings:
    told = _environment(os.environ.get(SWITCH))
    if told is not None and (not told.uses or _settings is None):
        return told
    return _settings or _Settings(False, False)


@functools.cache
def _environment(value: str | None) -> _Settings | None:
    if value in (None, "", "0", "1"):
        return None if not value else _Settings(value == "1", value == "1")
    warnings.warn(
        f"pbfx: {SWITCH}={value!r} is neither 0 nor 1 and is ignored", RuntimeWarning, stacklevel=2
    )
    return None


def fastest(question: Question, ways: Ways) -> str | None:
    """Return which of `ways` is the fastest, measured now or before.

    Args:
        question: what the ways answer.
        ways: what can compute it, by name; calling one computes it and changes nothing else.

    Returns:
        A name of `ways`; None where nothing is known and nothing can be measured now.
    """
    if question in _answers and (_answers[question] is None or _answers[question] in ways):
        return _answers[question]
    times = _read(question)
    if times is None or not times.keys() & ways.keys():
        if not _current().takes or not _can_measure():
            # Not remembered: the next call may be one that can.
            return None
        times = _take(ways)
        if times:
            _write(question, times)
    known = {name: seconds for name, seconds in times.items() if name in ways}
    answer = min(known, key=lambda name: known[name]) if known else None
    _answers[question] = answer
    return answer


def _can_measure() -> bool:
    """Return whether launches run now, rather than becoming part of a graph."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _take(ways: Ways) -> dict[str, float]:
    """Time every way that can be launched, as long as there is time."""
    end, times = time.monotonic() + MOST_SECONDS, {}
    for name, way in ways.items():
        if time.monotonic() > end:
            break
        try:
            times[name] = seconds_of(way)
        except Exception as error:
            if not _is_too_large(error):
                raise
    return times


def _is_too_large(error: Exception) -> bool:
    """Return whether a way asks for more than this GPU has, which makes it no answer."""
    # Whoever launched a kernel has imported it.
    tritons = sys.modules.get("triton.errors")
    launching = tritons is not None and isinstance(error, tritons.TritonError)
    return launching or isinstance(error, torch.OutOfMemoryError)


def seconds_of(way: Callable[[], object]) -> float:
    """Return the seconds that a call takes on the current GPU, one after the other."""
    # Compiles, and fills caches.
    way()
    once = _timed(way, 1)
    calls = max(1, min(_MOST_CALLS, math.ceil(_SAMPLE_SECONDS / max(once, 1e-9))))
    return sorted(_timed(way, calls) for _ in range(_SAMPLES))[_SAMPLES // 2]


def _timed(way: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        way()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def cache_folder() -> Path:
    """Return where measured times are kept."""
    if own := os.environ.get(FOLDER):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    # By the XDG specification, a relative path is to be ignored.
    if shared and Path(shared).is_absolute():
        return Path(shared) / "pbfx"
    return Path.home() / ".cache" / "pbfx"


def _path(question: Question) -> Path:
    name = hashlib.sha256(json.dumps(asdict(question)).encode()).hexdigest()[:32]
    device = re.sub(r"[^A-Za-z0-9]+", "-", question.device)
    return cache_folder() / "measured" / f"{device}-{_versions()}" / f"{name}.json"


@functools.cache
def _versions() -> str:
    """Return what a time depends on beside the question: torch, Triton and these kernels."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f"torch{torch.__version__}-triton{triton}-{digest.hexdigest()[:12]}"


def _read(question: Question) -> dict[str, float] | None:
    """Return the times of a question by way, or None if there are none that can be trusted."""
    try:
        path = _path(question)
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        return _times(text, question)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RuntimeError) as error:
        _warn_once("read", f"measured times are ignored: {error}")
        return None


def _times(text: bytes, question: Question) -> dict[str, float]:
    """Parse a file.

    Raises:
        ValueError: if it is none of ours, or damaged.
    """
    name = _path(question)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"{name} is too large")
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged ({error})") from None
    ours = isinstance(found, dict) and found.get("format") == _FORMAT
    if not ours or found.get("question") != json.loads(json.dumps(asdict(question))):
        raise ValueError(f"{name} answers another question")
    times = found.get("microseconds")
    if not isinstance(times, dict) or not all(map(_is_time, times.values())):
        raise ValueError(f"{name} holds no times")
    return {name: value * 1e-6 for name, value in times.items()}


def _is_time(value: Any) -> bool:
    # Not a bool, which is an int.
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _write(question: Question, times: Mapping[str, float]) -> None:
    """Record times: a reader finds the old file or the new one, whole, whoever else writes."""
    record = {
        "format": _FORMAT,
        "question": asdict(question),
        "microseconds": {name: round(seconds * 1e6, 3) or 1e-3 for name, seconds in times.items()},
    }
    try:
        path = _path(question)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            json.dump(record, file, indent=1)
        try:
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
    except (OSError, RuntimeError) as error:
        # `Path.home` raises the latter where there is none.
        _warn_once("write", f"measured times are not kept: {error}")


_warned: set[str] = set()


def _warn_once(about: str, message: str) -> None:
    if about not in _warned:
        _warned.add(about)
        warnings.warn(f"pbfx: {message}", RuntimeWarning, stacklevel=2)
