"""Tables from rows: means over seeds, and paired differences with their 95 % intervals.

A table holds the runs of one study and one protocol (how long the phases are, how they are
optimized). A line is an arm at a width with so many dendrites; what it is compared with has the
same protocol, width and seeds.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from benchmarks.learning.arms import arm_named, sham_of
from benchmarks.learning.rows import Row
from benchmarks.learning.run import Stage
from benchmarks.learning.studies import STUDIES
from pbfx.demo.statistics import Comparison, Estimate, compare, estimate

_PROTOCOL = (
    *("optimizer", "rate", "gamma", "batch_size", "steps", "score"),
    *("neuron_epochs", "dendrite_epochs", "dendrites"),
)


@dataclass(frozen=True)
class Line:
    """An arm at a width with a number of dendrites, over its seeds.

    Attributes:
        arm: its name.
        width: of the study's net.
        dendrites: the limit at which its runs would have ended.
        stages: by seed.
        gpu_seconds: by seed, of the whole run that the stage belongs to.
        metric: the figure that the study is about.
    """

    arm: str
    width: float
    dendrites: int
    stages: dict[int, Stage]
    gpu_seconds: dict[int, float]
    metric: str

    @cached_property
    def scores(self) -> dict[int, float]:
        """Test figures by seed, the lower the better."""
        return {seed: getattr(stage, self.metric) for seed, stage in self.stages.items()}

    @property
    def score(self) -> Estimate:
        """Mean test figure."""
        return estimate(list(self.scores.values()))

    @property
    def parameters(self) -> float:
        """Mean number of parameters: a run may have kept fewer dendrites than its limit."""
        return _mean(stage.parameters for stage in self.stages.values())

    def against(self, other: Line) -> Comparison | None:
        """Return the paired difference to `other`, None where no seed is common."""
        seeds = sorted(self.scores.keys() & other.scores.keys())
        if not seeds:
            return None
        return compare([self.scores[s] for s in seeds], [other.scores[s] for s in seeds])


@dataclass(frozen=True)
class Table:
    """The lines of one study and protocol."""

    study: str
    protocol: dict[str, object]
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """Say how long the phases are."""
        told = self.protocol
        return (
            f"{told['neuron_epochs']} epochs a neuron phase, {told['dendrite_epochs']} a dendrite "
            f"phase, {told['dendrites']} dendrites at most"
        )

    def find(self, arm: str, width: float, dendrites: int) -> Line | None:
        """Return the line with these, if there is one."""
        for line in self.lines:
            if (line.arm, line.width, line.dendrites) == (arm, width, dendrites):
                return line
        return None


def tables_of(rows: Sequence[Row]) -> list[Table]:
    """Return a table for each protocol of each study, in the order of the rows."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[json.dumps([row.study, protocol_of(row)])].append(row)
    found = []
    for members in groups.values():
        study = members[0].study
        metric = "test_loss" if STUDIES[study].score == "loss" else "test_error"
        found.append(Table(study, protocol_of(members[0]), tuple(_lines(members, metric))))
    return found


def rows_of(name: str, rows: Sequence[Row]) -> list[Row]:
    """Return the rows of a study, and those of others that are the very runs that it asks for.

    A run that two studies have in common is done once, see `command`.
    """
    study = STUDIES[name]
    own = [row for row in rows if row.study == name]
    told = [protocol_of(row) for row in own]
    seen = {(row.arm, row.width, row.seed, row.settings) for row in own}
    shared = [
        row
        for row in rows
        if STUDIES[row.study].net is study.net
        and row.arm in study.arms
        and row.width in study.widths
        and (row.arm, row.width, row.seed, row.settings) not in seen
        and (not own or protocol_of(row) in told)
    ]
    return [*own, *(replace(row, study=name) for row in shared)]


def protocol_of(row: Row) -> dict[str, object]:
    """Return what rows must have in common to be compared."""
    told = json.loads(row.cells["description"])
    return {name: told.get(name) for name in _PROTOCOL}


def _lines(rows: Sequence[Row], metric: str) -> Iterable[Line]:
    cells: dict[tuple[float, str, int], dict[int, tuple[Stage, float]]] = defaultdict(dict)
    order: dict[str, int] = {}
    for row in rows:
        order.setdefault(row.arm, len(order))
        for stage in row.stages:
            cells[row.width, row.arm, stage.dendrites][row.seed] = stage, row.gpu_seconds
    listed = [*STUDIES[rows[0].study].arms, *order]
    for width, arm, dendrites in sorted(cells, key=lambda c: (-c[0], listed.index(c[1]), c[2])):
        found = dict(sorted(cells[width, arm, dendrites].items()))
        yield Line(
            arm,
            width,
            dendrites,
            {seed: stage for seed, (stage, _) in found.items()},
            {seed: seconds for seed, (_, seconds) in found.items()},
            metric,
        )


def markdown(table: Table) -> str:
    """Return the table of a study: a block of lines for each width."""
    loss = STUDIES[table.study].score == "loss"
    head = ("arm", "D", "parameters", "test loss, nats" if loss else "test error, %")
    head += ("against first phase", "against plain", "against sham", "against wider")
    head += ("GPU-s", "seeds")
    written = [f"_{table.title}._", ""]
    for width in dict.fromkeys(line.width for line in table.lines):
        written += [f"**width {width:g}**", "", _row(head), _row(["---"] * len(head))]
        for line in table.lines:
            # Without a dendrite, all modes are one net after its first phase; one line says it.
            first = line.dendrites == 0 and line.arm != "perforated" and _grows(table, line)
            if line.width == width and not first:
                written.append(_row(_cells(table, line)))
        written.append("")
    return "\n".join(written).rstrip()


