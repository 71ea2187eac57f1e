"""Launch a kernel again without asking Triton again which one it is.

For every launch Triton binds arguments, derives what to specialise on, and looks the compiled
kernel up, which costs several times what the launch does. A training step repeats the launches of
the step before: same sizes, same strides. So what a launch consists of, its pointers aside, is
prepared once and remembered by the caller, with the compiled kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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

    __slots__ = ("_again", "_arguments", "_grid", "_kernel", "_warps")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        warps: int,
    ) -> None:
        self._kernel, self._grid, self._warps = kernel, (*grid, 1), warps
        self._arguments = (*numbers, *constants)
        self._again: Callable[..., object] | None = None

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
            return
        compiled = self._kernel[self._grid](*tensors, *self._arguments, num_warps=self._warps)
        # The interpreter compiles nothing.
        if aligned and compiled is not None:
            self._again = compiled[self._grid]
