"""Compile kernels for GPUs that are not there, and read what the assembler says of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Of the dtype under test; everything else that is a pointer holds float32.
_DATA = ("out", "kept", "soma", "x", "z", "weight", "grad", "activations")
_LINKS = ("bias", "to_soma", "to_dendrite", "partial", "weights", "soma_bias")


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs: registers, bytes of stack and of local memory per thread, and bytes of
    shared memory per program. What ptxas spills lies on the stack or in local memory."""

    registers: int
    stack: int
    local: int
    shared: int
    ptx: str = field(repr=False)


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    aligned: Container[str] = (),
    warps: int = 4,
    stages: int = 3,
) -> Compiled:
    """Compile `kernel` ahead of time.

    Args:
        kernel: a `triton.jit` function.
        types: the type of each argument that is not a constant, such as `*fp32` or `i32`. Pointers
            are taken to be aligned to 16 bytes, as torch's allocations are.
        constants: the values of the rest; arguments that are specialised to 1 belong here too.
        capability: such as 90.
        aligned: whole numbers that are multiples of 16.
        warps: per program.
        stages: of the software pipeline.
    """
    names = kernel.arg_names
    assert set(names) == set(types) | set(constants), set(names) ^ (set(types) | set(constants))
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") or (kind == "i32" and name in aligned)
    }
    compiled = triton.compile(
        ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in names},
            {(names.index(name),): value for name, value in constants.items()},
            attributes,
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage = subprocess.run(
            [_CUOBJDUMP, "-res-usage", binary.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.findall(rf"{what}:(\d+)", usage)[-1]) for what in ("REG", "STACK", "LOCAL")
    )
    return Compiled(registers, stack, local, compiled.metadata.shared, compiled.asm["ptx"])


def compile_for_dtype(
    kernel: Any,
    capability: int,
    dtype: str,
    constants: Mapping[str, Any],
    warps: int = 4,
    stages: int = 3,
) -> Compiled:
    """Compile a kernel over dendrites, as for aligned tensors with contiguous last axes.

    Args:
        kernel: a `triton.jit` function whose pointers are called as usual in this package.
        capability: such as 90.
        dtype: of the data, such as `bf16`.
        constants: values of its constexpr parameters, and of others that are known to be 1.
        warps: per program.
        stages: of the software pipeline.
    """
    types = {
        name: f"*{dtype}" if name in _DATA else "*fp32" if name in _LINKS else "i32"
        for name in kernel.arg_names
        if name not in constants
    }
    return compile_kernel(kernel, types, constants, capability, types, warps, stages)
