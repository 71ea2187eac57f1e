"""Importing pbfx costs little more than importing torch, and imports nothing optional."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Slow to import, absent from some installs, or side effects on import.
HEAVY = (
    "matplotlib",
    "pandas",
    "rich",
    "scipy",
    "sklearn",
    "torch._dynamo",
    "torchvision",
    "tqdm",
    "triton",
)

# Prints the modules that the import adds to those that `import torch` brings by itself.
PROBE = """
import sys, warnings, torch
before = set(sys.modules)
warnings.simplefilter("error")
import {package}
print(*sorted(set(sys.modules) - before), sep="\\n")
"""


@pytest.mark.parametrize("package", ["pbfx", "pbfx_kernels"])
def test_import_is_lean(package: str, tmp_path: Path):
    probe = subprocess.run(
        [sys.executable, "-c", PROBE.format(package=package)],
        # Away from the checkout, so that the installed package is what gets imported.
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert probe.returncode == 0, f"`import {package}` failed:\n{probe.stderr}"
    added = probe.stdout.split()
    assert package in added
    heavy = [name for name in added if any(f"{name}.".startswith(f"{root}.") for root in HEAVY)]
    assert not heavy, (
        f"`import {package}` also imports {', '.join(heavy)}: import where it is used, inside the "
        f"function (python -X importtime -c 'import {package}' shows who asks for it)"
    )
