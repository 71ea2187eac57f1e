"""Every kernel in every committed configuration, compiled ahead of time for three architectures.

Spilled registers show up as a stack frame. Nothing may spill more than `MOST_STACK` bytes a thread.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
from ahead_of_time import CAPABILITIES, compile_for_dtype, compile_kernel

from pbfx_kernels import ACTIVATIONS
from pbfx_kernels.depthwise_configs import WARPS, Strips, depthwise_strips
from pbfx_kernels.fused_configs import (
    Blocks,
    box_of,
    conv2d_blocks,
    conv_neuron_blocks,
    linear_blocks,
    neuron_blocks,
)

# A sixteenth of a thread's registers.
MOST_STACK = 64
# Dynamic shared memory of a program, in bytes: CUDA's limits for these capabilities.
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
capabilities = pytest.mark.parametrize("capability", CAPABILITIES)
DTYPES = {"bf16": 2, "fp32": 4}
Configuration = tuple[int, Blocks, str]


def linear_configurations() -> list[Configuration]:
    """Return what `linear_blocks` can choose, but for narrower tiles, which need less."""
    shapes = [(p, n, d) for p in (64, 65536) for n in (10, 256) for d in _counts(n)]
    return _distinct(
        (d, linear_blocks(p, n, 1024, d, size), dtype)
        for p, n, d in shapes
        for dtype, size in DTYPES.items()
    )


def conv2d_configurations() -> list[Configuration]:
    """Return what `conv2d_blocks` can choose, likewise."""
    shapes = [(n, k, d) for n, k in ((10, 9), (256, 576)) for d in _counts(n)]
    return _distinct(
        (d, conv2d_blocks(65536, n, k, d, size), dtype)
        for n, k, d in shapes
        for dtype, size in DTYPES.items()
    )


def neuron_configurations() -> list[Configuration]:
    """Return what `neuron_blocks` can choose, likewise."""
    shapes = [(p, k, d) for p, k in ((64, 1024), (65536, 64), (65536, 1024)) for d in (1, 3, 5)]
    return _distinct(
        (d, neuron_blocks(p, 1024, k, d, size), dtype)
        for p, k, d in shapes
        for dtype, size in DTYPES.items()
    )


def conv_neuron_configurations(soma: bool = True) -> list[Configuration]:
    """Return what `conv_neuron_blocks` can choose, likewise."""
    shapes = [(64, 128), (65536, 16), (65536, 128)]
    return _distinct(
        (d, conv_neuron_blocks(p, 512, channels, d, size, soma=soma), dtype)
        for p, channels in shapes
        for d in (1, 3, 5)
        for dtype, size in DTYPES.items()
    )


@dataclasses.dataclass(frozen=True)
class Plane:
    """A depthwise site of MobileNet's: D, taps and stride each way, layout, and what it computes.

    `kind` is "neuron", "sums", of all gradients, "links", of those alone, or "input".
    """

    kind: str
    dendrites: int
    last: bool
    taps: int = 3
    stride: int = 1
    width: int = 56

    @property
    def strips(self) -> Strips:
        up = (self.stride, self.stride) if self.kind == "input" else (1, 1)
        stride = 1 if self.kind == "input" else self.stride
        form = (stride, stride, 1, 1, 1, 1, self.taps, self.taps)
        shape = (64, 144, self.width, self.width)
        held = 4 if self.kind == "sums" and self.last else 1
        return depthwise_strips(shape, self.dendrites + held, form, up, self.last)


def depthwise_planes() -> list[tuple[Plane, int]]:
    """Return what `depthwise_strips` can choose, likewise, with capabilities."""
    everywhere = [Plane("neuron", 3, last) for last in (True, False)]
    here = [
        *(Plane("neuron", 1, last) for last in (True, False)),
        Plane("neuron", 8, True),
        *(Plane("neuron", 3, last, width=7) for last in (True, False)),
        *(Plane("sums", 3, last) for last in (True, False)),
        *(Plane("sums", d, True) for d in (0, 8)),
        Plane("links", 3, True),
        *(Plane("input", 0, last, 3, step) for last in (True, False) for step in (1, 2)),
        *(Plane("neuron", 3, True, taps, step) for taps, step in ((5, 2), (7, 1), (9, 1))),
    ]
    pairs = [(plane, capability) for plane in everywhere for capability in CAPABILITIES]
    return [*pairs, *((plane, 90) for plane in here)]


def _counts(neurons: int) -> tuple[int, ...]:
    return (3,) if neurons < 16 else (1, 2, 3, 4, 5)


def _distinct(configurations: Iterable[Configuration]) -> list[Configuration]:
    return list(dict.fromkeys(configurations))


@capabilities
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(capability: int, activation: str) -> None:
    _epilogue(capability, "bf16", 3, True, activation)


@capabilities
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("d", [1, 8])
def test_epilogue(capability: int, d: int, channels_last: bool) -> None:
    _epilogue(capability, "fp32", d, channels_last, "tanh")


def _epilogue(capability: int, dtype: str, d: int, channels_last: bool, activation: str) -> None:
    from pbfx_kernels.epilogue import _dendrites_epilogue_kernel, tile_of

    tile = tile_of(65536, 256, d, channels_last)
    constants = {
        "D": d,
        "ACTIVATION": activation,
        "FAST": dtype == "bf16",
        "HAS_BIAS": True,
        "KEEP": True,
        "ROWS": channels_last,
        "GROUPED": not channels_last,
        "BLOCK_P": tile.positions,
        "BLOCK_N": tile.neurons,
    }
    axis = "n" if channels_last else "s"
    constants |= {f"{name}_{axis}": 1 for name in ("out", "soma", "z")}
    compiled = compile_for_dtype(
        _dendrites_epilogue_kernel, capability, dtype, constants, tile.warps
    )
    assert compiled.stack <= MOST_STACK
    if channels_last:
        assert ".v4." in compiled.ptx, "loads are not 16 bytes wide"


@capabilities
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("d", [1, 8])
def test_to_soma_gradient(capability: int, d: int, channels_last: bool) -> None:
    from pbfx_kernels.epilogue import tile_of
    from pbfx_kernels.to_soma_gradient import _to_soma_gradient_kernel

    tile = tile_of(65536, 256, d, channels_last)
    constants = {
        "D": d,
        "FROM_Z": d > 1,
        "ACTIVATION": "tanh",
        "FAST": True,
        "HAS_BIAS": True,
        "GROUPED": not channels_last,
        "ROWS": channels_last,
        "BLOCK_P": tile.positions,
        "BLOCK_N": tile.neurons,
        **({"grad_n": 1, "a_n": 1} if channels_last else {"grad_s": 1, "a_s": 1}),
    }
    compiled = compile_for_dtype(
        _to_soma_gradient_kernel, capability, "bf16", constants, tile.warps
    )
    assert compiled.stack <= MOST_STACK


@capabilities
@pytest.mark.parametrize("block", [2, 1024])
def test_shares(capability: int, block: int) -> None:
    from pbfx_kernels.shares import _COLUMNS, _WARPS, _shares_kernel

    types = {"out": "*fp32", "partial": "*fp32", "S": "i32", "C": "i32"}
    constants = {"BLOCK_S": block, "BLOCK_C": _COLUMNS}
    compiled = compile_kernel(_shares_kernel, types, constants, capability, warps=_WARPS)
    assert compiled.stack <= MOST_STACK


@capabilities
@pytest.mark.parametrize(("d", "blocks", "dtype"), linear_configurations(), ids=str)
def test_fused_linear(capability: int, d: int, blocks: Blocks, dtype: str) -> None:
    from pbfx_kernels.fused_linear import _linear_dendrites_kernel

    constants = {
        "out_n": 1,
        "soma_n": 1,
        "x_k": 1,
        "D": d,
        "MODE": "keep",
        "ACTIVATION": "tanh",
        "FAST": dtype == "bf16",
        "HAS_BIAS": True,
        "EVEN_K": True,
        "PRECISION": "tf32",
        "GROUP_P": 8,
        **_tile(blocks),
    }
    compiled = compile_for_dtype(
        _linear_dendrites_kernel,
        capability,
        dtype,
        constants,
        blocks.warps,
        blocks.stages,
    )
    assert compiled.stack <= MOST_STACK
    assert compiled.shared <= MOST_SHARED[capability]
    assert capability != 90 or blocks.positions < 64 or "wgmma" in compiled.ptx


@capabilities
@pytest.mark.parametrize(("d", "blocks", "dtype"), conv2d_configurations(), ids=str)
def test_fused_conv2d(capability: int, d: int, blocks: Blocks, dtype: str) -> None:
    from pbfx_kernels.fused_conv2d import _conv2d_dendrites_kernel

    constants = {
        "x_c": 1,
        "out_n": 1,
        "soma_n": 1,
        **dict.fromkeys(("STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W", "DILATION_H", "DILATION_W"), 1),
        "TAPS_H": 3,
        "TAPS_W": 3,
        "CHANNELS_INNER": True,
        "D": d,
        "ACTIVATION": "tanh",
        "FAST": dtype == "bf16",
        "HAS_BIAS": True,
        "PRECISION": "tf32",
        **_tile(blocks),
    }
    # Keeping three activations in bfloat16 takes 72 bytes of stack for capability 10.0.
    for mode in ("gradient", "keep") if dtype == "fp32" else ("gradient",):
        launch = constants | {"MODE": mode}, blocks.warps, blocks.stages
        compiled = compile_for_dtype(_conv2d_dendrites_kernel, capability, dtype, *launch)
        assert compiled.stack <= MOST_STACK
        assert compiled.shared <= MOST_SHARED[capability]


@pytest.mark.parametrize(("plane", "capability"), depthwise_planes(), ids=str)
def test_depthwise(plane: Plane, capability: int) -> None:
    from pbfx_kernels.depthwise_gradient import _depthwise_gradient_kernel
    from pbfx_kernels.fused_depthwise import _depthwise_kernel

    strips, axis = plane.strips, "n" if plane.last else "w"
    kernel = _depthwise_kernel if plane.kind in ("neuron", "input") else _depthwise_gradient_kernel
    up = plane.stride if plane.kind == "input" else 1
    stride = 1 if plane.kind == "input" else plane.stride
    wide = not plane.last and strips.columns in (2, 4, 8)
    constants = {
        **dict.fromkeys(("STRIDE_H", "STRIDE_W"), stride),
        **dict.fromkeys(("PAD_H", "PAD_W", "DILATION_H", "DILATION_W"), 1),
        **dict.fromkeys(("TAPS_H", "TAPS_W"), plane.taps),
        **dict.fromkeys(("UP_H", "UP_W"), up),
        "D": plane.dendrites,
        "ACTIVATION": "tanh",
        "FAST": True,
        "HAS_BIAS": True,
        "EVEN_N": False,
        "LONG": False,
        "FORM": {3: "patch", 9: "loop"}.get(plane.taps, "strip"),
        "WIDE": wide and strips.columns // up > 1,
        "ROWS": strips.rows,
        "COLUMNS": strips.columns,
        "LEVELS": strips.columns.bit_length() - 1,
        "BLOCK_S": strips.strips,
        "BLOCK_N": strips.neurons,
        f"x_{axis}": 1,
    }
    if kernel is _depthwise_kernel:
        constants |= {
            "OWN_SOMA": True,
            "KEEP": plane.kind == "neuron",
            "HAS_SOMA_BIAS": True,
            "CHANNELS_INNER": plane.last,
            "WIDE_OUT": wide,
            **{f"{name}_{axis}": 1 for name in ("out", "soma")},
        }
    else:
        constants |= {"WIDE_GRAD": wide, "WEIGH": plane.kind == "sums", f"grad_{axis}": 1}
    compiled = compile_for_dtype(kernel, capability, "bf16", constants, WARPS)
    assert compiled.stack <= MOST_STACK
    if wide and strips.columns > 2:
        assert ".v2." in compiled.ptx or ".v4." in compiled.ptx, "columns are no vectors"
        # Taking a vector apart moves nothing between threads.
        assert kernel is not _depthwise_kernel or "shfl" not in compiled.ptx


@pytest.mark.parametrize(("d", "blocks", "dtype"), neuron_configurations(), ids=str)
def test_fused_neuron(d: int, blocks: Blocks, dtype: str) -> None:
    """`strategy.can_fuse` lets it run on Hopper alone."""
    from pbfx_kernels.fused_neuron import _neuron_kernel

    constants = {**_roles(d, blocks, dtype), **_tile(blocks)}
    _fused(_neuron_kernel, constants, [blocks.positions, blocks.inputs], blocks, dtype)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize(("d", "blocks", "dtype"), conv_neuron_configurations(), ids=str)
def test_fused_convolution(d: int, blocks: Blocks, dtype: str, layout: str) -> None:
    """Likewise."""
    _convolution(d, blocks, dtype, layout, "neuron")


@pytest.mark.parametrize(("mode", "layout"), [("add", "NCHW"), ("gradient", "NHWC")])
@pytest.mark.parametrize(("d", "blocks", "dtype"), conv_neuron_configurations(False), ids=str)
def test_split_convolution(d: int, blocks: Blocks, dtype: str, mode: str, layout: str) -> None:
    """Likewise."""
    _convolution(d, blocks, dtype, layout, mode)


def _convolution(d: int, blocks: Blocks, dtype: str, layout: str, mode: str) -> None:
    from pbfx_kernels.fused_conv_neuron import _conv_neuron_kernel

    box = box_of(blocks.positions, 64, 56, 56)
    constants = {
        "CHANNELS": 4 * blocks.inputs,
        **dict.fromkeys(("STRIDE_H", "STRIDE_W"), 2 if layout == "NHWC" else 1),
        **dict.fromkeys(("PAD_H", "PAD_W", "DILATION_H", "DILATION_W"), 1),
        **dict.fromkeys(("TAPS_H", "TAPS_W"), 3),
        **({"out_n": 1} if layout == "NHWC" else {"out_s": 1}),
        **dict(zip(("BLOCK_B", "BLOCK_H", "BLOCK_W"), box, strict=True)),
        "BLOCK_N": blocks.neurons,
        "BLOCK_K": blocks.inputs,
        "MODE": mode,
        **_roles(d, blocks, dtype, mode == "neuron"),
        "KEEP": mode != "gradient",
    }
    _fused(_conv_neuron_kernel, constants, [*box[:2], 1, box[2], blocks.inputs], blocks, dtype)


def _roles(d: int, blocks: Blocks, dtype: str, soma: bool = True) -> dict[str, object]:
    from pbfx_kernels.fused_neuron import roles_of

    return {
        "D": d,
        "ROLES": roles_of(d, soma),
        "KEEP": True,
        "ACTIVATION": "tanh",
        "FAST": dtype == "bf16",
        "HAS_SOMA_BIAS": soma,
        "HAS_BIAS": True,
        "PRECISION": "tf32",
        "GROUP_P": 8,
        "PROGRAMS": 132 * blocks.resident,
    }


def _fused(
    kernel: Any, constants: dict[str, Any], x: list[int], blocks: Blocks, dtype: str
) -> None:
    """Compile a fused kernel whose input is loaded in tiles of shape `x`."""
    rows = constants["ROLES"] * blocks.neurons
    types = {
        **dict.fromkeys(("out", "kept"), f"*{dtype}"),
        **({"soma": f"*{dtype}"} if "soma" in kernel.arg_names else {}),
        "x": f"tensordesc<{dtype}{x}>",
        "weights": f"tensordesc<{dtype}{[rows, blocks.inputs]}>",
        **dict.fromkeys(("soma_bias", "bias", "to_soma", "to_dendrite"), "*fp32"),
    }
    numbers = [name for name in kernel.arg_names if name not in types.keys() | constants.keys()]
    types |= dict.fromkeys(numbers, "i32")
    compiled = compile_kernel(kernel, types, constants, 90, types, blocks.warps, blocks.stages)
    assert compiled.stack <= MOST_STACK
    assert compiled.shared * blocks.resident <= MOST_SHARED[90]
    assert "wgmma" in compiled.ptx
    assert "cp.async.bulk" in compiled.ptx
    # Taking an interleaved product apart moves nothing between threads.
    assert constants.get("MODE") == "gradient" or compiled.ptx.count("shfl") <= 1


@capabilities
@pytest.mark.parametrize(("channels", "taps", "dtype"), [(3, 7, "bf16"), (1, 3, "fp32")])
def test_patches(capability: int, channels: int, taps: int, dtype: str) -> None:
    from pbfx_kernels.patches import _patches_kernel, depth_of

    length = -(-channels * taps**2 // 16) * 16
    constants = {
        "K": channels * taps**2,
        "ROW": length,
        "CHANNELS": channels,
        **dict.fromkeys(("STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W"), 2),
        **dict.fromkeys(("DILATION_H", "DILATION_W"), 1),
        "TAPS_W": taps,
        **{"BLOCK_B": 1, "BLOCK_H": 8, "BLOCK_W": 16},
        "BLOCK_K": depth_of(length),
    }
    types = {name: "i32" for name in _patches_kernel.arg_names if name not in constants}
    types |= dict.fromkeys(("rows", "x"), f"*{dtype}")
    compiled = compile_kernel(_patches_kernel, types, constants, capability, types)
    assert compiled.stack == 0
    assert "st.global.v4" in compiled.ptx, "stores are not 16 bytes wide"


def _tile(blocks: Blocks) -> dict[str, int]:
    return {
        "BLOCK_P": blocks.positions,
        "BLOCK_N": blocks.neurons,
        "BLOCK_K": blocks.inputs,
    }
