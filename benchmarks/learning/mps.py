"""NVIDIA's Multi-Process Service, for as long as a study needs it.

Without it processes take turns on a GPU; with it their kernels run side by side.

The daemon holds the GPUs that `CUDA_VISIBLE_DEVICES` leaves it, and numbers them from 0. A process
that connects chooses among those: the same variable with the daemon's value would hide them all.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.errors import UsageError

_CONTROL = "nvidia-cuda-mps-control"
_SECONDS = 20
_FOLDERS = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@contextmanager
def multi_process_service() -> Iterator[None]:
    """Run a daemon of our own, to which processes started in the body connect.

    They find the GPUs that this process was shown, under the same numbers as here.

    Raises:
        UsageError: if it cannot be started, or no GPU is visible.
    """
    if shutil.which(_CONTROL) is None:
        raise UsageError(f"--mps: there is no {_CONTROL} on this machine; leave the option out")
    outside = {name: os.environ.get(name) for name in (*_FOLDERS, _VISIBLE)}
    visible = outside[_VISIBLE]
    renumbered = None if visible is None else from_zero(visible)
    with tempfile.TemporaryDirectory(prefix="pbfx-mps-") as folder:
        os.environ.update(dict.fromkeys(_FOLDERS, folder))
        try:
            _call([_CONTROL, "-d"], None)
            try:
                if renumbered is not None:
                    os.environ[_VISIBLE] = renumbered
                yield
            finally:
                _call([_CONTROL], "quit\n")
        finally:
            for name, value in outside.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def from_zero(visible: str) -> str:
    """Return what a client's `CUDA_VISIBLE_DEVICES` has to be where the daemon's is `visible`.

    Raises:
        UsageError: if `visible` shows no GPU.
    """
    # CUDA reads names up to the first that is none, such as -1.
    names = itertools.takewhile(
        lambda name: name and not name.startswith("-"), map(str.strip, visible.split(","))
    )
    count = len(list(names))
    if not count:
        raise UsageError(f"--mps: {_VISIBLE}={visible!r} shows no GPU; name some, or leave it out")
    return ",".join(map(str, range(count)))


def _call(command: list[str], words: str | None) -> None:
    try:
        subprocess.run(
            command, input=words, text=True, check=True, capture_output=True, timeout=_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        raise UsageError(f"--mps: {' '.join(command)} failed: {said}") from error
