"""Which kernels compute a site: a pure function over shape, dtype and device.

    reference   plain torch; right everywhere
    packed      one library GEMM or convolution over stacked weights, one epilogue kernel
    split       one kernel for all dendrites, which adds to the soma that the library computed
    depthwise   likewise, where every neuron reads one channel of its own
    fused       one kernel for soma and dendrites, where the graph holds them as one node
    streamed    likewise, for few rows: every weight is read once, from where it is

The thresholds are measured; docs/kernels.md has the table. Nothing is tuned at run time.
"""

import functools
import logging
import math
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from pbfx_kernels.geometry import LINEAR, Geometry
from pbfx_kernels.launching import power_of_two
from pbfx_kernels.problem import Problem, conv2d_problem, hint_of, linear_problem

_LOG = logging.getLogger(__name__)

# The oldest architecture with bfloat16, TF32 and asynchronous copies: Ampere.
_LEAST_CAPABILITY = (8, 0)
# Where the thresholds below were measured: Hopper.
_HOPPER = 9
# Unrolled cascades; beyond, their code and registers grow out of hand.
_MOST_PACKED, _MOST_SPLIT, _MOST_FUSED = 8, 5, 7
# Rows of a matrix that a descriptor loads from start at multiples of so many bytes.
_DESCRIBED_BYTES = 16
# Positions, and positions for each input, from which laying weights side by side costs less than
# the kernel gains: 3 % more than *packed* at 8192x4096x4096, where it would be 4 % less without.
_LEAST_FUSED_POSITIONS, _LEAST_FUSED_RATIO = 4096, 4
# Inputs of a convolution, by bytes of an element, up to which one kernel is faster than cuDNN for
# soma and dendrites; in TF32 more of them, and groups, were not measured.
_MOST_FUSED_INPUTS = {2: 2304, 4: 1152}
# Inputs of a linear op in TF32 up to which it is faster: a half at 64, a quarter at 256, level with
# the library's product from 768 on.
_MOST_FUSED_TF32 = 256
# Dendrites up to which convolutions and TF32 were measured.
_MOST_FUSED_MEASURED = 3
# Inputs of a linear op in 16 bits, by D, up to which it is faster. With two dendrites a quarter of
# what it multiplies is zeros: packed takes 0.96 of its time at 768 inputs, 0.81 at 3072.
_MOST_FUSED_LINEAR = {1: math.inf, 2: 512, 3: math.inf}
# Inputs, by D, up to which it is faster if the weights lie so already, whatever the number of
# positions: 7 % less at 128x4096x1024, where few tiles leave multiprocessors idle, is the most that
# it was seen to lose.
_MOST_FROZEN_INPUTS = {1: 768, 2: 512, 3: 1024}
# Rows up to which reading the weights where they are is the fastest: as many as a tile has, always;
# more if there are few multiply-adds, those of roles that do not exist included, and of 32 bits a
# quarter as many. At 256x4096x4096 it is level with *packed*, at 512x4096x1024 6 % ahead.
_ONE_TILE, _MOST_STREAMED_POSITIONS, _MOST_STREAMED_PRODUCTS = 64, 512, 2**33
# What Triton knows of the length of a row is whether it is a multiple of 16 elements; rows of other
# lengths are read element by element.
_STREAMED_ELEMENTS = 16
# Neurons per group of a convolution: a narrower tile is mostly empty.
_LEAST_GROUP, _LEAST_FUSED_GROUP = 10, 16
# Channels that a step of the fused main loop reads at least: the shortest product.
_STEP_CHANNELS = 16
# Positions of an image that a tile of neurons can step over in 32 bits.
_MOST_PLACES = 2**24
# Inputs per neuron of a convolution whose patches may be laid out as a matrix.
_MOST_PATCHED = 256
# Where one kernel beats a library GEMM and an epilogue: where the preactivations would be most of
# the traffic, and where there is so little to do that a second launch is.
_SPLIT_INPUTS = 128
_FEW_POSITIONS, _FEW_INPUTS = 512, 2048
# Convolutions of images (1 or 3 channels), for which libraries have no good algorithm; and NHWC
# ones with this many inputs and no more, which they do not stack well.
IMAGE_CHANNELS = 3
_SPLIT_NHWC_INPUTS = 576
# On Hopper, where the kernel is that of *fused*, in 16 bits and up to D = 3: of what *packed*
# takes, soma included, 0.76 to 0.99 at 1x1 over 64 and 256 channels, and 1.13 over 512; at 3x3
# over 32 and 64, 0.61 to 0.99 from D = 2 on in NHWC, and from D = 3 on in NCHW, where MNIST's
# conv2 takes 1.03, but up to 1.3 below. And no preactivations in memory.
_SPLIT_POINTWISE_INPUTS, _SPLIT_WINDOW_INPUTS = 256, 576
_LEAST_SPLIT_NHWC, _LEAST_SPLIT_NCHW = 2, 3
# Inputs per neuron of a convolution up to which a backward computes activations again.
RECOMPUTED_INPUTS = 512
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Strategy(Enum):
    """How the dendrites of a site are evaluated."""

    REFERENCE = "reference"
    PACKED = "packed"
    SPLIT = "split"
    DEPTHWISE = "depthwise"


