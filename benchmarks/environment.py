"""Where and on what a number was measured: the first columns of every CSV row."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.errors import UsageError
from pbfx import machine

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
        "device": machine.device_name(device),
        "dtype": dtype,
        "seed": seed,
    }


def git_revision(root: Path = ROOT) -> str:
    """Return the commit, with `-dirty` where the tree differs from it; "unknown" outside git."""
    return machine.git_revision(root / "pyproject.toml") or "unknown"


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
