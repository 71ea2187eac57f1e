"""The kernels for few rows compile for GPUs that are not there, and keep to their registers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead_of_time import CAPABILITIES, Compiled, compile_kernel

from pbfx_kernels import ACTIVATIONS, link_and_bias_gradient, streamed_neuron
from pbfx_kernels.fused_configs import Streams, streams_of
from pbfx_kernels.fused_neuron import roles_of
from pbfx_kernels.relaunch import Launch

# A sixteenth of a thread's registers.
MOST_STACK = 64
# Dynamic shared memory of a program, in bytes: CUDA's limits for these capabilities.
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Positions, neurons, inputs: one row, few, inputs shared, tiles of 64 and of 128 rows, many tiles,
# next to nothing.
SHAPES = (
    (1, 4096, 4096),
    (32, 1024, 4096),
    (128, 128, 9216),
    (256, 1024, 1024),
    (128, 4096, 4096),
    (512, 4096, 1024),
    (64, 50257, 768),
    (128, 10, 128),
)
CONFIGURATIONS = [
    (d, streams, dtype)
    for dtype, size in (("bf16", 2), ("fp32", 4))
    for d, streams in dict.fromkeys(
        (d, streams_of(*shape, d, size)) for d in (1, 3, 5) for shape in SHAPES
    )
]
capabilities = pytest.mark.parametrize("capability", CAPABILITIES)


def constants_of(
    d: int, streams: Streams, dtype: str, activation: str = "tanh", keep: bool = True
) -> dict[str, Any]:
    return {
        "D": d,
        "ROLES": roles_of(d),
        "SPLIT": streams.splits > 1,
        "KEEP": keep,
        "ACTIVATION": activation,
        "FAST": dtype == "bf16",
        "HAS_SOMA_BIAS": True,
        "HAS_BIAS": True,
        "EVEN_K": True,
        "PRECISION": "tf32",
        "BLOCK_P": streams.positions,
        "BLOCK_N": streams.neurons,
        "BLOCK_K": streams.inputs,
        "STAGES": streams.stages,
    }


def types_of(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    types = dict.fromkeys(("out", "kept", "x", "weight", "dendrite_weight"), f"*{dtype}")
    types |= dict.fromkeys(("sums", "soma_bias", "bias", "to_soma", "to_dendrite"), "*fp32")
    given = [name for name in kernel.arg_names if name not in constants]
    return {name: types.get(name, "i32") for name in given}


def compiled(capability: int, d: int, streams: Streams, dtype: str, **way: Any) -> Compiled:
    kernel = streamed_neuron._streamed_kernel
    constants = constants_of(d, streams, dtype, **way)
    types = types_of(kernel, dtype, constants)
    return compile_kernel(kernel, types, constants, capability, types, streams.warps)


@capabilities
@pytest.mark.parametrize(("d", "streams", "dtype"), CONFIGURATIONS, ids=str)
def test_every_configuration(capability: int, d: int, streams: Streams, dtype: str) -> None:
    found = compiled(capability, d, streams, dtype)
    assert found.stack <= MOST_STACK
    assert found.shared <= MOST_SHARED[capability]
    assert "cp.async.cg.shared.global" in found.ptx, "weights are not copied 16 bytes at a time"
    # Taking a product apart moves nothing between threads, where they hold it as Hopper's do.
    assert capability == 100 or found.ptx.count("shfl") <= 1
    if capability == 90:
        assert ("wgmma" in found.ptx) is (streams.positions >= 64)


@capabilities
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(capability: int, activation: str) -> None:
    streams = streams_of(128, 4096, 1024, 3)
    found = compiled(capability, 3, streams, "bf16", activation=activation)
    assert found.stack <= MOST_STACK


@capabilities
@pytest.mark.parametrize("splits", [2, 16, 33])
@pytest.mark.parametrize("d", [1, 3, 7])
def test_adding_up(capability: int, d: int, splits: int) -> None:
    kernel = streamed_neuron._added_kernel
    launch = _added(d, splits)
    constants = _constants(kernel, launch)
    types = types_of(kernel, "bf16", constants)
    found = compile_kernel(kernel, types, constants, capability, types, launch._warps)
    assert found.stack <= MOST_STACK


@capabilities
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 3, 8])
def test_both_sums(capability: int, d: int, dtype: str) -> None:
    shape = (16384, 3072, d)
    prepared = link_and_bias_gradient._prepare(
        shape, (3072, 16384 * 3072, 3072), (DTYPES[dtype],) * 4, 0, 132
    )
    # Those of the last share are fewer.
    assert shape[0] - (prepared.shares - 1) * prepared.add._arguments[2] > 0
    pointers = (
        (link_and_bias_gradient._sums_kernel, prepared.add, ("grad", "activations")),
        (link_and_bias_gradient._finish_kernel, prepared.finish, ("of_links", "of_bias")),
    )
    for kernel, launch, data in pointers:
        constants = _constants(kernel, launch)
        types = {"partial": "*fp32", **dict.fromkeys(data, f"*{dtype}")}
        types |= {name: "i32" for name in kernel.arg_names if name not in types | constants}
        found = compile_kernel(kernel, types, constants, capability, types, launch._warps)
        assert found.stack <= MOST_STACK
        if launch is prepared.add:
            # All of them run at once, with the KiB that the system takes of each.
            resident = link_and_bias_gradient._RESIDENT
            assert resident * (found.shared + 1024) <= MOST_SHARED[capability] + 1024
            assert resident * found.registers * 128 <= 2**16
            assert "cp.async.cg.shared.global" in found.ptx, "loads are not 16 bytes wide"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_launched_is_what_was_compiled(
    shape: tuple[int, int, int], d: int, dtype: str
) -> None:
    """The compilations above name their constants; a launch gives them by position."""
    positions, neurons, inputs = shape
    streams = streams_of(*shape, d, DTYPES[dtype].itemsize)
    stream, add = streamed_neuron._prepare(
        (positions, inputs, d, neurons),
        (inputs, inputs, inputs, neurons * inputs),
        (DTYPES[dtype], *(torch.float32,) * 4),
        (True, "tanh", dtype == "bf16"),
        streams,
        0,
    )
    assert _constants(streamed_neuron._streamed_kernel, stream) == constants_of(d, streams, dtype)
    assert stream._warps == streams.warps
    assert (add is not None) is (streams.splits > 1)
    if add is None:
        return
    found = _constants(streamed_neuron._added_kernel, add)
    assert found["SPLITS"] == streams.splits <= found["WIDE"]
    assert add._grid[0] * found["BLOCK"] >= positions * neurons


def _added(d: int, splits: int) -> Launch:
    shape, streams = (128, 9216, d, 128), Streams(64, 32, 64, 4, 4, splits)
    dtypes = (torch.bfloat16, *(torch.float32,) * 4)
    _, add = streamed_neuron._prepare(
        shape, (9216, 9216, 9216, 128 * 9216), dtypes, (True, "tanh", True), streams, 0
    )
    assert add is not None
    return add


def _constants(kernel: Any, launch: Launch) -> dict[str, Any]:
    given = launch._arguments
    found = dict(zip(kernel.arg_names[-len(given) :], given, strict=True))
    pairs = zip(kernel.arg_names, kernel.params, strict=True)
    return {name: found[name] for name, parameter in pairs if parameter.is_constexpr}
