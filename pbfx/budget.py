"""What a run may cost at most: parameters, FLOPs and epochs, and whether a growth still fits."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from pbfx.errors import TrackerError
from pbfx.parts import Survey, growth_parameters, parts_of
from pbfx.phase import Phase
from pbfx.policy import Action, Decision, Situation
from pbfx.structure import Counts, Structure
from pbfx.wording import counted


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

    def affordable(
        self, decision: Decision, model: nn.Module, found: Survey, spent: int, growth_epochs: int
    ) -> Decision:
        """Return `decision`, to grow, or to complete with the reason why that does not fit.

        Args:
            decision: to add one dendrite at every site.
            model: as it would grow.
            found: what a walk over it has found.
            spent: how many epochs are over.
            growth_epochs: the fewest that a growth takes until it can be judged.
        """
        why = self._refusal(model, found, spent, growth_epochs)
        if why is None:
            return decision
        return Decision(Action.COMPLETE, f"{decision.reason}; declined: {why}", decision.keep)

    def _refusal(
        self, model: nn.Module, found: Survey, spent: int, growth_epochs: int
    ) -> str | None:
        if self.max_parameters is not None:
            needed = found.parameters + growth_parameters(found.parts)
            if needed > self.max_parameters:
                limit = f"max_parameters={self.max_parameters:,}"
                return f"it would have {needed:,} parameters, {limit}"
        if self.max_epochs is not None and spent + growth_epochs > self.max_epochs:
            left = self.max_epochs - spent
            return (
                f"a growth takes at least {counted(growth_epochs, 'epoch')}, and "
                f"{counted(left, 'is', 'are')} left of "
                f"max_epochs={self.max_epochs}"
            )
        if self.max_flops is not None:
            needed = grown_flops(model, self.example_inputs)
            if needed > self.max_flops:
                return f"it would take {needed:,} FLOPs, max_flops={self.max_flops:,}"
        return None

    def in_time(self, decision: Decision, situation: Situation, spent: int) -> Decision:
        """Return `decision`, or to complete if so many epochs are all that there are."""
        late = self.max_epochs is not None and spent >= self.max_epochs
        if not late or decision.action is Action.COMPLETE:
            return decision
        keep = situation.phase is Phase.DENDRITE or situation.helped
        reason = f"{decision.reason}; max_epochs={self.max_epochs} is reached"
        return Decision(Action.COMPLETE, reason, keep)


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
