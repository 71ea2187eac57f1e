"""Say where a model can grow dendrites, where it cannot, and what each site costs."""

from __future__ import annotations

import dataclasses
import math
import textwrap

from torch import nn

from pbfx.kept import kept_modules
from pbfx.parts import parts_of
from pbfx.paths import join

# A terminal's width by custom.
COLUMNS = 80


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One site: what it is, what it has grown, and what one more dendrite would cost.

    `parameters` are those that the site computes with, its soma included: of the links between
    dendrites the strict lower triangle, as no other entry is ever read.
    """

    name: str
    op: str
    calls: int
    dendrites: int
    parameters: int
    next_dendrite: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every site and every skipped op of a model; `str()` is a table of at most 80 columns."""

    sites: tuple[SiteReport, ...]
    skipped: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        head = ("site", "op", "calls", "dendrites", "parameters", "one more")
        rows = [
            (
                s.name,
                s.op,
                str(s.calls),
                str(s.dendrites),
                f"{s.parameters:,}",
                f"+{s.next_dendrite:,}",
            )
            for s in self.sites
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        # Names give way, from the left, so that the numbers stay aligned and the line fits.
        widths[0] = min(widths[0], COLUMNS - sum(widths[1:]) - 2 * len(widths[1:]))
        lines = []
        for name, op, *numbers in [head, *rows]:
            short = name if len(name) <= widths[0] else f"…{name[1 - widths[0] :]}"
            cells = [f"{short:<{widths[0]}}", f"{op:<{widths[1]}}"]
            cells += [f"{n:>{width}}" for n, width in zip(numbers, widths[2:], strict=True)]
            lines.append("  ".join(cells))
        for name, op, reason in self.skipped:
            why = f"no dendrites at {name} ({op}): {reason}"
            lines += textwrap.wrap(why, COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Return the sites and the skipped ops of a transformed model.

    Raises:
        RestructureError: if the model has no perforated parts.
    """
    sites, skipped = [], []
    model = getattr(model, "_orig_mod", model)
    for path, part in parts_of(model).items():
        grown = part.grown()
        for site in part.perforation.sites:
            dendrites = grown.get(site.name)
            count = 0 if dendrites is None else dendrites.count
            neurons = site.neurons
            soma = math.prod(site.shape) + (neurons if site.bias else 0)
            own = math.prod(site.shape) + (neurons if site.biased else 0)
            # Each new dendrite also has a link to the soma and one from every older dendrite.
            links = count * neurons + count * (count - 1) // 2 * neurons
            sites.append(
                SiteReport(
                    name=join(path, site.name),
                    op=site.op,
                    calls=site.calls,
                    dendrites=count,
                    parameters=soma + own * count + links,
                    next_dendrite=own + neurons * (count + 1),
                )
            )
        skipped += [(join(path, s.name), s.op, s.reason) for s in part.perforation.skipped]
    for path, kept in kept_modules(model).items():
        skipped += [(join(path, s.name), s.op, s.reason) for s in kept.skipped]
    return Explanation(tuple(sites), tuple(skipped))
