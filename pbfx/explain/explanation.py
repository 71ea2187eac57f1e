"""All that is known of where a model can grow, as data, text, JSON and a picture."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from pbfx.explain.flow import Flow
from pbfx.explain.flow_picture import draw_flows
from pbfx.explain.picture import save
from pbfx.explain.records import (
    KeptReport,
    LoweredReport,
    PartReport,
    SiteReport,
    SkippedReport,
)
from pbfx.explain.table import (
    kept_lines,
    lowered_lines,
    part_lines,
    parts_table,
    sites_table,
    skipped_lines,
    wrap,
)
from pbfx.explain.tree_picture import draw_tree
from pbfx.wording import counted

# Up to here a person can follow lines between boxes; beyond, the tree of modules tells more.
MOST_PARTS = 6
MOST_STEPS = 400


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Where a model can grow dendrites, what that costs, and what was left out and why.

    It is a snapshot: what the model grows later does not change it. `str()` is a table of at most
    80 columns.

    Attributes:
        class_name: of the model.
        parts: its graphs, the model itself first.
        kept: the modules that run their own forward.
        sites: where dendrites can grow.
        skipped: the other ops with parameters.
        growable_parameters: of the linear and conv ops that can grow, dendrites not counted.
        linear_conv_parameters: of all linear and conv ops; each parameter counts once. Layers that
            nothing calls are among them, and so are attention's projections and recurrent cells;
            recurrent layers of several steps are not.
        flows: the data flow of each part, for the picture.
        modules: the paths of all modules in their order, for the picture.
        lowered: what `pbfx.lower` makes of each part, or None where that was not asked for.
    """

    class_name: str
    parts: tuple[PartReport, ...]
    kept: tuple[KeptReport, ...]
    sites: tuple[SiteReport, ...]
    skipped: tuple[SkippedReport, ...]
    growable_parameters: int
    linear_conv_parameters: int
    flows: tuple[Flow, ...] = dataclasses.field(repr=False)
    modules: tuple[str, ...] = dataclasses.field(repr=False, compare=False)
    lowered: tuple[LoweredReport, ...] | None = dataclasses.field(default=None, compare=False)

    @property
    def coverage(self) -> float | None:
        """Percent of the parameters of linear and conv ops that can grow; None without such ops."""
        every = self.linear_conv_parameters
        return 100 * self.growable_parameters / every if every else None

    def __str__(self) -> str:
        sections = [self._headline()]
        if len(self.parts) > 1 or any(part.path for part in self.parts):
            sections.append(parts_table(self.parts, self._sites_by_part()))
        sections.append(kept_lines(self.kept) + part_lines(self.parts, self.kept))
        sections.append(sites_table(self.sites) if self.sites else [])
        sections.append(skipped_lines(self.skipped))
        sections.append(lowered_lines(self.lowered or ()))
        return "\n\n".join("\n".join(lines) for lines in sections if lines)

    def to_json(self) -> dict[str, Any]:
        """Return all but `flows` and `modules` as JSON values, and `coverage` in percent or null.

        `docs/explain.md` lists the fields.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["flows"], fields["modules"]
        records = {
            name: [_plain(record) for record in value] if isinstance(value, tuple) else value
            for name, value in fields.items()
        }
        return records | {"coverage": self.coverage}

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write a picture: the data flow of each part, or the tree of modules where that is large.

        Args:
            path: where to; `.png` or `.svg`. Its folder must exist.

        Raises:
            ConfigError: if the suffix is another, or the file cannot be written.
            DependencyError: if matplotlib is not installed.
        """
        few = len(self.flows) <= MOST_PARTS
        few = few and sum(len(flow.steps) for flow in self.flows) <= MOST_STEPS
        if self.flows and few:
            save(path, lambda: draw_flows(self.class_name, self.flows))
        else:
            reports = self.parts, self.kept, self.sites, self.skipped
            save(path, lambda: draw_tree(self.class_name, self.modules, *reports))

    def _headline(self) -> list[str]:
        number = len(self.sites)
        sites = f"{number} site{'s' * (number != 1)}"
        if [part.path for part in self.parts] == [""]:
            how = f", captured as a whole ({self.parts[0].rung})"
            how = ", captured whole" if self.parts[0].rung == "whole" else how
        else:
            how = f" in {counted(len(self.parts), 'part')}" if self.parts else ""
        every, grows = self.linear_conv_parameters, self.growable_parameters
        covers = "no linear or conv op has parameters"
        if self.coverage is not None:
            share = f"{grows:,} of {every:,} parameters of linear and conv ops"
            covers = f"{share} can grow ({self.coverage:.1f} %)"
        return [*wrap(f"{self.class_name}: {sites}{how}"), *wrap(covers)]

    def _sites_by_part(self) -> dict[str, int]:
        """Return how many sites each part has: a site belongs to the innermost part around it."""
        counts = dict.fromkeys((part.path for part in self.parts), 0)
        for site in self.sites:
            names = site.name.split(".") if site.name else []
            above = (".".join(names[:end]) for end in range(len(names), -1, -1))
            counts[next(path for path in above if path in counts)] += 1
        return counts


def _plain(record: Any) -> dict[str, Any]:
    """Return a record as JSON values."""
    named = isinstance(record, SkippedReport)
    return _values(record._asdict() if named else dataclasses.asdict(record))


def _values(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _values(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_values(item) for item in value]
    # A rung is a string of a class of its own.
    return str(value) if isinstance(value, str) else value
