"""What a pass is told, and the node surgery that passes share."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from typing import Any

from torch import fx

from pbfx.dendrites import Dendrites
from pbfx.paths import join, module_at
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
        found = {}
        for site in self.sites:
            owner, _, name = site.dendrites.rpartition(".")
            module = module_at(gm, owner)._modules.get(name)
            if isinstance(module, Dendrites):
                found[site.dendrites] = site, module
        return found


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


def call_module(graph: fx.Graph, path: str, args: tuple[Any, ...]) -> fx.Node:
    """Return a new call of the module at `path`, as `graph.call_module` does.

    That one, and `graph.get_attr`, look for the module in a slow way first; lint looks anyway.
    """
    return graph.create_node("call_module", path, args)


def get_attr(graph: fx.Graph, path: str) -> fx.Node:
    """Return a new read of the attribute at `path`, as `graph.get_attr` does; see `call_module`."""
    return graph.create_node("get_attr", path)


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
