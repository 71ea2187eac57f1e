"""3.x's wrappers around layers, which pbfx has none of."""

from __future__ import annotations

from pbfx.compat.accepted import PAISequential
from pbfx.compat.accepted import neuron_module as PAINeuronModule
from pbfx.compat.accepted import neuron_module as TrackedNeuronModule
from pbfx.compat.hints import refusing

__all__ = ["PAINeuronModule", "PAISequential", "TrackedNeuronModule"]

__getattr__ = refusing(__name__, __all__)
