"""Finished runs, a row each in a CSV file: appended whole, and found again after an interruption.

A row is one write at the end of the file, flushed to the disk before the next run is reported. If
the machine stops within that write, the file ends in part of a line; it is cut off when the file is
opened again, and that run is done again.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.errors import UsageError
from benchmarks.learning.run import Outcome, Stage
from benchmarks.learning.task import Key, Task

RESULTS = ROOT / "benchmarks" / "results" / "learning"
KEY = ("study", "arm", "width", "seed", "settings")
_FIGURES = (
    *("dendrites", "parameters", "test_error", "test_loss", "validation_error"),
    *("validation_loss", "best_epoch", "epochs"),
)
_WHERE = ("utc", "revision", "torch", "triton", "device")
COLUMNS = (
    *KEY,
    *_FIGURES,
    *("seconds", "gpu_seconds"),
    *_WHERE,
    *("description", "stages", "curve"),
)


@dataclass(frozen=True)
class Row:
    """A finished run, as read back.

    Attributes:
        study, arm, width, seed, settings: its key.
        stages: see `Stage`; the last one is the run's end.
        gpu_seconds: of one GPU, shared evenly among the runs beside it.
        cells: the row as it stands in the file.
    """

    study: str
    arm: str
    width: float
    seed: int
    settings: str
    stages: tuple[Stage, ...]
    gpu_seconds: float
    cells: dict[str, str]


def encode(
    task: Task, outcome: Outcome, beside: int, where: Mapping[str, object]
) -> dict[str, str]:
    """Return the cells of a row.

    Args:
        task: what was done.
        outcome: how it ended.
        beside: how many runs shared the device, this one included.
        where: from `benchmarks.environment.environment`.
    """
    last = asdict(outcome.stages[-1])
    cells = dict(zip(KEY, task.key, strict=True))
    cells |= {name: _number(last[name]) for name in _FIGURES}
    cells |= {
        "seconds": _number(outcome.seconds),
        "gpu_seconds": _number(outcome.seconds / beside),
    }
    cells |= {name: str(where[name]) for name in _WHERE}
    return cells | {
        "description": _json(task.describe()),
        "stages": _json([_rounded(asdict(stage)) for stage in outcome.stages]),
        "curve": " ".join(f"{error:.4g}" for error in outcome.curve),
    }


def gpu_seconds(cells: Mapping[str, str], beside: float) -> dict[str, str]:
    """Return the cell of a row that says what the run took of a device with so many runs."""
    return {"gpu_seconds": _number(float(cells["seconds"]) / beside)}


def append(path: Path, cells: Mapping[str, str]) -> None:
    """Append a row in one write, and wait until it is on the disk.

    Raises:
        ValueError: if the cells are not those of `COLUMNS`.
    """
    if tuple(cells) != COLUMNS:
        raise ValueError(f"cells and columns differ in {sorted(set(cells) ^ set(COLUMNS))}")
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if not os.fstat(handle).st_size:
            writer.writeheader()
        writer.writerow(cells)
        line = text.getvalue().encode()
        written = os.write(handle, line)
        if written != len(line):
            raise OSError(f"{path}: only {written} of {len(line)} bytes could be written")
        os.fsync(handle)
    finally:
        os.close(handle)


def mend(path: Path) -> int:
    """Cut off what an interrupted write has left of a row; return the number of bytes cut.

    Raises:
        UsageError: if `path` is not a file of these rows.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    header = ",".join(COLUMNS).encode()
    if not (whole.startswith(header + b"\n") if whole else header.startswith(content)):
        raise UsageError(
            f"{path} has other columns than the learning studies write; name another folder with "
            "--out"
        )
    if len(whole) != len(content):
        with path.open("rb+") as file:
            file.truncate(len(whole))
            os.fsync(file.fileno())
    return len(content) - len(whole)


def read(path: Path) -> list[Row]:
    """Return the whole rows of `path`, each key once, in order; none if there is no file.

    Raises:
        UsageError: if a row is not one of a learning study.
    """
    if not path.exists():
        return []
    content = path.read_text(encoding="utf-8")
    lines = io.StringIO(content[: content.rfind("\n") + 1])
    rows: dict[Key, Row] = {}
    for number, cells in enumerate(csv.DictReader(lines), 2):
        try:
            row = _decode(cells)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path}, line {number}: not a row of a learning study: {error!r}"
            ) from error
        rows.setdefault(key_of(cells), row)
    return list(rows.values())


def key_of(cells: Mapping[str, str]) -> Key:
    """Return the key of a row's cells."""
    study, arm, width, seed, settings = (cells[name] for name in KEY)
    return study, arm, width, seed, settings


def _decode(cells: dict[str, str]) -> Row:
    return Row(
        cells["study"],
        cells["arm"],
        float(cells["width"]),
        int(cells["seed"]),
        cells["settings"],
        tuple(Stage(**stage) for stage in json.loads(cells["stages"])),
        float(cells["gpu_seconds"]),
        cells,
    )


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