class Route(Enum):
    """How the *fused* strategy reads the input of a convolution."""

    POINTWISE = "pointwise"
    WALKED = "walked"
    PATCHES = "patches"


def choose(problem: Problem) -> Strategy:
    """Choose the strategy for a forward."""
    fallback = fallback_reason(problem)
    if fallback is not None:
        _say_once(fallback)
        return Strategy.REFERENCE
    if problem.dendrites == 0 or problem.positions == 0 or problem.neurons == 0:
        return Strategy.REFERENCE
    _say_if_unmeasured(problem)
    if is_depthwise(problem):
        return Strategy.DEPTHWISE
    return Strategy.SPLIT if can_split(problem) and _split_wins(problem) else Strategy.PACKED


def choose_again(problem: Problem) -> Strategy:
    """Choose the strategy for a backward that computes activations again.

    It does so to save their memory, and *packed* would write as much: D times the output. At
    MNIST's conv2 and a batch of 1024 *split* takes 323 µs for 269, and does not write 216 MiB.
    """
    chosen, few = choose(problem), problem.inputs <= RECOMPUTED_INPUTS
    if chosen is Strategy.PACKED and problem.geometry.spatial == 2 and few and _is_hopper(problem):
        return Strategy.SPLIT if can_split(problem) else chosen
    return chosen


def fallback_reason(problem: Problem) -> str | None:
    """Say why the kernels cannot compute a site, or return None."""
    if problem.device != "cuda":
        return f"there are no kernels for devices of type {problem.device!r}"
    if problem.capability is None:
        return "Triton for CUDA is missing here"
    if problem.capability < _LEAST_CAPABILITY:
        return f"the kernels need compute capability 8.0, got {problem.capability}"
    if problem.dtype not in _DTYPES:
        return f"there are no kernels for {problem.dtype}"
    if problem.dendrites > _MOST_PACKED:
        return f"the kernels hold up to {_MOST_PACKED} dendrites per neuron"
    if problem.geometry.transposed:
        return "there are no kernels for transposed convolutions"
    return None


def is_depthwise(problem: Problem) -> bool:
    """Return whether every neuron reads one channel of its own, over one or two dimensions."""
    geometry = problem.geometry
    alone = problem.channels == 1 and geometry.groups == problem.neurons
    counted = problem.positions < 2**31
    return geometry.spatial in (1, 2) and alone and counted and not geometry.transposed


def can_split(problem: Problem) -> bool:
    """Return whether the *split* kernels know this problem."""
    # A float32 product without TF32 runs on no matrix unit; libraries are better at that.
    exact = problem.dtype == torch.float32 and not problem.tf32
    geometry = problem.geometry
    # A tile of neurons lies within one group.
    known = geometry.spatial == 0 or (
        geometry.spatial == 2 and problem.neurons // geometry.groups >= _LEAST_GROUP
    )
    return known and problem.inputs > 0 and problem.dendrites <= _MOST_SPLIT and not exact


def _split_wins(problem: Problem) -> bool:
    # Float32 operands are twice the bytes, and libraries keep their lead but where they have none.
    small = problem.dtype.itemsize == 2
    geometry = problem.geometry
    if geometry.spatial == 0:
        few = 1 < problem.positions <= _FEW_POSITIONS and problem.inputs <= _FEW_INPUTS
        return few or (small and problem.inputs <= _SPLIT_INPUTS)
    if problem.channels <= IMAGE_CHANNELS:
        return True
    if small and _is_hopper(problem) and _steps_by_one(problem):
        if problem.taps == 1:
            return problem.inputs <= _SPLIT_POINTWISE_INPUTS
        least = _LEAST_SPLIT_NHWC if problem.channels_last else _LEAST_SPLIT_NCHW
        return problem.inputs <= _SPLIT_WINDOW_INPUTS and problem.dendrites >= least
    # Pointwise convolutions are GEMMs.
    gathered = problem.taps > 1 and problem.inputs <= _SPLIT_NHWC_INPUTS
    return small and gathered and problem.channels_last and problem.channels > 32


