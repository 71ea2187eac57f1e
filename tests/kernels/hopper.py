"""A Hopper GPU that computes nothing: choices, launches and tapes are as there, on a CPU.

A launch writes a digest of all that it is given to where it writes: its kernel's name, its grid,
its numbers, and what lies first at each of its pointers. So results are equal to the bit only if
the same launches were made, in an order that means the same, with the same memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from pbfx_kernels import launching
from pbfx_kernels import problem as problems
from pbfx_kernels.relaunch import TensorDescriptor
from pbfx_kernels.tape import Taped

STREAM = 7
# Parameters that a kernel writes to.
_WRITTEN = frozenset({"out", "kept", "rows", "partial", "sums", "of_links", "of_bias"})
# Kernels that read what another one has written there.
_READ = {"_finish_kernel": "partial", "_shares_kernel": "partial", "_added_kernel": "sums"}
# Bytes that lie at a pointer at least: four links in float32 are the smallest tensor of the tests.
_BYTES = 16


class Compiled:
    """A kernel as Triton has compiled it, which a launcher gives raw addresses.

    Args:
        kernel: the `triton.jit` function.
        pointers: its parameters that are tensors or boxes.
        gpu: where it is launched.
    """

    function, packed_metadata = 17, (4, 1, 0)

    def __init__(self, kernel: Any, pointers: frozenset[str], gpu: Hopper) -> None:
        self._kernel, self._pointers, self._gpu = kernel, pointers, gpu

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, stream: self.work(grid, stream, args)

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        """Take what Triton's launcher takes."""
        function, packed, *hooks = rest[:5]
        assert (function, packed, hooks) == (17, (4, 1, 0), [None, None, None])
        self.work((x, y, z), stream, rest[5:])

    def work(self, grid: tuple[int, ...], stream: int, arguments: Sequence[Any]) -> None:
        """Write the digest."""
        name, names = self._kernel.__name__, self._kernel.arg_names
        assert (stream, len(arguments)) == (STREAM, len(names))
        assert not any(isinstance(argument, Tensor) for argument in arguments)
        given = dict(zip(names, map(_pointed, arguments), strict=True))
        pointers = {key: at for key, at in given.items() if key in self._pointers and at[0]}
        written = [pointers[key][0] for key in pointers if key in _WRITTEN - {_READ.get(name)}]
        digest = hashlib.sha256(f"{name} {grid}".encode())
        for parameter, argument in zip(names, arguments, strict=True):
            address, form = pointers.get(parameter, (0, argument))
            digest.update(f"{parameter} {form}".encode())
            # A pointer has to be one, so where there is nothing to read it may be the output's.
            if address and address not in written:
                digest.update(ctypes.string_at(address, _BYTES))
        assert written, f"{name} writes nowhere"
        for index, address in enumerate(dict.fromkeys(written)):
            found = hashlib.sha256(digest.digest() + bytes([index])).digest()
            # Finite in every dtype.
            ctypes.memmove(address, bytes(b for byte in found[:8] for b in (byte, 0x3F)), _BYTES)
        self._gpu.launches.append(name)


def _pointed(argument: Any) -> tuple[int, object]:
    """Return the address that an argument is or has, and what else it is."""
    if hasattr(argument, "padding"):
        return argument.base.data_ptr(), (tuple(argument.shape), tuple(argument.strides))
    return (argument, None) if isinstance(argument, int) else (0, None)


class Hopper:
    """The GPU; bodies that run on CPUs run on it from now on.

    Attributes:
        launches: names of the kernels that were launched.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[str] = []
        self._compiled: dict[Any, Compiled] = {}
        problem, gpu = problems.Problem, self

        def run(kernel: Any, *args: Any, **options: Any) -> Compiled:
            return gpu.run(kernel, *args, **options)

        monkeypatch.setattr(
            problems, "Problem", lambda _, __, *rest: problem("cuda", (9, 0), *rest)
        )
        monkeypatch.setattr(JITFunction, "run", run)
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True), raising=False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
        monkeypatch.setattr(launching, "_multiprocessors", lambda _: 132)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: STREAM, raising=False)
        for taped in tapes():
            monkeypatch.setattr(taped, "_devices", ("cpu",))

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Compiled:
        """Launch as `triton.jit` does."""
        assert not warmup
        rest = [options[name] for name in kernel.arg_names[len(args) :]]
        pointers = [isinstance(arg, (Tensor, TensorDescriptor)) for arg in args]
        named = frozenset(itertools.compress(kernel.arg_names, pointers))
        compiled = self._compiled.setdefault((kernel, named), Compiled(kernel, named, self))
        plain = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
        compiled.work((*grid, *(1,) * (3 - len(grid))), STREAM, [*plain, *rest])
        return compiled


def tapes() -> Iterator[Taped]:
    """Yield every body of the package that may be taped."""
    bodies = (v for m in _modules() for v in vars(m).values() if isinstance(v, Taped))
    yield from {id(body): body for body in bodies}.values()


def forget() -> None:
    """Forget what was recorded, and what was prepared on another GPU."""
    for taped in tapes():
        taped._tapes.clear()
    for module in _modules():
        for name in ("_prepare", "_problem_of_sum"):
            if hasattr(module, name):
                getattr(module, name).cache_clear()


def _modules() -> list[Any]:
    return [module for name, module in sys.modules.items() if name.startswith("pbfx_kernels.")]
