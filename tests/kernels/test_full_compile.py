"""The cascade's gradient compiles for GPUs that are not there, and keeps to its registers."""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import CAPABILITIES, compile_kernel

from pbfx_kernels import ACTIVATIONS, cascade_gradient

# A sixteenth of a thread's registers.
MOST_STACK = 64
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16"}
# A wide linear op or NHWC, NCHW of a large image, ten neurons, one neuron at one position.
LAYOUTS = {
    "rows": (1, 8192, 4096, True),
    "planes": (64, 576, 64, False),
    "narrow": (1, 64, 10, True),
    "single": (1, 1, 1, True),
}
capabilities = pytest.mark.parametrize("capability", CAPABILITIES)


def check(
    capability: int,
    dtype: str,
    activation: str,
    d: int,
    frozen: int = 0,
    layout: str = "rows",
    sums: bool = True,
) -> None:
    outer, inner, neurons, adjoining = LAYOUTS[layout]
    plan = cascade_gradient._plan(outer, inner, neurons, d, frozen, adjoining)
    types = dict.fromkeys(("g_ptr", "z_ptr", "dz_ptr"), POINTERS[dtype])
    links = ("bias_ptr", "to_soma_ptr", "to_dendrite_ptr", "sums_ptr")
    types |= dict.fromkeys(links, "*fp32")
    types |= dict.fromkeys(("neurons", "outer", "inner", "group", "z_d", "dz_d"), "i32")
    constants = {
        "D": d,
        "FROZEN": frozen,
        "ACTIVATION": activation,
        "FAST": dtype == "bfloat16",
        "HAS_BIAS": True,
        "SUMS": sums,
        "GROUPED": layout == "planes",
        "EVEN": neurons % plan.tile_neurons == inner % plan.tile_inner == 0,
        "STAGES": plan.stages,
        "TILE_N": plan.tile_neurons,
        "TILE_I": plan.tile_inner,
    }
    for prefix in ("g", "z", "dz"):
        for axis in ("o", "n", "i"):
            if axis == ("n" if adjoining else "i"):
                constants[f"{prefix}_{axis}"] = 1
            else:
                types[f"{prefix}_{axis}"] = "i32"
    compiled = compile_kernel(
        cascade_gradient._cascade_gradient_kernel,
        types,
        constants,
        capability,
        types,
        cascade_gradient._WARPS,
    )
    assert compiled.stack <= MOST_STACK
    assert compiled.local == 0


@capabilities
@pytest.mark.parametrize(
    ("d", "dtype"), [*((d, "bfloat16") for d in (1, 2, 3, 4, 5, 8)), (3, "float32")], ids=str
)
def test_every_count(capability: int, d: int, dtype: str) -> None:
    check(capability, dtype, "tanh", d)


@capabilities
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(capability: int, activation: str) -> None:
    check(capability, "float32", activation, 3)


@capabilities
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("d", "frozen"), [(3, 0), (4, 1)])
def test_every_layout(capability: int, d: int, frozen: int, layout: str) -> None:
    check(capability, "bfloat16", "gelu", d, frozen, layout)


@capabilities
def test_without_sums(capability: int) -> None:
    check(capability, "bfloat16", "silu", 3, sums=False)


@pytest.mark.parametrize("d", [1, 3])
def test_what_is_launched_is_what_was_planned(d: int) -> None:
    """The compilations above name their constants; a launch gives them by position."""
    shape, dtype = (4096, 64), torch.float32
    stack = (4096, d * 64)
    form = [(sizes, (sizes[1], 1), dtype) for sizes in (shape, stack)]
    prepared = cascade_gradient._prepare(
        *form, (dtype, dtype, dtype), (d, 0, True), "tanh", -1, 1, False, 0
    )
    kernel = cascade_gradient._cascade_gradient_kernel
    given = prepared.launch._arguments
    found = dict(zip(kernel.arg_names[-len(given) :], given, strict=True))
    constants = {
        name: found[name]
        for name, p in zip(kernel.arg_names, kernel.params, strict=True)
        if p.is_constexpr
    }
    plan = cascade_gradient._plan(1, 4096, 64, d, 0, True)
    assert constants == {
        "D": d,
        "FROZEN": 0,
        "ACTIVATION": "tanh",
        "FAST": False,
        "HAS_BIAS": True,
        "SUMS": True,
        "GROUPED": False,
        "EVEN": 64 % plan.tile_neurons == 4096 % plan.tile_inner == 0,
        "STAGES": plan.stages,
        "TILE_N": plan.tile_neurons,
        "TILE_I": plan.tile_inner,
    }
