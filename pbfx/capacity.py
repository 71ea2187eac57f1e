"""Prove a set-up before the real run: grow three times, measure, predict, and take it all back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pbfx.optimizers import Schedule
from pbfx.parts import growth_parameters, survey
from pbfx.phase import Phase
from pbfx.policy import Action, Decision, EveryTime, Situation
from pbfx.waypoint import Waypoint
from pbfx.wording import counted

GROWTHS = 3


@dataclasses.dataclass(frozen=True)
class Measured:
    """One epoch of the test.

    Attributes:
        phase: who was learning.
        dendrites: D.
        seconds: of the epoch, the user's validation included.
        parameters: of the network.
        held: bytes of parameters, gradients, buffers and optimizer state at its end, and of the
            networks that the tracker keeps.
        peak: most bytes that torch had allocated on the GPU in this epoch; None on a CPU.
    """

    phase: Phase
    dendrites: int
    seconds: float
    parameters: int
    held: int
    peak: int | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self) | {"phase": str(self.phase)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Measured:
        """Return what `to_json` described."""
        phase: Any = Phase(fields["phase"])
        return cls(**(fields | {"phase": phase}))


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What a capacity test has found.

    Attributes:
        epochs: what was measured, in order.
        dendrites: for how many the rest is predicted: `max_dendrites`.
        parameters: the network would have; exact.
        neuron_seconds: an epoch of a neuron phase would take.
        dendrite_seconds: one of a dendrite phase; None where the mode of learning has none.
        memory: bytes that torch would have allocated at most on the GPU, or, on a CPU, that
            parameters, gradients, buffers, optimizer and kept networks would hold.
        device: of the model's first parameter.
        available: bytes that the GPU has; None on a CPU.
    """

    epochs: tuple[Measured, ...]
    dendrites: int
    parameters: int
    neuron_seconds: float
    dendrite_seconds: float | None
    memory: int
    device: str
    available: int | None

    @property
    def fits(self) -> bool | None:
        """Whether the GPU has the memory; None where that is not known."""
        return None if self.available is None else self.memory <= self.available

    def __str__(self) -> str:
        grown = self.epochs[-1].dendrites - self.epochs[0].dendrites
        took = sum(epoch.seconds for epoch in self.epochs)
        phases = ""
        if self.dendrite_seconds is not None:
            phases = f" and one of a dendrite phase {_seconds(self.dendrite_seconds)}"
        verdict = ""
        if self.fits is False:
            assert self.available is not None
            verdict = f", MORE than its {_bytes(self.available)}"
        return (
            f"capacity test passed: {counted(grown, 'dendrite')} grew in {len(self.epochs)} epochs "
            f"({_seconds(took)}), and all was taken back. Predicted for "
            f"{counted(self.dendrites, 'dendrite')}: "
            f"{self.parameters:,} parameters, an epoch of a neuron phase takes "
            f"{_seconds(self.neuron_seconds)}{phases}, {_bytes(self.memory)} on "
            f"{self.device}{verdict}. For the real run make the tracker with test_capacity=False"
        )


