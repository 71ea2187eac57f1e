"""What a linear or conv layer, traced by itself, computes before its op.

A transposed convolution finds out what to add to its output so that it has the size asked for; a
layer with a computed weight (weight norm, spectral norm, any parametrization) computes the weight.
Neither is for a graph to take apart: both stay one node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


class _Layer:
    """Stands for a transposed convolution; a class of our own, because Dynamo can trace that."""

    def __init__(self, padding: Any) -> None:
        self.output_padding = padding


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a traced module holds as an attribute: the name of the node that is to read it."""

    target: str


def output_padding(default: Any, *arguments: Any) -> list[int]:
    """Return what a transposed convolution adds to its output so that it has the size asked for.

    Args:
        default: its own output padding, which holds where no size is asked for.
        arguments: of `nn.ConvTranspose2d._output_padding`, which computes the rest.
    """
    layer: Any = _Layer(default)
    return nn.ConvTranspose2d._output_padding(layer, *arguments)


@contextmanager
def output_padding_recorded(clone: nn.Module, tracer: fx.Tracer) -> Iterator[None]:
    """Keep whole what a transposed convolution, traced by itself, computes from shapes."""
    if not isinstance(clone, _TRANSPOSED):
        yield
        return

    def record(*arguments: Any) -> Any:
        given = clone.output_padding, *arguments
        return tracer.create_proxy("call_function", output_padding, given, {})

    clone.__dict__["_output_padding"] = record
    try:
        yield
    finally:
        del clone.__dict__["_output_padding"]


@contextmanager
def weight_recorded(clone: nn.Module) -> Iterator[None]:
    """Let a layer, traced by itself, read its computed weight and bias as if they were stored.

    At run time the read is `self.weight`: the property of a parametrization, or what a hook has
    just put there.
    """
    names = [
        name
        for name in ("weight", "bias")
        if isinstance(clone, _LAYERS)
        and name not in clone._parameters
        and (name in clone.__dict__ or parametrize.is_parametrized(clone, name))
    ]
    own, stored = type(clone), {n: clone.__dict__.pop(n) for n in names if n in clone.__dict__}
    if names and parametrize.is_parametrized(clone):
        # The class that parametrizing put in front has the properties; the layer's own is behind.
        object.__setattr__(clone, "__class__", own.__mro__[1])
    # nn.Module.__getattr__ is what the tracer intercepts; it looks in the buffers.
    clone._buffers.update({name: Recorded(name) for name in names})  # pyright: ignore[reportArgumentType, reportCallIssue]
    try:
        yield
    finally:
        for name in names:
            del clone._buffers[name]
        object.__setattr__(clone, "__class__", own)
        clone.__dict__.update(stored)
