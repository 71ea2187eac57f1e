"""The kernels without a GPU: `interpreted.py` in a process whose Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).with_name("interpreted.py")


def test_kernels_under_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    # Without the cache, which a run beside this one may be writing.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS)]
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=TESTS.parents[2], timeout=600
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
