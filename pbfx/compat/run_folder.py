"""The folder of a run: what people read, as CSV after every score, and one picture when asked.

File names and columns are those that `perforatedai` writes, so that notebooks which read them go
on working; unlike there, one line is one epoch, and epochs that were rolled back stay.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pbfx import Epoch, Phase, TrackerError

Row = Sequence[Any]


class RunFolder:
    """Write the tables of a run.

    Args:
        folder: made if it is missing.
        maximize: whether a larger score is better.

    Raises:
        TrackerError: if the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], maximize: bool) -> None:
        self.path, self.maximize = Path(folder), maximize
        # What the script told beside the score, one dict an epoch, and what it told last.
        self.extras: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self.pending: dict[str, float] = {}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrackerError(f"the run folder {folder} cannot be made: {error}") from error

    def file(self, ending: str) -> Path:
        """Return the path of the table or picture with that ending, as `PB/PBScores.csv`."""
        return self.path / f"{self.path.name}{ending}"

    def close_epoch(self, seconds: float) -> None:
        """Take what was told since the last score as the new epoch's."""
        self.extras.append(self.pending)
        self.seconds.append(seconds)
        self.pending = {}

    def write(self, history: Sequence[Epoch], lookback: int) -> None:
        """Write every table, each whole or not at all.

        Args:
            history: of the tracker.
            lookback: how many scores the running score averages.
        """
        extras = self._names()
        tables: dict[str, tuple[Row, Iterable[Row]]] = {
            "Scores.csv": (
                ("Epochs", "Validation Scores", "Validation Running Scores", *extras),
                (
                    (number, epoch.score, running, *self._extras_at(number))
                    for number, (epoch, running) in enumerate(
                        zip(history, running_scores(history, lookback), strict=True)
                    )
                ),
            ),
            "Times.csv": (
                ("Epochs", "Normal Epoch Times", "PAI Epoch Times"),
                (
                    (number, *((seconds, "") if epoch.phase is Phase.NEURON else ("", seconds)))
                    for number, (epoch, seconds) in enumerate(
                        zip(history, self.seconds, strict=False)
                    )
                ),
            ),
            "learning_rate.csv": (
                ("Epochs", "learning_rate"),
                ((number, *epoch.learning_rates[:1]) for number, epoch in enumerate(history)),
            ),
            "_best_arch_scores.csv": (
                ("Param Counts", "Max Valid Scores", *extras),
                (
                    (history[best].parameters, history[best].score, *self._extras_at(best))
                    for best in best_epochs(history, self.maximize)
                ),
            ),
            "param_counts.csv": (
                ("Switch Number", "Param Count"),
                enumerate(epoch.parameters for epoch in first_epochs(history)),
            ),
            "switch_epochs.csv": (
                ("Switch Number", "Switch Epoch"),
                enumerate(epoch.number - 2 for epoch in first_epochs(history)[1:]),
            ),
        }
        for ending, (header, rows) in tables.items():
            text = io.StringIO(newline="")
            csv.writer(text).writerows([header, *rows])
            replace(self.file(ending), text.getvalue().encode())
        record = {"extras": self.extras, "seconds": self.seconds}
        replace(self.file("_record.json"), json.dumps(record).encode())

    def read(self, epochs: int) -> None:
        """Take up what an earlier process wrote about the first epochs, if it is there."""
        try:
            record = json.loads(self.file("_record.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            record = {"extras": [], "seconds": []}
        missing = epochs - len(record["extras"])
        self.extras = (record["extras"] + [{}] * missing)[:epochs]
        self.seconds = (record["seconds"] + [float("nan")] * missing)[:epochs]

    def draw(self, history: Sequence[Epoch], lookback: int, title: str) -> Path:
        """Draw the run as a PNG and return its path.

        Raises:
            DependencyError: if matplotlib is not installed.
        """
        from pbfx.compat.picture import run_png

        curves = {name: [extra.get(name) for extra in self.extras] for name in self._names()}
        path = self.file(".png")
        replace(path, run_png(history, running_scores(history, lookback), curves, title))
        return path

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for extra in self.extras for name in extra))

    def _extras_at(self, index: int) -> list[Any]:
        known = self.extras[index] if index < len(self.extras) else {}
        return [known.get(name, "") for name in self._names()]


def running_scores(history: Sequence[Epoch], lookback: int) -> list[float]:
    """Return the mean of the last scores of the same phase at every epoch."""
    running = []
    for end, epoch in enumerate(history, 1):
        window = [e.score for e in history[max(0, end - lookback) : end] if e.cycle == epoch.cycle]
        running.append(sum(window) / len(window))
    return running


def first_epochs(history: Sequence[Epoch]) -> list[Epoch]:
    """Return the first epoch of every phase."""
    return [
        epoch
        for index, epoch in enumerate(history)
        if index == 0 or epoch.cycle != history[index - 1].cycle
    ]


def best_epochs(history: Sequence[Epoch], maximize: bool) -> list[int]:
    """Return the index of the best epoch of every architecture, by rising number of parameters."""
    best: dict[int, int] = {}
    for index, epoch in enumerate(history):
        if epoch.phase is Phase.DENDRITE:
            continue
        held = best.get(epoch.parameters)
        if held is None or (
            epoch.score > history[held].score if maximize else epoch.score < history[held].score
        ):
            best[epoch.parameters] = index
    return [best[parameters] for parameters in sorted(best)]


def replace(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all.

    Not flushed to the disk: after a crash of the machine the tables are written anew from the
    tracker's own files, and waiting for the disk six times a score is what takes long.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
