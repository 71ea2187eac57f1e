"""Configurations of the fused kernels: pure functions over shape and element size.

A tile of BLOCK_P positions has D accumulators of BLOCK_N neurons each in registers, so the number
of accumulator columns, D * BLOCK_N, is what a configuration is chosen by. `COMMITTED` lists every
one that can be chosen; the ahead-of-time tests compile them all.
"""

from dataclasses import dataclass

from pbfx_kernels.launching import ceiling, power_of_two

# More accumulators than this spill at every useful tile.
MOST_DENDRITES = 5


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
    wide = max(16, min(64 if dendrites <= 3 else 32, power_of_two(group)))
    # Half as deep as a GEMM's: gathered columns cost address arithmetic in registers.
    deep = max(16, min(64 // (element_size // 2), 32, power_of_two(inputs)))
    return Blocks(128, wide, deep, 8 if wide > 16 else 4, 3)


def neuron_blocks(positions: int, neurons: int, inputs: int, dendrites: int) -> Blocks:
    """Choose the configuration of `fused_neuron`, whose operands have two bytes per element.

    Args:
        positions: P.
        neurons: N.
        inputs: K.
        dendrites: D, 1 to 3.
    """
    roles = 2 if dendrites == 1 else 4
    deep = max(16, min(64, power_of_two(inputs)))
    wide = max(64 // roles, min(256 // roles, power_of_two(neurons)))
    if ceiling(positions, 128) * ceiling(neurons, wide) < _FULL:
        return Blocks(64, min(wide, 32), deep, 4, 4)
    if inputs <= 4 * deep:
        # Short products: two programs per multiprocessor, so that one computes activations while
        # the other multiplies.
        return Blocks(128, min(wide, 128 // roles), deep, 4, 3, 2)
    return Blocks(128, wide, deep, 8, 4)
