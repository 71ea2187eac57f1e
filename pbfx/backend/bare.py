"""Let compiled graphs call pbfx's ops bare: without what autograd needs, for it has had its turn.

    a = pbfx::perforated_linear(x, ...)   ->  a = pbfx::perforated_linear.bare(x, ...)
    out, z = pbfx::candidates(y, x, ...)  ->  z = pbfx::candidate_preactivations.bare(y, x, ...), y

Inductor runs this last, on graphs that are forward or backward already and hold nothing of
autograd's. Safe because both overloads have one kernel and one fake, and because the output that
candidates hand on is a copy of `y`, made only so that it lies on the path of the error. It fires on
ops of `pbfx_kernels` only, and nowhere the second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.fx
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from pbfx_kernels.caches import sources
from pbfx_kernels.registering import bare


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
        for node in graph.find_nodes(op="call_function", target=torch.ops.pbfx.candidates.default):
            _hand_on(node)
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
        own = get_hash_for_files((__file__, *sources()))
        if self._before is None:
            return own
        theirs = self._before.uuid() if isinstance(self._before, CustomGraphPass) else None
        return None if theirs is None else (own, theirs)


def _hand_on(node: torch.fx.Node) -> None:
    """Let what candidates pass on be the neuron's output itself, where nobody can tell."""
    graph, neuron = node.graph, node.args[0]
    assert isinstance(neuron, torch.fx.Node)
    if not _is_own(neuron):
        return
    parts = {part.args[1]: part for part in node.users}
    if (z := parts.get(1)) is not None:
        with graph.inserting_before(node):
            op = torch.ops.pbfx.candidate_preactivations.default
            alone = graph.call_function(op, _computing(node.args))
        alone.meta.update(z.meta)
        if "eager_input_vals" in node.meta:
            args, kwargs = node.meta["eager_input_vals"]
            alone.meta["eager_input_vals"] = _computing(args), kwargs
        z.replace_all_uses_with(alone)
    if (out := parts.get(0)) is not None:
        out.replace_all_uses_with(neuron)
    for part in (*parts.values(), node):
        graph.erase_node(part)


def _computing(args: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments of `pbfx::candidates` that z is computed from.

    Those are all but moments, direction, error mean, regression and activation.
    """
    return (*args[:6], *args[11:])


def _is_own(node: torch.fx.Node) -> bool:
    """Return whether a graph made the memory of what `node` gives, has it dense, and keeps it.

    A graph must not return its input, nor one memory twice where its caller expects two.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or torch.empty_like(value).stride() != value.stride():
        return False
    base = node
    while _is_view(base):
        base = base.all_input_nodes[0]
    aliases = [base]
    for alias in aliases:
        aliases += filter(_is_view, alias.users)
    returned = any(user.op == "output" for alias in aliases for user in alias.users)
    return base.op == "call_function" and not returned


def _is_view(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(out.alias_info is not None for out in schema.returns)
