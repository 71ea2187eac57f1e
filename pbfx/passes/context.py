"""What a pass is told, and the node surgery that passes share."""

from __future__ import annotations

import dataclasses
import itertools
import operator

from torch import fx

from pbfx.dendrites import Dendrites
from pbfx.paths import join
from pbfx.phase import Phase
from pbfx.sites import Site


@dataclasses.dataclass(frozen=True)
class PassContext:
    """The sites that may carry dendrites, and what the graph is for.

    Attributes:
        sites: of the graph.
        phase: that the graph is for.
        lowering: whether it is for inference, in eval mode for good.
        fold_norms: whether lowering may fold norms into weights.
        portable: whether lowering may ask for nothing that another device would not have.
        notes: what lowering left apart and why, by the name of the site; passes write it.
    """

    sites: tuple[Site, ...]
    phase: Phase
    lowering: bool = False
    fold_norms: bool = True
    portable: bool = False
    notes: dict[str, str] = dataclasses.field(default_factory=dict)

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


def free_path(gm: fx.GraphModule, dendrites: str, word: str) -> str:
    """Return a path for a module beside the dendrites of a site, `word` in the place of theirs.

    Args:
        gm: where it must be free.
        dendrites: path of the site's dendrites, `fc.dendrites` or `w_dendrites`.
        word: such as "neurons".
    """
    owner, _, name = dendrites.rpartition(".")
    base = join(owner, name.removesuffix("dendrites") + word)
    taken = {path for path, _ in gm.named_modules(remove_duplicate=False)}
    others = (f"{base}_{number}" for number in itertools.count(1))
    return next(path for path in itertools.chain((base,), others) if path not in taken)
