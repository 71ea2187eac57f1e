"""What the choice of kernels for a site depends on, read off its tensors."""

import functools
import importlib.util
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pbfx_kernels.geometry import LINEAR, Geometry

# What stands for a size that is known only as the graph runs.
_UNKNOWN_SIZE = 4096


@dataclass(frozen=True, slots=True)
class Problem:
    """What a choice depends on.

    Attributes:
        device: its type, such as `cuda`.
        capability: of a CUDA device with a Triton backend, else None.
        dtype: of the soma.
        tf32: whether float32 products may round their factors to TF32.
        geometry: the form of the soma.
        positions: P.
        neurons: N.
        channels: K of a linear op, channels per group of a convolution.
        taps: of the kernel, 1 for a linear op.
        dendrites: D.
        channels_last: whether the neurons are neighbours in memory.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    tf32: bool
    geometry: Geometry
    positions: int
    neurons: int
    channels: int
    taps: int
    dendrites: int
    channels_last: bool = True

    @property
    def inputs(self) -> int:
        """K, the weights per neuron."""
        return self.channels * self.taps


def problem_of(soma: Tensor, weight: Tensor, geometry: Geometry) -> Problem:
    """Describe a site by its tensors."""
    dendrites, _, channels, *taps = weight.shape
    neurons = geometry.neurons(weight.shape[1:])
    if geometry.spatial:
        tf32 = torch.backends.cudnn.allow_tf32
    else:
        tf32 = torch.get_float32_matmul_precision() != "highest"
    return Problem(
        soma.device.type,
        _capability(soma),
        soma.dtype,
        tf32,
        geometry,
        hint_of(soma.numel()) // neurons if neurons else 0,
        neurons,
        channels,
        math.prod(taps),
        dendrites,
        hint_of(soma.stride(geometry.channel_axis)) == 1,
    )


def linear_problem(x: Tensor, weight: Tensor, dendrite_weight: Tensor) -> Problem | None:
    """Describe a linear site whose soma has not been computed; arguments as of `strategy.can_fuse`.

    Returns:
        None where the weights do not fit: not of one dtype, or no stack of a linear op's.
    """
    if weight.dtype != x.dtype or dendrite_weight.dim() != 3:
        return None
    dendrites, neurons, inputs = dendrite_weight.shape
    return Problem(
        x.device.type,
        _capability(x),
        x.dtype,
        torch.get_float32_matmul_precision() != "highest",
        LINEAR,
        hint_of(x.numel()) // inputs if inputs else 0,
        neurons,
        inputs,
        1,
        dendrites,
    )


def conv2d_problem(
    x: Tensor, weight: Tensor, dendrite_weight: Tensor, geometry: Geometry
) -> Problem | None:
    """Describe a convolution whose soma has not been computed; arguments as of `strategy.can_fuse`.

    Returns:
        None where the tensors do not fit: not of one dtype, no batch, no stack of weights.
    """
    if weight.dtype != x.dtype or x.dim() != 4 or dendrite_weight.dim() != 5:
        return None
    dendrites, neurons, channels, *taps = dendrite_weight.shape
    images, _, *sizes = geometry.output_shape(x.shape, weight.shape)
    return Problem(
        x.device.type,
        _capability(x),
        x.dtype,
        torch.backends.cudnn.allow_tf32,
        geometry,
        math.prod(hint_of(size) for size in (images, *sizes)),
        neurons,
        channels,
        math.prod(taps),
        dendrites,
        x.stride(1) == 1,
    )


def hint_of(size: int | torch.SymInt) -> int:
    """Return a dynamic size as it is in the example, so that asking adds no guard to a graph."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return _UNKNOWN_SIZE if hint is None else int(hint)


def _capability(tensor: Tensor) -> tuple[int, int] | None:
    return _capability_of(tensor.get_device()) if tensor.device.type == "cuda" else None


@functools.cache
def _capability_of(device: int) -> tuple[int, int] | None:
    known = torch.version.hip is None and _has_triton()
    return torch.cuda.get_device_capability(device) if known else None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
