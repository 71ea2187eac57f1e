"""Run `streamed_checks.py` in a process of its own: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("streamed_checks.py")
# pytest-benchmark, where it is installed, warns of the xdist worker that started the process.
ALONE = [f"-pno:{plugin}" for plugin in ("cacheprovider", "xdist", "benchmark")]


def run(**variables: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *ALONE, str(CHECKS)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    # A file of which nothing ran would pass.
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_interpreted() -> None:
    run(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    run()
