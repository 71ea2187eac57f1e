"""Configurations of the fused kernels: pure functions over shape and element size.

A tile of BLOCK_P positions has D accumulators of BLOCK_N neurons each in registers, so the number
of accumulator columns, D * BLOCK_N, is what a configuration is chosen by. `COMMITTED` lists every
one that can be chosen; the ahead-of-time tests compile them all.
"""

import math
from dataclasses import dataclass

from pbfx_kernels.launching import ceiling, power_of_two

# More accumulators than this spill at every useful tile.
MOST_DENDRITES = 5

# Inputs of the shortest product that Triton takes: 3.6 refuses fewer for 32 bits too.
LEAST_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Blocks:
    """The configuration of a fused kernel.

    Attributes:
        positions: BLOCK_P.
        neurons: BLOCK_N, per dendrite.
        inputs: BLOCK_K.
        warps: per program.
        stages: of the software pipeline.
        resident: programs per multiprocessor, where programs stay and take tile after tile.
    """

    positions: int
    neurons: int
    inputs: int
    warps: int
    stages: int
    resident: int = 1


def linear_blocks(
    positions: int, neurons: int, inputs: int, dendrites: int, element_size: int
) -> Blocks:
    """Choose the configuration of `fused_linear`.

    Args:
        positions: P.
        neurons: N.
        inputs: K.
        dendrites: D, 1 to `MOST_DENDRITES`.
        element_size: bytes per element of the operands, 2 or 4.
    """
    wide = max(16, min(64 if dendrites <= 3 else 32, power_of_two(neurons)))
    deep = max(16, min(128 // element_size, power_of_two(inputs)))
    # Where tiles of 128 do not fill the GPU, smaller ones share the work better.
    if ceiling(positions, 128) * ceiling(neurons, wide) < _FULL:
        return Blocks(max(16, min(64, power_of_two(positions))), min(wide, 32), deep, 4, 4)
    return Blocks(128, wide, deep, 8 if wide > 16 else 4, 3)


# Programs that fill a large GPU once: an H100 or H200 has 132 multiprocessors, an A100 108.
_FULL = 132


def conv2d_blocks(
    positions: int, group: int, inputs: int, dendrites: int, element_size: int
) -> Blocks:
    """Choose the configuration of `fused_conv2d`.

    Args:
        positions: P.
        group: neurons per group.
        inputs: K, channels per group times taps.
        dendrites: D, 1 to `MOST_DENDRITES`.
        element_size: bytes per element of the operands, 2 or 4.
    """
    # With three dendrites, tiles of 64 float32 neurons spill up to 216 bytes, or 456 on Blackwell.
    most = 64 if dendrites <= (3 if element_size == 2 else 2) else 32
    wide = max(16, min(most, power_of_two(group)))
    # Half as deep as a GEMM's: gathered columns cost address arithmetic in registers.
    deep = max(16, min(64 // (element_size // 2), 32, power_of_two(inputs)))
    return Blocks(128, wide, deep, 8 if wide > 16 else 4, 3)


def neuron_blocks(
    positions: int,
    neurons: int,
    inputs: int,
    dendrites: int,
    element_size: int = 2,
    keep: bool = False,
) -> Blocks:
    """Choose the configuration of `fused_neuron`.

    Args:
        positions: P.
        neurons: N.
        inputs: K.
        dendrites: D, 1 to 7.
        element_size: bytes per element of the operands, 2 or 4.
        keep: whether activations are written.
    """
    roles = power_of_two(dendrites + 1)
    deep = max(LEAST_DEPTH, min(128 // element_size, power_of_two(inputs)))
    wide = max(64 // roles, min(256 // roles, power_of_two(neurons)))
    if ceiling(positions, 128) * ceiling(neurons, wide) < _FULL:
        return Blocks(64, min(wide, 32, 128 // roles), deep, 4, 4)
    if element_size == 4:
        return _wide_elements(wide, roles, deep)
    if inputs <= (48 if keep else 4) * deep:
        # Short products: two programs per multiprocessor, so that one computes and writes
        # activations while the other multiplies.
        return Blocks(128, min(wide, 128 // roles), deep, 4, 3, 2)
    return Blocks(128, wide, deep, 8, 4)


@dataclass(frozen=True, slots=True)
class Streams:
    """The configuration of `streamed_neuron`.

    Attributes:
        positions: BLOCK_P.
        neurons: BLOCK_N.
        inputs: BLOCK_K.
        warps: per program.
        stages: of the software pipeline.
        splits: programs that share the inputs of a tile.
    """

    positions: int
    neurons: int
    inputs: int
    warps: int
    stages: int
    splits: int = 1


def streams_of(
    positions: int, neurons: int, inputs: int, dendrites: int, element_size: int = 2
) -> Streams:
    """Choose the configuration of `streamed_neuron`.

    Args:
        positions: P.
        neurons: N.
        inputs: K.
        dendrites: D, 1 to 7.
        element_size: bytes per element of the operands, 2 or 4.
    """
    roles, line = power_of_two(dendrites + 1), 128 // element_size

    def wide(columns: int) -> int:
        return max(4, min(columns // roles, power_of_two(neurons)))

    def tiles(tall: int, columns: int) -> int:
        return ceiling(positions, tall) * ceiling(neurons, wide(columns))

    # Large tiles read the least, where there are enough of them; wider ones spill on Blackwell.
    if positions > 64 and tiles(128, 128) >= _ENOUGH:
        return Streams(128, wide(128), _depth_of(inputs, line), 8, 4)
    tall = max(16, min(64, power_of_two(positions)))
    columns = 128 if tall == 64 else 64
    if tiles(tall, columns) < _ENOUGH:
        columns //= 2
    programs, stages = tiles(tall, columns), 4 if tall < 64 else 3
    if tall == 64 and columns == 128 and programs > _FULL:
        # Half the shared memory, so that two programs fit.
        return Streams(tall, wide(columns), _depth_of(inputs, line), 4, 4)
    deep = _depth_of(inputs, 2 * line)
    # What a second kernel costs is worth it for long rows alone.
    splits = max(1, min(_FULL // programs, ceiling(inputs, deep) // _LEAST_STEPS))
    return Streams(tall, wide(columns), deep, 4, stages, splits)


def _depth_of(inputs: int, most: int) -> int:
    return max(LEAST_DEPTH, min(most, power_of_two(inputs)))


# Programs that keep the memory of a large GPU busy.
_ENOUGH = 3 * _FULL // 4
# Steps of the main loop that a split has at least: 8 take as long as the second kernel.
_LEAST_STEPS = 8


# A step of the main loop may be so much deeper than the channels that are left for it.
_MOST_PADDED = 1.125
# Boxes of positions may cover so much more than the best ones do.
_MOST_WASTED = 1.05


def conv_neuron_blocks(
    positions: int,
    group: int,
    channels: int,
    dendrites: int,
    element_size: int,
    whole: bool = True,
    soma: bool = True,
) -> Blocks:
    """Choose the configuration of `fused_conv_neuron`.

    Two programs share a multiprocessor: one computes activations while the other multiplies. Wider
    tiles, one for each, were up to 40 % slower, and never faster, in ResNet-50's convolutions.

    Args:
        positions: P.
        group: neurons per group.
        channels: of one group.
        dendrites: D, 1 to 7.
        element_size: bytes per element of the operands, 2 or 4.
        whole: whether nothing but zeros comes after the channels; else steps divide them.
        soma: whether it computes the soma too.
    """
    roles = power_of_two(dendrites + soma)
    deep = _depth(channels, element_size, whole)
    wide = max(64 // roles, min(128 // roles, power_of_two(group)))
    if ceiling(positions, 128) * ceiling(group, wide) < _FULL:
        return Blocks(64, wide, deep, 4, 4)
    if element_size == 4:
        return _wide_elements(wide, roles, deep)
    if roles == 1:
        # Beside the accumulators of one role, the tile of a soma takes registers.
        return Blocks(128, min(wide, 64), deep, 4, 3, 3)
    return Blocks(128, wide, deep, 4, 3, 2)


def _wide_elements(wide: int, roles: int, deep: int) -> Blocks:
    """Choose for float32, whose activations take more registers than those of bfloat16."""
    return Blocks(128, min(wide, 128 // roles), deep, 8, 4)


def _depth(channels: int, element_size: int, whole: bool) -> int:
    """Choose BLOCK_K: 128 bytes, or less where much of that would be zeros or not be zeros."""
    most = 128 // element_size
    depths = [deep for deep in (most, most // 2, most // 4) if deep >= LEAST_DEPTH]
    for deep in depths:
        padded = ceiling(channels, deep) * deep
        if padded == channels or (whole and padded <= _MOST_PADDED * channels):
            return deep
    return depths[-1]


def box_of(positions: int, images: int, height: int, width: int) -> tuple[int, int, int]:
    """Cut output positions into boxes of images, rows and columns that waste the least.

    Args:
        positions: of a box, a power of two.
        images: B.
        height: H'.
        width: W'.

    Returns:
        Powers of two whose product is `positions`: of those that waste next to nothing, the widest,
        then the highest, whose taps share most of what they read.
    """
    powers = [2**i for i in range(positions.bit_length())]
    boxes = [(positions // (h * w), h, w) for w in powers for h in powers if h * w <= positions]

    def covered(box: tuple[int, int, int]) -> int:
        pairs = zip((images, height, width), box, strict=True)
        return math.prod(ceiling(size, each) * each for size, each in pairs)

    least = min(map(covered, boxes))
    lean = [box for box in boxes if covered(box) <= _MOST_WASTED * least]
    return max(lean, key=lambda box: (box[2], box[1]))