class CapacityTest:
    """A test that is under way.

    Args:
        start: what to go back to.
        dendrites: D at the start.
        parameters: that the network would have in the end; predicted before anything grows.
    """

    def __init__(self, start: Waypoint, dendrites: int, parameters: int) -> None:
        self.start, self.dendrites, self.parameters = start, dendrites, parameters
        self.epochs: list[Measured] = []

    @classmethod
    def begin(
        cls, model: nn.Module, optimizer: Optimizer, schedule: Schedule, max_dendrites: int
    ) -> CapacityTest:
        """Return a test that begins with `model` as it is, for so many dendrites in the end."""
        found = survey(model)
        more = max(0, max_dendrites - found.dendrites)
        parameters = found.parameters + growth_parameters(found.parts, more)
        return cls(Waypoint.take(model, optimizer, schedule), found.dendrites, parameters)

    def decide(self, situation: Situation) -> Decision:
        """Restructure at every step, until three sets have grown."""
        decision = EveryTime().decide(
            dataclasses.replace(situation, max_dendrites=self.dendrites + GROWTHS)
        )
        neuron = sum(epoch.phase is Phase.NEURON for epoch in self.epochs)
        if situation.phase is Phase.NEURON and neuron > GROWTHS:
            # Also where nothing grew, as where the user's settings leave no site to grow.
            decision = dataclasses.replace(decision, action=Action.COMPLETE)
        return dataclasses.replace(decision, reason=f"capacity test: {decision.reason}")

    def note(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        kept: Iterable[Tensor],
        epoch: tuple[Phase, int, float, int],
    ) -> None:
        """Measure at the end of an epoch.

        Args:
            model: the model.
            optimizer: its optimizer.
            kept: tensors of the networks that the tracker keeps.
            epoch: phase, dendrites, seconds and parameters.
        """
        device = next(model.parameters()).device
        peak = None
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        held = _held(model, optimizer, [*kept, *self.start.network.tensors.values()])
        self.epochs.append(Measured(*epoch, held, peak))

    def result(self, model: nn.Module, dendrites: int) -> Capacity:
        """Return what was found, and what it means for so many dendrites.

        Args:
            model: for its device.
            dendrites: for how many to predict.
        """
        device = next(model.parameters()).device
        available = None
        if device.type == "cuda":
            available = torch.cuda.get_device_properties(device).total_memory
        neuron, learning = (
            [epoch for epoch in self.epochs if epoch.phase is phase]
            for phase in (Phase.NEURON, Phase.DENDRITE)
        )
        last = max(0, dendrites - 1)
        memory = max(
            _predicted([(e.dendrites, float(e.peak or e.held)) for e in rows], at_most)
            for rows, at_most in ((neuron, dendrites), (learning, last))
            if rows
        )
        return Capacity(
            epochs=tuple(self.epochs),
            dendrites=dendrites,
            parameters=self.parameters,
            neuron_seconds=_predicted([(e.dendrites, e.seconds) for e in neuron], dendrites),
            dendrite_seconds=_predicted([(e.dendrites, e.seconds) for e in learning], last)
            if learning
            else None,
            memory=round(memory),
            device=str(device),
            available=available,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the test as plain data and tensors."""
        return {
            "start": self.start.state_dict(),
            "dendrites": self.dendrites,
            "parameters": self.parameters,
            "epochs": [epoch.to_json() for epoch in self.epochs],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> CapacityTest:
        """Return the test that `state_dict` described."""
        start = Waypoint.from_state_dict(state["start"])
        test = cls(start, state["dendrites"], state["parameters"])
        test.epochs = [Measured.from_json(fields) for fields in state["epochs"]]
        return test


def _predicted(points: Sequence[tuple[int, float]], dendrites: int) -> float:
    """Return what the line of least squares through the last three points says.

    The first epoch of all warms up (it compiles, and fills caches), and four points are enough to
    leave it out. A line that falls is noise: the largest value then stands.
    """
    points = points[-GROWTHS:]
    mean_d = sum(d for d, _ in points) / len(points)
    mean = sum(value for _, value in points) / len(points)
    spread = sum((d - mean_d) ** 2 for d, _ in points)
    slope = sum((d - mean_d) * (v - mean) for d, v in points) / spread if spread else 0.0
    if slope <= 0:
        return max(value for _, value in points)
    return mean + slope * (dendrites - mean_d)


def _held(model: nn.Module, optimizer: Optimizer, kept: Iterable[Tensor]) -> int:
    """Return the bytes of all storages that training holds between batches."""
    parameters = list(model.parameters())
    # In the neuron phase every parameter that learns has a gradient, dropped by now or not.
    gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    states = [v for state in optimizer.state.values() for v in state.values()]
    tensors = [*parameters, *model.buffers(), *kept, *(v for v in states if isinstance(v, Tensor))]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return gradients + sum(storages.values())


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"
