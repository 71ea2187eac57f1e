"""What a run may cost at most: parameters, FLOPs and epochs, and whether a growth still fits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pbfx.errors import TrackerError
from pbfx.parts import growth_parameters, parts_of
from pbfx.perforated import PerforatedModule
from pbfx.structure import Counts, Structure


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of a run; None sets no limit.

    Args:
        max_parameters: of the network, candidates not counted.
        max_flops: of one forward pass of `example_inputs` in eval, a multiply-add being two; GEMMs
            and convolutions count, as in `torch.utils.flop_counter`.
        max_epochs: calls of `Tracker.step`.
        example_inputs: positional arguments of the model, a tuple or a single tensor.

    Raises:
        TrackerError: naming every limit that is no positive whole number, and `max_flops` without
            `example_inputs`.
    """

    max_parameters: int | None = None
    max_flops: int | None = None
    max_epochs: int | None = None
    example_inputs: Any = None

    def __post_init__(self) -> None:
        faults = []
        for name in ("max_parameters", "max_flops", "max_epochs"):
            value = getattr(self, name)
            whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            if value is not None and (isinstance(value, bool) or not whole or value < 1):
                faults.append(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.max_flops is not None and self.example_inputs is None:
            faults.append(
                "max_flops counts the FLOPs of a forward pass and needs example_inputs=(x, ...)"
            )
        if faults:
            raise TrackerError("; ".join(faults))

    def refusal(
        self,
        model: nn.Module,
        parts: Mapping[str, PerforatedModule],
        parameters: int,
        epoch: int,
        growth_epochs: int,
    ) -> str | None:
        """Return why one more dendrite at every site does not fit, or None.

        Args:
            model: as it would grow.
            parts: its perforated parts.
            parameters: of its network now.
            epoch: how many are over.
            growth_epochs: the fewest that a growth takes until it can be judged.
        """
        if self.max_parameters is not None:
            needed = parameters + growth_parameters(parts)
            if needed > self.max_parameters:
                return (
                    f"it would have {needed:,} parameters, max_parameters={self.max_parameters:,}"
                )
        if self.max_epochs is not None and epoch + growth_epochs > self.max_epochs:
            left = self.max_epochs - epoch
            return (
                f"a growth takes {growth_epochs} epochs at least, and {left} are left of "
                f"max_epochs={self.max_epochs}"
            )
        if self.max_flops is not None:
            needed = grown_flops(model, self.example_inputs)
            if needed > self.max_flops:
                return f"it would take {needed:,} FLOPs, max_flops={self.max_flops:,}"
        return None


def grown_flops(model: nn.Module, example_inputs: Any, dendrites: int = 1) -> int:
    """Return the FLOPs of a forward pass with so many more dendrites at every site.

    They are counted on a copy that shares the parameters, in eval and without gradients: neither
    the model nor torch's random streams notice.

    Raises:
        TrackerError: if the forward fails on `example_inputs`.
    """
    # They import much, and few runs ask.
    from torch.utils.flop_counter import FlopCounterMode

    import pbfx_kernels.flops  # noqa: F401  registers the formulas

    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    for part in parts_of(twin).values():
        counts = part.structure().without_candidates().sites
        part.adopt(
            Structure(
                {
                    site.name: dataclasses.replace(has, dendrites=has.dendrites + dendrites)
                    for site in part.perforation.sites
                    for has in (counts.get(site.name, Counts()),)
                }
            )
        )
    with torch.random.fork_rng(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            twin(*inputs)
        except Exception as error:
            raise TrackerError(
                f"max_flops: the model's forward fails on example_inputs: "
                f"{type(error).__name__}: {error}"
            ) from error
    return counter.get_total_flops()
