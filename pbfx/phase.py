"""The two phases of perforated training."""

from __future__ import annotations

import enum


class Phase(enum.StrEnum):
    """Who learns now: the network, or the candidates while the network is frozen."""

    NEURON = "neuron"
    DENDRITE = "dendrite"
