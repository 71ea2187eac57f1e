"""What the Multi-Process Service hands to the processes of a study; its daemon is played."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.errors import UsageError
from benchmarks.learning.mps import from_zero, multi_process_service

NAMES = ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a daemon on the path that writes down how it is called and what it sees."""
    log = tmp_path / "log"
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text(
        f"""#!/bin/sh
words=$*
[ "$words" ] || read words
echo "$words: gpus=$CUDA_VISIBLE_DEVICES folder=$CUDA_MPS_PIPE_DIRECTORY" >> {log}
[ "$words" != "$FAILS" ] || {{ echo "no luck" >&2; exit 1; }}
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return log


def client() -> list[str]:
    """Return what a process that is started now finds in its environment."""
    told = f"import os; print(*(os.environ.get(n) for n in {NAMES!r}), sep='|')"
    run = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    return run.stdout.strip().split("|")


@pytest.mark.parametrize(
    ("visible", "seen"),
    [("3", "0"), ("2,3", "0,1"), ("1,0,3,2", "0,1,2,3"), ("GPU-8f2e,MIG-77", "0,1")],
)
def test_clients_count_the_daemons_gpus_from_zero(
    visible: str, seen: str, daemon: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with multi_process_service():
        gpus, pipe, log = client()
        assert (gpus, log) == (seen, pipe)
        assert Path(pipe).is_dir()
    begun, ended = daemon.read_text().splitlines()
    # The daemon itself has to see what it is to hold.
    assert begun == f"-d: gpus={visible} folder={pipe}"
    assert ended.startswith("quit: ")
    assert ended.endswith(f"folder={pipe}")
    assert client() == [visible, "None", "None"]
    assert not Path(pipe).exists()


def test_all_gpus_stay_all(daemon: Path) -> None:
    with multi_process_service():
        assert client()[0] == "None"
    assert daemon.read_text().startswith("-d: gpus= ")


def test_the_environment_comes_back_after_a_fault(
    daemon: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ZeroDivisionError), multi_process_service():
        raise ZeroDivisionError
    assert client() == ["3", "None", "None"]
    assert daemon.read_text().splitlines()[-1].startswith("quit: ")
    monkeypatch.setenv("FAILS", "-d")
    with pytest.raises(UsageError, match="no luck"), multi_process_service():
        raise AssertionError("it has not started")
    assert client() == ["3", "None", "None"]


def test_devices_end_at_the_first_that_is_none() -> None:
    assert from_zero("0, 2,-1,3") == "0,1"
    for nothing in ("", "-1", " "):
        with pytest.raises(UsageError, match="shows no GPU"):
            from_zero(nothing)


def test_without_a_daemon_the_option_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UsageError, match="--mps"), multi_process_service():
        raise AssertionError("it has not started")
