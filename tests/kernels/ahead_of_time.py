"""Compile kernels for a GPU that is not there, and read what the assembler says of them."""

import inspect
import re
import subprocess
from collections.abc import Mapping
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
_LINKS = ("bias", "to_soma", "to_dendrite", "partial")


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs of a multiprocessor, per thread and per program."""

    registers: int
    stack: int
    shared: int
    ptx: str = field(repr=False)


def compile_kernel(
    kernel: Any,
    capability: int,
    dtype: str,
    constants: Mapping[str, object],
    folder: Path,
    warps: int = 4,
    stages: int = 3,
) -> Compiled:
    """Compile `kernel` as for aligned tensors with contiguous last axes.

    Args:
        kernel: a `triton.jit` function.
        capability: such as 90.
        dtype: of the data, such as `bf16`.
        constants: values of its constexpr parameters, and of others that are known to be 1.
        folder: for the assembler's output.
        warps: per program.
        stages: of the software pipeline.
    """
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    found: dict[tuple[int, ...], object] = {}
    for i, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in constants:
            signature[name] = "constexpr"
            found[(i,)] = constants[name]
            continue
        if name in _DATA:
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "*fp32" if name in _LINKS else "i32"
        attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, found, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [_CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = (int(re.findall(rf"{what}:(\d+)", usage)[-1]) for what in ("REG", "STACK"))
    return Compiled(registers, stack, compiled.metadata.shared, compiled.asm["ptx"])
