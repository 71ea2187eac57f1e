"""Adadelta's kernel without a GPU: interpreted in a process of its own, and compiled ahead."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.learning import adadelta

TESTS = Path(__file__).with_name("interpreted_adadelta.py")


def test_under_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS)]
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=TESTS.parents[2], timeout=600
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles(capability: int) -> None:
    kernel = adadelta._step_kernel
    tensors = ("parameters", "gradients", "squares", "changes")
    types: dict[str, object] = dict.fromkeys(tensors, ("*fp32",) * adadelta.TOGETHER)
    types |= {"sizes": "*i64", "rate": "*fp32", "rho": "fp32", "eps": "fp32", "BLOCK": "constexpr"}
    names = kernel.arg_names
    assert set(names) == set(types)
    compiled = triton.compile(
        ASTSource(
            kernel,
            {name: types[name] for name in names},
            {(names.index("BLOCK"),): adadelta.BLOCK},
            {},
        ),
        target=GPUTarget("cuda", capability, 32),
    )
    ptx = compiled.asm["ptx"]
    # A branch for each tensor of a launch, and nothing in local memory.
    stores = [line for line in ptx.splitlines() if "st.global" in line]
    assert len(stores) % (3 * adadelta.TOGETHER) == 0 < len(stores)
    assert ".local" not in ptx
