"""What the zoo records about a model, and how a test calls it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of the zoo.

    Attributes:
        name: what the test ids say.
        build: makes the model; draws from torch's global stream only.
        inputs: positional and named arguments of `forward`, drawn from a generator.
        possible: weights that a linear or conv op reads in a forward pass, each counted once.
        rungs: how the model is captured: the rungs of its perforated parts.
        left_out: weights of `possible` that carry no dendrites, by name (of the module, where the
            weight is computed), with words of what `explain` says of them.
        reported: further layers that `explain` must mention, with words of what it says.
        methods: what the user's class offers beside `forward`, as calls on a model.
        eval_inputs: those of evaluation, where they differ.
        silent: sites that only training calls, so that none grows while the base is held in eval.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Arguments]
    possible: int
    rungs: str = "whole"
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reported: Mapping[str, str] = dataclasses.field(default_factory=dict)
    methods: Mapping[str, Callable[[nn.Module], Any]] = dataclasses.field(default_factory=dict)
    eval_inputs: Callable[[torch.Generator], Arguments] | None = None
    silent: frozenset[str] = frozenset()

    def fresh(self, seed: int = 0) -> nn.Module:
        """Return a new model; the same seed gives the same weights."""
        torch.manual_seed(seed)
        return self.build()

    def arguments(self, training: bool, seed: int = 1) -> Arguments:
        """Return arguments for `forward` in this mode."""
        make = self.inputs if training or self.eval_inputs is None else self.eval_inputs
        return make(torch.Generator().manual_seed(seed))


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in a nest of containers, dataclasses and objects, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_of(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors_of(item)]
    if dataclasses.is_dataclass(value):
        return [t for f in dataclasses.fields(value) for t in tensors_of(getattr(value, f.name))]
    assert value is None or isinstance(value, (bool, int, float, str)), type(value)
    return []


def images(*shape: int) -> Callable[[torch.Generator], Arguments]:
    """Return a maker of one positional tensor of this shape, standard normal."""
    return lambda generator: ((torch.randn(shape, generator=generator),), {})
