"""The cases of `make sanitize`, which runs where there is a GPU, are tests that exist."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_case_exists() -> None:
    cases = "tests/gpu/sanitized.txt"
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run([*collect, f"@{cases}"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    wanted = (ROOT / cases).read_text().split("\n")
    assert [line for line in found.stdout.split("\n") if "::" in line] == [w for w in wanted if w]
