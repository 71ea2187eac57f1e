"""Let compiled graphs call pbfx's ops bare: without what autograd adds, for it has had its turn.

    a = pbfx::perforated_linear(x, ...)  ->  a = pbfx::perforated_linear.bare(x, ...)

Inductor runs this last, on graphs that are forward or backward already and hold nothing of
autograd's. Safe because both overloads have one kernel and one fake; it fires on ops of
`pbfx_kernels` only, and nowhere the second time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch.fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import pbfx_kernels
from pbfx_kernels.registering import bare


@functools.cache
def _sources() -> tuple[str, ...]:
    folder = Path(pbfx_kernels.__file__).parent
    return tuple(str(path) for path in sorted(folder.glob("*.py")))


class CallBare(CustomGraphPass):
    """The pass, after one that the user has asked for.

    Args:
        before: the user's, or None.
    """

    def __init__(self, before: Callable[[torch.fx.Graph], None] | None = None) -> None:
        self._before = before

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Rewrite `graph` in place."""
        if self._before is not None:
            self._before(graph)
        for node in graph.nodes:
            if node.op == "call_function" and (target := bare(node.target)) is not None:
                node.target = target

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CallBare) and other._before is self._before

    def __hash__(self) -> int:
        return hash((CallBare, self._before))

    def uuid(self) -> object | None:
        """Identify the pass for Inductor's cache; None, so no caching, if the user's does not.

        A graph that is in the cache holds what the ops' gradients came to, so their code counts.
        """
        own = get_hash_for_files((__file__, *_sources()))
        if self._before is None:
            return own
        theirs = self._before.uuid() if isinstance(self._before, CustomGraphPass) else None
        return None if theirs is None else (own, theirs)
