"""NVIDIA's Multi-Process Service, for as long as a study needs it.

Without it processes take turns on a GPU; with it their kernels run side by side.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.errors import UsageError

_CONTROL = "nvidia-cuda-mps-control"
_SECONDS = 20


@contextmanager
def multi_process_service() -> Iterator[None]:
    """Run a daemon of our own, to which processes started in the body connect.

    Raises:
        UsageError: if it cannot be started.
    """
    if shutil.which(_CONTROL) is None:
        raise UsageError(f"--mps: there is no {_CONTROL} on this machine; leave the option out")
    names = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
    outside = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="pbfx-mps-") as folder:
        os.environ.update(dict.fromkeys(names, folder))
        try:
            _call([_CONTROL, "-d"], None)
            try:
                yield
            finally:
                _call([_CONTROL], "quit\n")
        finally:
            for name, value in outside.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _call(command: list[str], words: str | None) -> None:
    try:
        subprocess.run(
            command, input=words, text=True, check=True, capture_output=True, timeout=_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        raise UsageError(f"--mps: {' '.join(command)} failed: {said}") from error
