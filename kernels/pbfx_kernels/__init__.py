"""Artificial dendrites as PyTorch ops: the kernel library of pbfx, usable on its own."""

from pbfx_kernels import reference
from pbfx_kernels.activations import ACTIVATIONS
from pbfx_kernels.errors import ArgumentError
from pbfx_kernels.full import full_dendrites
from pbfx_kernels.functional import candidates, dendrites, perforated_conv2d, perforated_linear
from pbfx_kernels.geometry import LINEAR, Geometry
from pbfx_kernels.moments import Moment

__all__ = [
    "ACTIVATIONS",
    "LINEAR",
    "ArgumentError",
    "Geometry",
    "Moment",
    "candidates",
    "dendrites",
    "full_dendrites",
    "perforated_conv2d",
    "perforated_linear",
    "reference",
]
