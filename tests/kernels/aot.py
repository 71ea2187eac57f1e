"""Compile kernels for GPUs that are not there, and read what ptxas made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90)


def compiled(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int, warps: int
) -> Any:
    """Compile `kernel` ahead of time.

    Args:
        kernel: a `triton.jit` function.
        types: the type of each argument that is not a constant, such as `*fp32` or `i32`. Pointers
            are taken to be aligned to 16 bytes, as torch's allocations are.
        constants: the values of the rest; arguments that are specialised to 1 belong here too.
        capability: 80 or 90.
        warps: per program.
    """
    names = kernel.arg_names
    assert set(names) == set(types) | set(constants), set(names) ^ (set(types) | set(constants))
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*")
    }
    source = ASTSource(kernel, signature, dict(constants), attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )


def local_bytes(kernel: Any) -> int:
    """Return the bytes of local memory per thread: what ptxas spilled, and arrays on the stack."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    return int(found[2]) + int(found[4])
