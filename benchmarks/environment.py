"""Where and on what a number was measured: the first columns of every CSV row."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("benchmark", "utc", "revision", "torch", "triton", "device", "dtype", "seed")
# bfloat16 is autocast over float32 parameters, as users train; tf32 is float32 with TF32 GEMMs.
DTYPES = ("float32", "tf32", "bfloat16")


def environment(
    benchmark: str, device: torch.device, dtype: str, seed: int, revision: str | None = None
) -> dict[str, object]:
    """Return the values of `COLUMNS` for a run that starts now."""
    return {
        "benchmark": benchmark,
        "utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "revision": revision or git_revision(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "device": device_name(device),
        "dtype": dtype,
        "seed": seed,
    }


def git_revision(root: Path = ROOT) -> str:
    """Return the commit, with `-dirty` where the tree differs from it; "unknown" outside git."""
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    return f"{commit}-dirty" if _git(root, "status", "--porcelain") else commit


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()} ({torch.get_num_threads()} threads)"


def choose_device(name: str, dtype: str) -> torch.device:
    """Return the device.

    Raises:
        UsageError: if it is missing here or does not know the dtype.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch sees no CUDA device here; use --device cpu, or install a torch "
            "built for CUDA"
        )
    if device.type == "cpu" and dtype == "tf32":
        raise UsageError("--dtype tf32: CPUs have no TF32; valid there: 'float32', 'bfloat16'")
    return device


@contextmanager
def precision(dtype: str, device: torch.device) -> Iterator[None]:
    """Compute in `dtype` for the length of the body, whatever the process was set to."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    # Convolutions are TF32 by default: a float32 row must mean float32 there too.
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
