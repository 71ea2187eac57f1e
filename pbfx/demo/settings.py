"""The numbers of one study."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How long, how wide and how often to train. Every arm trains for the same number of epochs.

    Args:
        seeds: paired runs of each arm.
        neuron_epochs: epochs of each neuron phase.
        dendrite_epochs: epochs of each dendrite phase.
        dendrites: dendrites per neuron when the run is over.
        width: factor on the net's channels.
        batch_size: images a step.
        first_seed: seed of the first pair; the others count up from it.
    """

    seeds: int
    neuron_epochs: int
    dendrite_epochs: int
    dendrites: int
    width: float
    batch_size: int
    first_seed: int = 0

    @property
    def epochs(self) -> int:
        """Epochs of one run: a neuron phase before each growth and one after the last."""
        return (self.dendrites + 1) * self.neuron_epochs + self.dendrites * self.dendrite_epochs


DEFAULTS = {
    # In all about 100 s on two CPU cores.
    "digits": Settings(
        seeds=8, neuron_epochs=20, dendrite_epochs=10, dendrites=3, width=1.0, batch_size=64
    ),
    # Meant for a GPU; MATH.md's widths 0.1 and 0.25 are where dendrites were seen to pay.
    "mnist": Settings(
        seeds=3, neuron_epochs=10, dendrite_epochs=4, dendrites=3, width=0.25, batch_size=64
    ),
}
