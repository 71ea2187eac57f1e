"""What stays on disk: report.json, history.csv and plot.png, each whole or not there at all."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import pbfx
from pbfx.demo.errors import DemoError
from pbfx.demo.statistics import CONFIDENCE, Estimate
from pbfx.demo.study import EpochRow, Run
from pbfx.demo.summary import Summary
from pbfx.files import atomic_path
from pbfx.machine import device_name, git_revision


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written to before time is spent on training; create nothing.

    Raises:
        DemoError: `folder` is a file, or may not be written to.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise DemoError(f"--out {folder}: {existing} is a file, and a folder is needed.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DemoError(f"--out {folder}: no right to write in {existing}.")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whose folder is made: a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def report_json(
    runs: Sequence[Run],
    summary: Summary,
    *,
    command: Sequence[str],
    arguments: Mapping[str, Any],
    data: Mapping[str, Any],
    device: torch.device,
) -> bytes:
    """Return the report: enough to read the result, and to run it again."""
    report = {
        "command": shlex.join(command),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "device": device_name(device),
        "arguments": dict(arguments),
        "data": dict(data),
        "confidence": CONFIDENCE,
        "summary": _summary(summary),
        "runs": [_run(run) for run in runs],
    }
    return (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()


def history_csv(runs: Sequence[Run]) -> bytes:
    """Return every epoch of every run, one row each."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [field.name for field in fields(EpochRow)], lineterminator="\n")
    writer.writeheader()
    for run in runs:
        writer.writerows(asdict(row) for row in run.history)
    return buffer.getvalue().encode()


def versions() -> dict[str, str | None]:
    """Return the versions that a result depends on; git's where pbfx runs from its repository."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pbfx": pbfx.__version__,
        "git": git_revision(Path(pbfx.__file__)),
    }


def _summary(summary: Summary) -> dict[str, Any]:
    return {
        "arms": [
            {
                "arm": arm.arm,
                "accuracy_percent": arm.accuracy,
                "error_percent": _estimate(arm.error),
                "parameters": arm.parameters,
                "epochs": arm.epochs,
                "seconds": arm.seconds,
            }
            for arm in summary.arms
        ],
        "paired_differences": [
            {
                "treated": versus.treated,
                "control": versus.control,
                "error_points": _estimate(versus.comparison.difference),
                "relative_change_of_error": _finite(versus.comparison.relative),
                "verdict": versus.comparison.verdict,
            }
            for versus in summary.comparisons
        ],
        "sentences": list(summary.sentences),
    }


def _run(run: Run) -> dict[str, Any]:
    row = {field.name: getattr(run, field.name) for field in fields(run) if field.name != "history"}
    return row | {
        "test_error_percent": run.error,
        "candidate_scores": list(run.candidate_scores),
    }


def _estimate(value: Estimate) -> dict[str, float | int | None]:
    return {
        "mean": value.mean,
        "low": _finite(value.low),
        "high": _finite(value.high),
        "count": value.count,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