def _steps_by_one(problem: Problem) -> bool:
    """Return whether descriptors load a convolution's input whatever the size of its images."""
    geometry, measured = problem.geometry, problem.dendrites <= _MOST_FUSED_MEASURED
    plain = geometry.groups == 1 and geometry.stride == (1, 1)
    return measured and plain and launches(problem) and _walks(problem)


def can_fuse(
    x: Tensor, weight: Tensor, dendrite_weight: Tensor, geometry: Geometry = LINEAR
) -> bool:
    """Return whether a *fused* kernel knows a site: on Hopper, in 16 bits or TF32, D up to 7.

    Args:
        x: `(..., K)` or `(B, channels, H, W)`.
        weight: W, `(N, K)` or `(N, channels / groups, kH, kW)`, of the dtype of `x`.
        dendrite_weight: V, `(D, *W)`.
        geometry: linear, or a convolution over two dimensions.
    """
    if geometry.spatial:
        return route_of(x, weight, dendrite_weight, geometry) is not None
    problem = linear_problem(x, weight, dendrite_weight)
    return problem is not None and launches(problem)


def route_of(
    x: Tensor, weight: Tensor, dendrite_weight: Tensor, geometry: Geometry
) -> Route | None:
    """Choose how a *fused* kernel reads a convolution's input, or None where none knows it.

    Args:
        x: `(B, channels, H, W)`.
        weight: W, `(N, channels / groups, kH, kW)`, of the dtype of `x`.
        dendrite_weight: V, `(D, *W)`.
        geometry: over two dimensions.
    """
    problem = conv2d_problem(x, weight, dendrite_weight, geometry)
    return None if problem is None else route(problem, x.shape)


def route(problem: Problem, shape: Sequence[int]) -> Route | None:
    """Choose how a *fused* kernel reads a convolution's input, or None where none knows it.

    Args:
        problem: a convolution over two dimensions.
        shape: of its input, `(B, channels, H, W)`.
    """
    geometry, sizes = problem.geometry, [hint_of(size) for size in shape]
    # Kernels count the elements of one image in 32 bits.
    near = problem.positions < _MOST_PLACES * sizes[0] and math.prod(sizes[1:]) < 2**31
    if not near or not launches(problem):
        return None
    if not _walks(problem):
        return Route.PATCHES
    if problem.taps == 1 and geometry.stride == (1, 1) and geometry.padding == (0, 0):
        return Route.POINTWISE if geometry.groups == 1 else Route.WALKED
    if all(size % step == 0 for size, step in zip(sizes[2:], geometry.stride, strict=True)):
        return Route.WALKED
    return Route.PATCHES if _patched(problem) else None


def _is_hopper(problem: Problem) -> bool:
    return problem.capability is not None and problem.capability[0] == _HOPPER


def fuses(problem: Problem) -> bool:
    """Return whether *fused* is the fastest way to compute a site, its soma included.

    The weights are laid side by side at every call, which few rows do not pay for; and what is
    gained over a library's product, the traffic of the preactivations, is the less the longer the
    rows are.
    """
    if problem.geometry.spatial:
        read = _walks(problem) or problem.channels <= IMAGE_CHANNELS
        enough = problem.positions >= _LEAST_FUSED_POSITIONS
        return _knows_fused(problem) and read and enough
    least = max(_LEAST_FUSED_POSITIONS, _LEAST_FUSED_RATIO * problem.inputs)
    most = _MOST_FUSED_LINEAR.get(problem.dendrites, 0)
    if problem.dtype.itemsize == 4:
        most = _MOST_FUSED_TF32 if problem.dendrites <= _MOST_FUSED_MEASURED else 0
    return launches(problem) and problem.positions >= least and problem.inputs <= most


def fuses_frozen(problem: Problem) -> bool:
    """Return whether *fused* is the fastest where the weights lie side by side for good.

    However many rows: what they cost is paid once.
    """
    most = _MOST_FROZEN_INPUTS.get(problem.dendrites, 0)
    return _knows_fused(problem) and problem.inputs <= most


def _knows_fused(problem: Problem) -> bool:
    """Return whether a *fused* kernel was measured for problems like this one."""
    geometry, size = problem.geometry, problem.dtype.itemsize
    if problem.dendrites > _MOST_FUSED_MEASURED or not launches(problem):
        return False
    if geometry.spatial and problem.inputs > _MOST_FUSED_INPUTS[size]:
        return False
    return size == 2 or (geometry.spatial > 0 and geometry.groups == 1)


