"""Register an op twice: for everyone, and bare, for who has done with autograd.

    pbfx::perforated_linear         what programs and graphs call
    pbfx::perforated_linear.bare    the same kernel and the same fake, without a gradient

What Python does around a custom op, the autograd of a graph that runs without and the checks for
aliases above all, costs three times what the dispatcher does. A compiled graph is past both: its
compiler has seen the op, with its gradient, and calls the bare overload.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library, custom_op, infer_schema, register_fake

from pbfx_kernels.caches import tag_caches

_LIBRARY = Library("pbfx", "FRAGMENT")
_BARE = "bare"


class Op:
    """An op of this package and its bare overload.

    Args:
        name: without the namespace.
        kernel: computes it; mutates nothing, and returns nothing that it was given.
    """

    def __init__(self, name: str, kernel: Callable[..., Any]) -> None:
        self._bare = f"{name}.{_BARE}"
        self._op = custom_op(f"pbfx::{name}", mutates_args=())(kernel)
        schema = infer_schema(kernel, mutates_args=())
        _LIBRARY.define(f"{self._bare}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self._bare, kernel, "CompositeExplicitAutograd")

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Tell what comes out for tensors without data."""

        @functools.wraps(fake)
        def tagging(*args: Any, **kwargs: Any) -> Any:
            tag_caches()
            return fake(*args, **kwargs)

        self._op.register_fake(tagging)
        register_fake(f"pbfx::{self._bare}", tagging, lib=_LIBRARY)
        return fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]
    ) -> None:
        """Tell the gradient of what everyone calls."""
        self._op.register_autograd(backward, setup_context=setup_context)


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Make an op of the function below; see `Op`."""
    return lambda kernel: Op(name, kernel)


def bare(overload: Any) -> Any:
    """Return the bare overload of `torch.ops.pbfx.<name>.default`; None for every other target."""
    if getattr(overload, "namespace", None) != "pbfx" or overload._overloadname != "default":
        return None
    packet = getattr(torch.ops.pbfx, overload._opname)
    return packet.bare if _BARE in packet.overloads() else None
