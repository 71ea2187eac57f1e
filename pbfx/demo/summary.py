"""What a study found: a line an arm, paired differences, and a sentence that claims no more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pbfx.demo.outcome import Outcome
from pbfx.demo.statistics import Comparison, Estimate, compare, estimate
from pbfx.wording import counted

if TYPE_CHECKING:
    from pbfx.demo.study import Run

CONTROLS = ("plain", "sham")


@dataclass(frozen=True)
class ArmSummary:
    """An arm over its seeds. `error` is the test error in percent; the rest are means."""

    arm: str
    error: Estimate
    parameters: float
    epochs: float
    seconds: float

    @property
    def accuracy(self) -> float:
        """Mean test accuracy in percent."""
        return 100 - self.error.mean


@dataclass(frozen=True)
class Versus:
    """The paired comparison of the test error of `treated` with that of `control`."""

    treated: str
    control: str
    comparison: Comparison


@dataclass(frozen=True)
class Summary:
    """Everything that the table and the report say about a study."""

    arms: tuple[ArmSummary, ...]
    comparisons: tuple[Versus, ...]
    sentences: tuple[str, ...]


def summarise(runs: Sequence[Outcome]) -> Summary:
    """Summarise runs by arm, in the order in which arms appear; compare seed by seed."""
    names = list(dict.fromkeys(run.arm for run in runs))
    by_arm = {name: {run.seed: run for run in runs if run.arm == name} for name in names}
    arms = []
    for name, paired in by_arm.items():
        members = list(paired.values())
        arms.append(
            ArmSummary(
                name,
                estimate([run.error for run in members]),
                _mean([run.parameters for run in members]),
                _mean([run.epochs for run in members]),
                _mean([run.seconds for run in members]),
            )
        )
    comparisons: list[Versus] = []
    sentences: list[str] = []
    for treated in (name for name in names if name not in CONTROLS):
        against = []
        for control in (name for name in CONTROLS if name in names):
            seeds = [seed for seed in by_arm[treated] if seed in by_arm[control]]
            if seeds:
                left = [by_arm[treated][seed].error for seed in seeds]
                right = [by_arm[control][seed].error for seed in seeds]
                against.append(Versus(treated, control, compare(left, right)))
        comparisons += against
        if against:
            sentences.append(conclude(treated, {v.control: v.comparison for v in against}))
    return Summary(tuple(arms), tuple(comparisons), tuple(sentences))


def candidate_notes(runs: Sequence[Run]) -> list[str]:
    """Say how well candidates foretold the error when they were promoted; near 0 they cannot help.

    Sham's are left out: it has the same candidates' phases, and nothing to gain from them.
    """
    notes = []
    for name in dict.fromkeys(run.arm for run in runs if run.arm not in CONTROLS):
        series = [run.candidate_scores for run in runs if run.arm == name]
        scores = [_mean(column) for column in zip(*series, strict=False) if None not in column]
        if scores:
            values = ", ".join(f"{score:.2f}" for score in scores)
            notes.append(f"{name}: candidates' held-out |correlation| with the error {values}.")
    return notes


def conclude(treated: str, comparisons: dict[str, Comparison]) -> str:
    """Say in one sentence what the intervals allow to say, gain, loss or tie."""
    count = max(comparison.difference.count for comparison in comparisons.values())
    if count == 1:
        return "One seed has no interval: nothing can be said about chance; try --seeds 5 or more."
    clauses = []
    for verdict, (phrase, joint) in _PHRASES.items():
        owners = [f"{name}'s" for name, found in comparisons.items() if found.verdict == verdict]
        if owners:
            clauses.append(f"{phrase} {joint.join(owners)}")
    verdicts = " ".join(
        comparisons[control].verdict if control in comparisons else "absent" for control in CONTROLS
    )
    return (
        f"Over {counted(count, 'paired seed')}, {treated}'s test error is {' and '.join(clauses)}"
        f"{_CONSEQUENCES.get(verdicts, '')}."
    )


_PHRASES = {
    "lower": ("lower than", " and "),
    "higher": ("higher than", " and "),
    "undecided": ("not distinguishable from", " or "),
}

# By the verdicts against plain and against sham.
_CONSEQUENCES = {
    "lower lower": ": dendrites bring more here than longer training and restarts do",
    "lower undecided": ": the restarts alone may explain the gain",
    "lower higher": ": the restarts explain the gain, and dendrites take some of it away",
    "undecided lower": ": dendrites only make up for what the restarts cost",
    "undecided undecided": ": this run shows neither gain nor loss from dendrites",
    "undecided higher": ": dendrites do harm here, though restarts make up for it",
    "higher lower": ": dendrites help, but the restarts cost more than that",
    "higher undecided": ": the restarts alone may explain the loss",
    "higher higher": ": dendrites do harm here",
}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
