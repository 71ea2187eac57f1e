"""The candidates' kernels compile for GPUs that are not there, and keep to their registers."""

from __future__ import annotations

import pytest
from ahead_of_time import CAPABILITIES, compile_kernel

from pbfx_kernels import ACTIVATIONS, candidate_cascade, candidate_moments, turns_kernel

POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
# NCHW of a large image, NHWC or a wide linear op, ten neurons, one neuron at one position.
LAYOUTS = {
    "planes": (64, 576, 64, False),
    "rows": (1, 8192, 4096, True),
    "narrow": (1, 64, 10, True),
    "single": (1, 1, 1, True),
}
# Two or three registers, parked outside the loop: ptxas does that at its limit of 128 for four
# warps.
LOCAL_BYTES = {80: 16, 90: 16, 100: 24}
capabilities = pytest.mark.parametrize("capability", CAPABILITIES)
dtypes = pytest.mark.parametrize("dtype", POINTERS)


def strides(prefix: str, adjoining: bool, stack: str) -> tuple[dict[str, str], dict[str, int]]:
    """Return types of the strides of a walked tensor, and its one stride of 1."""
    one = f"{prefix}_n" if adjoining else f"{prefix}_i"
    names = [f"{prefix}_{axis}" for axis in ("o", "n", "i")] + ([stack] if stack else [])
    return {name: "i32" for name in names if name != one}, {one: 1}


@pytest.mark.parametrize("dendrites", [0, 1, 3, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("regression", [False, True], ids=["covariance", "correlation"])
@dtypes
@capabilities
def test_moments(
    capability: int, dtype: str, regression: bool, layout: str, dendrites: int
) -> None:
    outer, inner, neurons, adjoining = LAYOUTS[layout]
    padded = 1 << max(dendrites - 1, 0).bit_length()
    plan = candidate_moments._plan(outer, inner, neurons, 1, padded, adjoining)
    pointer = POINTERS[dtype]
    types = dict.fromkeys(("g_ptr", "z_ptr", "a_ptr", "dz_ptr"), pointer)
    types |= dict.fromkeys(("direction_ptr", "mean_ptr", "sums_ptr"), "*fp32")
    types |= dict.fromkeys(("neurons", "outer", "inner", "candidates", "row"), "i32")
    types |= dict.fromkeys(("positions", "dz_scale", "sum_scale"), "fp32")
    constants = {
        "ACTIVATION": "tanh",
        "HAS_REGRESSION": regression,
        "D": dendrites,
        "D_PADDED": padded,
        "EVEN": neurons % plan.tile_neurons == inner % plan.tile_inner == 0,
        "TILE_N": plan.tile_neurons,
        "TILE_I": plan.tile_inner,
    }
    if regression:
        types["regression_ptr"] = "*fp32"
    else:
        constants["regression_ptr"] = None
    for prefix, stack in (("g", ""), ("z", "z_c"), ("dz", "dz_c"), ("a", "a_e")):
        more, ones = strides(prefix, adjoining, stack)
        types, constants = types | more, constants | ones
    compiled = compile_kernel(
        candidate_moments._candidate_moments_kernel,
        types,
        constants,
        capability,
        warps=candidate_moments._WARPS,
    )
    assert compiled.stack + compiled.local <= LOCAL_BYTES[capability]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@capabilities
def test_moments_of_every_activation(capability: int, activation: str) -> None:
    types = dict.fromkeys(("g_ptr", "z_ptr", "a_ptr", "dz_ptr"), "*bf16")
    pointers = ("direction_ptr", "mean_ptr", "regression_ptr", "sums_ptr")
    types |= dict.fromkeys(pointers, "*fp32")
    types |= dict.fromkeys(("neurons", "outer", "inner", "candidates", "row"), "i64")
    types |= dict.fromkeys(("positions", "dz_scale", "sum_scale"), "fp32")
    # No stride is 1, and all are wide: transposed input of more than 2^31 elements.
    for prefix, stack in (("g", ""), ("z", "z_c"), ("dz", "dz_c"), ("a", "a_e")):
        types |= {f"{prefix}_{axis}": "i64" for axis in ("o", "n", "i")}
        types |= {stack: "i64"} if stack else {}
    compiled = compile_kernel(
        candidate_moments._candidate_moments_kernel,
        types,
        {
            "ACTIVATION": activation,
            "HAS_REGRESSION": True,
            "D": 3,
            "D_PADDED": 4,
            "EVEN": False,
            "TILE_N": 4,
            "TILE_I": 256,
        },
        capability,
        warps=candidate_moments._WARPS,
    )
    assert compiled.stack + compiled.local <= LOCAL_BYTES[capability]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@dtypes
@capabilities
def test_cascade(capability: int, dtype: str, layout: str, bias: bool) -> None:
    outer, inner, neurons, adjoining = LAYOUTS[layout]
    tile_neurons, tile_inner, _ = candidate_cascade._plan(outer, inner, neurons, adjoining)
    types = {"z_ptr": POINTERS[dtype], "a_ptr": POINTERS[dtype], "links_ptr": "*fp32"}
    types |= {"neurons": "i32", "inner": "i32"}
    constants = {"D": 3, "HAS_BIAS": bias, "TILE_N": tile_neurons, "TILE_I": tile_inner}
    if bias:
        types["bias_ptr"] = "*fp32"
    else:
        constants["bias_ptr"] = None
    for prefix, stack in (("z", "z_c"), ("a", "a_e")):
        more, ones = strides(prefix, adjoining, stack)
        types, constants = types | more, constants | ones
    compiled = compile_kernel(
        candidate_cascade._candidate_cascade_kernel,
        types,
        constants,
        capability,
        warps=candidate_cascade._WARPS,
    )
    assert compiled.stack + compiled.local <= LOCAL_BYTES[capability]


@pytest.mark.parametrize("columns", [1, 128, 1024])
@pytest.mark.parametrize("number", ["fp32", "fp64"])
@capabilities
def test_turns(capability: int, number: str, columns: int) -> None:
    types = {"sums_ptr": f"*{number}", "table_ptr": "*i64", "verdict_ptr": "*fp32"}
    types |= dict.fromkeys(("sites", "measure_every", "priming_batches"), "i32")
    compiled = compile_kernel(
        turns_kernel._take_turns_kernel,
        types,
        {
            "COLUMNS": columns,
            "CONSTANT": turns_kernel.CONSTANT,
            "DECAY": 0.95,
            "FIELDS": turns_kernel._FIELDS,
            "STEPS": turns_kernel._STEPS,
        },
        capability,
        warps=turns_kernel._WARPS,
    )
    assert compiled.stack + compiled.local <= LOCAL_BYTES[capability]
