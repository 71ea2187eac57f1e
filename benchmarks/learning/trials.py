"""Trials: what might make a dendrite better, tried on runs before it is an option of pbfx.

trial.groups=4              a candidate reads a quarter of what its neuron reads
trial.rank=8                the candidates of a site read 8 weighted sums of its inputs
trial.line_search=links     new dendrites start with the links of least training loss; with =soma
                            the soma's weights are scaled so, with =both both
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.errors import UsageError
from benchmarks.learning.connections import Connections, Grouped, LowRank
from pbfx.errors import nearest

PREFIX = "trial."
_SEARCHES = ("links", "soma", "both")
# What would train or choose dendrites' weights without asking what they may be connected to.
_UNAWARE = ("tuning", "finish", "sites")


@dataclasses.dataclass(frozen=True)
class Trial:
    """What an arm tries.

    Attributes:
        groups: blocks that the inputs of a neuron are split into, 1 for none.
        rank: of a site's weights, 0 for any.
        line_search: what is searched after a growth, "" for nothing.

    Raises:
        UsageError: if a setting is out of range.
    """

    groups: int = 1
    rank: int = 0
    line_search: str = ""

    def __post_init__(self) -> None:
        for name, least in (("groups", 1), ("rank", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UsageError(
                    f"{PREFIX}{name} must be a whole number of at least {least}, got {value!r}"
                )
        if self.line_search and self.line_search not in _SEARCHES:
            raise UsageError(
                f"{PREFIX}line_search={self.line_search}: "
                f"{nearest(str(self.line_search), _SEARCHES)}"
            )
        if self.groups > 1 and self.rank:
            raise UsageError(f"{PREFIX}groups and {PREFIX}rank exclude each other")

    @property
    def links(self) -> bool:
        """Whether the links of new dendrites are searched."""
        return self.line_search in ("links", "both")

    @property
    def soma(self) -> bool:
        """Whether the scale of the soma's weights is searched."""
        return self.line_search in ("soma", "both")

    def connections(self) -> Connections:
        """Return what the candidates of a run may be connected to."""
        if self.rank:
            return LowRank(self.rank)
        return Grouped(self.groups) if self.groups > 1 else Connections()


NAMES = tuple(PREFIX + field.name for field in dataclasses.fields(Trial))


def trial_of(mode: str | None, settings: Mapping[str, Any]) -> Trial:
    """Return what an arm tries.

    Args:
        mode: of pbfx's learning, None for a plain net.
        settings: of the arm, those of trials under their full names.

    Raises:
        UsageError: if it cannot be tried in this mode, or with the other settings.
    """
    trial = Trial(**{n.removeprefix(PREFIX): v for n, v in settings.items() if n in NAMES})
    if (trial.groups > 1 or trial.rank) and mode != "perforated":
        raise UsageError(
            f"{PREFIX}groups and {PREFIX}rank are about candidates of perforated, not of {mode}"
        )
    if trial.line_search and mode not in ("perforated", "sham"):
        raise UsageError(f"{PREFIX}line_search follows a dendrite phase, and {mode} has none")
    others = [name for name in _UNAWARE if name in settings]
    if (trial.groups > 1 or trial.rank) and others:
        raise UsageError(
            f"{PREFIX}groups and {PREFIX}rank restrict candidates only; leave out "
            f"{', '.join(others)}"
        )
    return trial