def can_stream(problem: Problem) -> bool:
    """Return whether the *streamed* kernel knows a site: linear, in 16 bits or TF32, D up to 7."""
    size, tf32 = problem.dtype.itemsize, problem.dtype == torch.float32 and problem.tf32
    return (
        fallback_reason(problem) is None
        and problem.geometry == LINEAR
        and (size == 2 or tf32)
        and 1 <= problem.dendrites <= _MOST_FUSED
        and 0 < problem.positions < 2**31
        and min(problem.neurons, problem.inputs) > 0
    )


def streams(problem: Problem) -> bool:
    """Return whether *streamed* is the fastest way to compute a linear site, its soma included."""
    aligned = problem.inputs % _STREAMED_ELEMENTS == 0
    if not aligned or problem.positions > _MOST_STREAMED_POSITIONS or not can_stream(problem):
        return False
    columns = power_of_two(problem.dendrites + 1) * problem.neurons
    products = problem.positions * columns * problem.inputs
    most = _MOST_STREAMED_PRODUCTS * 4 // problem.dtype.itemsize**2
    if problem.positions > _ONE_TILE and products > most:
        return False
    _say_if_unmeasured(problem)
    return True


def launches(problem: Problem) -> bool:
    """Return whether a *fused* kernel can compute a site; for convolutions see `route` too."""
    geometry, size = problem.geometry, problem.dtype.itemsize
    if (
        # Elsewhere it may spill.
        not _is_hopper(problem)
        or problem.device != "cuda"
        or not (size == 2 or (problem.dtype == torch.float32 and problem.tf32))
        or not 1 <= problem.dendrites <= _MOST_FUSED
        or not 0 < problem.positions < 2**31
        or not problem.inputs
        or geometry.transposed
    ):
        return False
    if geometry.spatial == 0:
        return problem.inputs * size % _DESCRIBED_BYTES == 0
    return geometry.spatial == 2 and (_walks(problem) or _patched(problem))


def _walks(problem: Problem) -> bool:
    """Return whether descriptors can load a convolution's input, if its strides divide it."""
    geometry, bytes_ = problem.geometry, problem.channels * problem.dtype.itemsize
    if geometry.groups == 1 and geometry.stride[1] == 1:
        return bytes_ % _DESCRIBED_BYTES == 0
    # What comes after the channels of a group, or of a step, is no zeros.
    group = problem.neurons // geometry.groups
    fits = geometry.groups == 1 or (group >= _LEAST_FUSED_GROUP and group % 4 == 0)
    return fits and problem.channels % _STEP_CHANNELS == 0


def _patched(problem: Problem) -> bool:
    return problem.geometry.groups == 1 and problem.inputs <= _MOST_PATCHED


def recomputes(soma: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether a backward should compute activations again rather than find them saved.

    Saved activations take less time wherever it was measured, and D times the memory of the
    output. So it is done where that memory is what fills a GPU and where a step stays below 2.5
    times the plain one: at convolutions with few inputs and several dendrites. Pointwise ones are
    left out, because for them it does not. It depends on nothing that changes from batch to batch,
    so compiled graphs hold for all batch sizes.

    Args:
        soma: its output, for device and dtype.
        weight: V, `(D, N, K)` or `(D, N, channels / groups, *kernel)`.
        geometry: the form of the soma.
    """
    dendrites, neurons, channels, *taps = weight.shape
    known = soma.device.type == "cuda" and soma.dtype in _DTYPES
    if not known or geometry.transposed or math.prod(taps) == 1:
        return False
    # A depthwise backward reads what the activations are made of for the weight's gradient too.
    least = 1 if channels == 1 and geometry.groups == neurons else 2
    return dendrites >= least and channels * math.prod(taps) <= RECOMPUTED_INPUTS


@functools.cache
def _say_once(reason: str) -> None:
    """Log a fallback the first time that it happens."""
    _LOG.info("sites run the reference, in plain torch: %s", reason)


def _say_if_unmeasured(problem: Problem) -> None:
    if problem.capability is not None and not _is_hopper(problem):
        _say_unmeasured_once(problem.capability)


@functools.cache
def _say_unmeasured_once(capability: tuple[int, int]) -> None:
    """Log that thresholds of another GPU are used, the first time that they are."""
    _LOG.info(
        "kernels are chosen as on Hopper, for compute capability %d.%d was not measured; "
        "pbfx_kernels.measure() chooses by time",
        *capability,
    )
