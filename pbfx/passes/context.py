"""What a pass is told, and the node surgery that passes share."""

from __future__ import annotations

import dataclasses
import operator

from torch import fx

from pbfx.dendrites import Dendrites
from pbfx.phase import Phase
from pbfx.sites import Site


@dataclasses.dataclass(frozen=True)
class PassContext:
    """The sites that may carry dendrites, and the phase that the graph is for."""

    sites: tuple[Site, ...]
    phase: Phase

    def grown(self, gm: fx.GraphModule) -> dict[str, tuple[Site, Dendrites]]:
        """Return the sites that own a dendrites module now, by its path."""
        modules = dict(gm.named_modules())
        return {
            site.dendrites: (site, module)
            for site in self.sites
            if isinstance(module := modules.get(site.dendrites), Dendrites)
        }


def copy_provenance(source: fx.Node, *nodes: fx.Node) -> None:
    """Let `nodes` point to the user's line that `source` came from; shapes may differ."""
    for node in nodes:
        node.meta.update(
            {
                key: source.meta[key]
                for key in ("stack_trace", "nn_module_stack")
                if key in source.meta
            }
        )


def part(node: fx.Node, index: int) -> fx.Node | None:
    """Return the node that takes output `index` of `node`, if there is one."""
    for user in node.users:
        if user.target is operator.getitem and user.args == (node, index):
            return user
    return None