def ablations_markdown(table: Table) -> str:
    """Return how each arm ends, against the arm without settings and against its own sham."""
    head = ("arm", "parameters", "test error, %", "against perforated", "against its sham")
    head += ("GPU-s", "seeds")
    written = [f"_{table.title}._", ""]
    for width in dict.fromkeys(line.width for line in table.lines):
        written += [f"**width {width:g}**", "", _row(head), _row(["---"] * len(head))]
        last = {line.arm: line for line in table.lines if line.width == width}
        for line in last.values():
            rivals = last.get("perforated"), last.get(_sham(table, line))
            told = ["" if r is None or r is line else difference(line.against(r)) for r in rivals]
            name, parameters, error = line.arm, f"{line.parameters:,.0f}", with_interval(line.score)
            seconds = f"{_mean(line.gpu_seconds.values()):.1f}"
            cells = (name, parameters, error, *told, seconds, str(len(line.stages)))
            written.append(_row(cells))
        written.append("")
    return "\n".join(written).rstrip()


def _sham(table: Table, line: Line) -> str:
    """Return the name of the sham of an arm, whether or not there is one."""
    return sham_of(arm_named(line.arm, STUDIES[table.study].selections))


def _grows(table: Table, line: Line) -> bool:
    return any(
        other.arm == line.arm and other.width == line.width and other.dendrites
        for other in table.lines
    )


def _cells(table: Table, line: Line) -> list[str]:
    grows = _grows(table, line)
    rivals = {
        # What the net was before it grew, at a fraction of the epochs: what was published.
        "first": (line.arm, 0),
        "plain": ("plain", 0),
        # One serves all arms: whatever sites it has, their dendrites change nothing.
        "sham": (_sham(table, line), line.dendrites),
        "wider": (f"wider{line.dendrites}", 0),
    }
    told = []
    for name, (arm, dendrites) in rivals.items():
        rival = table.find(arm, line.width, dendrites)
        itself = rival is line or (name != "plain" and not (grows and line.dendrites))
        told.append("" if rival is None or itself else difference(line.against(rival)))
    name = f"{line.arm}, first phase" if grows and not line.dendrites else line.arm
    seconds = _mean(line.gpu_seconds.values())
    return [
        name,
        str(line.dendrites) if grows else "",
        f"{line.parameters:,.0f}",
        with_interval(line.score),
        *told,
        f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}",
        str(len(line.stages)),
    ]


def front_markdown(table: Table, width: float = 1.0) -> str:
    """Return nets by size against the plain net of `width`; those on the Pareto front are bold.

    On the front are nets that no net with fewer or as many parameters beats.
    """
    whole = table.find("plain", width, 0)
    lines = contenders(table)
    if whole is None or not lines:
        return f"_The plain net of width {width:g} has not run._"
    best = {id(line) for line in front(lines)}
    head = ("net", "width", "D", "parameters", f"against width {width:g}", "test error, %")
    head += (f"difference to plain, width {width:g}", "seeds")
    written = [f"_{table.title}._", "", _row(head), _row(["---"] * len(head))]
    for line in sorted(lines, key=lambda line: line.parameters):
        name = f"**{line.arm}**" if id(line) in best else line.arm
        cells = (
            name,
            f"{line.width:g}",
            str(line.dendrites),
            f"{line.parameters:,.0f}",
            f"{100 * (line.parameters / whole.parameters - 1):+.1f} %",
            with_interval(line.score),
            "" if line is whole else difference(line.against(whole)),
            str(len(line.stages)),
        )
        written.append(_row(cells))
    equal = [line for line in lines if line.score.mean <= whole.score.mean]
    smallest = min(equal, key=lambda line: line.parameters)
    share = 100 * (1 - smallest.parameters / whole.parameters)
    written += [
        "",
        f"Smallest net with at most the mean error of plain at width {width:g}: {smallest.arm} at "
        f"width {smallest.width:g} with {smallest.dendrites} dendrites, {share:.1f} % smaller.",
    ]
    return "\n".join(written)


def contenders(table: Table) -> list[Line]:
    """Return the lines that stand for a net of their own: a run's first phase is left out."""
    return [line for line in table.lines if line.dendrites or not _grows(table, line)]


def front(lines: Sequence[Line]) -> list[Line]:
    """Return the lines that none with as few parameters beats, from the smallest up."""
    found: list[Line] = []
    for line in sorted(lines, key=lambda line: (line.parameters, line.score.mean)):
        if not found or line.score.mean < found[-1].score.mean:
            found.append(line)
    return found


def difference(found: Comparison | None) -> str:
    """Return a paired difference, its interval, and its share; bold where zero is outside."""
    if found is None:
        return ""
    value, relative = found.difference, found.relative
    share = "" if math.isnan(relative) else f" ({100 * relative:+.0f} %)"
    digits = _digits(value.mean)
    if math.isnan(value.low):
        return f"{value.mean:+.{digits}f}{share}"
    told = f"{value.mean:+.{digits}f} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]{share}"
    return told if found.verdict == "undecided" else f"**{told}**"


def with_interval(value: Estimate) -> str:
    """Return a mean with its half width."""
    if math.isnan(value.half_width):
        return f"{value.mean:.3f}"
    return f"{value.mean:.3f} ± {value.half_width:.3f}"


def _digits(value: float) -> int:
    return 3 if abs(value) < 1 else 2


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


REPORTS: dict[str, Callable[[Table], str]] = {
    **dict.fromkeys(STUDIES, markdown),
    "compression": front_markdown,
    "ablations": ablations_markdown,
}
"""How each study is reported."""
