"""What a tracker takes in and gives out: scores, steps, epochs, and the file that people read."""

from __future__ import annotations

import csv
import dataclasses
import math
import numbers
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pbfx.errors import ScoreError
from pbfx.figures import SiteFigures
from pbfx.files import atomic_path
from pbfx.phase import Phase
from pbfx.policy import Action


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One call of `Tracker.step`.

    Attributes:
        number: counts from 1.
        phase: who was learning.
        dendrites: dendrites per neuron while this epoch ran.
        cycle: counts restructurings; epochs of one phase share it.
        attempt: how many sets of dendrites in a row had been dropped.
        score: the validation score that was given.
        improved: whether it was the best so far.
        action: what the policy decided.
        reason: why, in one sentence.
        candidate_score: of a dendrite phase: mean |correlation| of the best candidates with the
            error on batches that they did not learn from; None elsewhere.
        parameters: of the network, candidates not counted.
        learning_rates: of each parameter group, as used in this epoch.
        seconds: wall time since the call before, or since the tracker was made or loaded. Times
            differ from run to run, so epochs that differ in nothing else are equal.
        rate_factor: of a search for a learning rate: what the rates were multiplied by; None in
            other epochs.
        sites: of a dendrite phase: what was measured at each site, see `SiteFigures`.
    """

    number: int
    phase: Phase
    dendrites: int
    cycle: int
    attempt: int
    score: float
    improved: bool
    action: Action
    reason: str
    candidate_score: float | None
    parameters: int
    learning_rates: tuple[float, ...]
    seconds: float | None = dataclasses.field(default=None, compare=False)
    rate_factor: float | None = None
    sites: tuple[SiteFigures, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "phase": str(self.phase),
            "action": str(self.action),
            "learning_rates": list(self.learning_rates),
            "sites": [site.to_json() for site in self.sites],
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Epoch:
        """Return the epoch that `to_json` described."""
        typed = {
            "phase": Phase(fields["phase"]),
            "action": Action(fields["action"]),
            "learning_rates": tuple(fields["learning_rates"]),
            "sites": tuple(SiteFigures(**site) for site in fields.get("sites", ())),
        }
        return cls(**(fields | typed))


@dataclasses.dataclass(frozen=True)
class Step:
    """What one call of `Tracker.step` did.

    Attributes:
        restructured: whether the model changed its structure. Where it did not, every parameter is
            the object that it was; a search for a learning rate may have set values back.
        complete: whether training is over; the best network has then been restored.
        phase: who learns from now on.
        dendrites: dendrites per neuron of the most grown site.
        improved: whether this score is the best so far.
        reason: one sentence for people.
    """

    restructured: bool
    complete: bool
    phase: Phase
    dendrites: int
    improved: bool
    reason: str


def finite_score(score: Any) -> float:
    """Return `score` as a float.

    Raises:
        ScoreError: if it is not one finite number.
    """
    value: Any = score
    if isinstance(score, torch.Tensor) or type(score).__module__ == "numpy":
        if torch.Size(score.shape).numel() != 1:
            raise ScoreError(
                f"the validation score must be one number, got a {type(score).__name__} of shape "
                f"{tuple(score.shape)}; reduce it first, for example with .mean()"
            )
        value = score.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ScoreError(
            f"the validation score must be a number, got {score!r} ({type(score).__name__})"
        )
    value = float(value)
    if not math.isfinite(value):
        raise ScoreError(
            f"the validation score must be finite, got {value}; the tracker has not moved. A "
            "diverged run can be resumed from its last checkpoint with a smaller learning rate"
        )
    return value


def write_history(history: Sequence[Epoch], directory: Path) -> None:
    """Write `history.csv`, and `sites.csv` once there is a line for it."""
    write_csv(history, directory / "history.csv")
    if any(epoch.sites for epoch in history):
        write_sites_csv(history, directory / "sites.csv")


def write_csv(history: Sequence[Epoch], path: str | os.PathLike[str]) -> None:
    """Write one line per epoch, atomically; rates are separated by spaces, sites left out."""
    names = [field.name for field in dataclasses.fields(Epoch) if field.name != "sites"]
    rows = []
    for epoch in history:
        row = epoch.to_json()
        del row["sites"]
        row["learning_rates"] = " ".join(f"{rate:.6g}" for rate in epoch.learning_rates)
        rows.append(row)
    _write(names, rows, path)


def write_sites_csv(history: Sequence[Epoch], path: str | os.PathLike[str]) -> None:
    """Write one line per site and epoch of a dendrite phase, atomically.

    The columns are `number` (of the epoch), `cycle`, `dendrites`, `action`, and the fields of
    `SiteFigures`. The lines whose action is `promote` are those that a growth rests on.
    """
    own = [field.name for field in dataclasses.fields(SiteFigures)]
    shared = ["number", "cycle", "dendrites", "action"]
    rows = [
        {name: str(getattr(epoch, name)) for name in shared} | site.to_json()
        for epoch in history
        for site in epoch.sites
    ]
    _write([*shared, *own], rows, path)


def _write(
    names: Sequence[str], rows: Sequence[dict[str, Any]], path: str | os.PathLike[str]
) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
