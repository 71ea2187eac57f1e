"""Launch a kernel again without asking Triton again which one it is.

For every launch Triton binds arguments, derives what to specialise on, and looks the compiled
kernel up, which costs several times what the launch does. A training step repeats the launches of
the step before: same sizes, same strides. `Launch` is one that its caller has prepared, pointers
aside, with the compiled kernel; launches of a `relaunched` kernel are repeated by `tape`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from pbfx_kernels import tape

# What Triton takes for granted of a pointer, or does not; torch's allocations are aligned to more.
_ALIGNMENT = 16


class Launch:
    """One kernel for one set of sizes, on one device.

    Args:
        kernel: a `triton.jit` function whose parameters are pointers, numbers, constants, in that
            order.
        grid: two numbers of programs.
        numbers: ints and floats, by position.
        constants: values of the `tl.constexpr` parameters, by position.
        warps: per program.
    """

    __slots__ = ("_again", "_arguments", "_compiled", "_grid", "_kernel", "_warps")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        warps: int,
    ) -> None:
        assert not isinstance(kernel, _Relaunched), "it would tell of its launches twice"
        self._kernel, self._grid, self._warps = kernel, (*grid, 1), warps
        self._arguments = (*numbers, *constants)
        self._again: Callable[..., object] | None = None
        self._compiled: Any = None

    def __call__(self, device: int, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the current device.

        Args:
            device: its index, always the same.
            tensors: the pointers, whose dtypes are always the same; None stays None.
        """
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer or 0
        aligned = not bits % _ALIGNMENT
        if aligned and self._again is not None:
            # As numbers: of a tensor the launcher asks the driver where it lies.
            stream = torch._C._cuda_getCurrentRawStream(device)
            self._again(*pointers, *self._arguments, stream=stream)
        else:
            compiled = self._kernel[self._grid](*tensors, *self._arguments, num_warps=self._warps)
            # The interpreter compiles nothing.
            if aligned and compiled is not None:
                self._compiled, self._again = compiled, compiled[self._grid]
        if tape.recording():
            tape.launched(self._compiled, self._grid, (*tensors, *self._arguments))


class Boxes:
    """Boxes of a tensor that a kernel loads by descriptor, checked when it is launched.

    Args:
        base: what is loaded from; its last axis is dense.
        shape: of the axes, up to five.
        strides: likewise, in elements.
        box: likewise, powers of two.
    """

    # What lies outside is loaded as zeros, and float32 as it is.
    padding, round_f32_to_tf32 = "zero", False
    __slots__ = ("base", "box", "shape", "strides")

    def __init__(
        self, base: Tensor, shape: Sequence[int], strides: Sequence[int], box: tuple[int, ...]
    ) -> None:
        self.base, self.shape, self.strides, self.box = base, tuple(shape), tuple(strides), box

    def placing(self) -> Callable[[int], object]:
        """Return what makes boxes like these at an address, for Triton's launcher."""
        return functools.partial(_Placed, self.shape, self.strides)

    def checked(self) -> TensorDescriptor:
        """Return it as Triton has it."""
        return TensorDescriptor(self.base, list(self.shape), list(self.strides), list(self.box))


class _Placed:
    """Boxes and, as their base, the address at which they lie."""

    padding, round_f32_to_tf32 = Boxes.padding, Boxes.round_f32_to_tf32
    __slots__ = ("address", "shape", "strides")

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], address: int) -> None:
        self.shape, self.strides, self.address = shape, strides, address

    @property
    def base(self) -> _Placed:
        return self

    def data_ptr(self) -> int:
        return self.address


def relaunched(function: Callable[..., object]) -> Any:
    """Do what `triton.jit` does, and tell tapes of launches: for kernels that programs launch."""
    return triton.jit(function) if knobs.runtime.interpret else _Relaunched(function)


class _Relaunched(JITFunction[Any]):
    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        plain = [arg.checked() if type(arg) is Boxes else arg for arg in args]
        compiled = super().run(*plain, grid=grid, warmup=warmup, **kwargs)
        if tape.recording() and not warmup:
            constants = [kwargs[name] for name in self.arg_names[len(args) :]]
            tape.launched(compiled, (*grid, *(1,) * (3 - len(grid))), (*args, *constants))
        return compiled


def boxes(
    base: Tensor, shape: Sequence[int], strides: Sequence[int], box: tuple[int, ...]
) -> Boxes | TensorDescriptor:
    """Describe boxes for a `relaunched` kernel; arguments as of `Boxes`."""
    described = Boxes(base, shape, strides, box)
    # The interpreter knows Triton's own alone.
    return described.checked() if knobs.runtime.interpret else described
