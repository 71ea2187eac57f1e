"""Launch a kernel again without asking Triton again which one it is.

For every launch Triton binds arguments, derives what to specialise on, and looks the compiled
kernel up, which costs several times what the launch does. A training step repeats the launches of
the step before: same sizes, same strides. So what a launch consists of, its pointers aside, is
prepared once and remembered by the caller, with the compiled kernel.
"""

from collections.abc import Callable
from typing import Any

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

    __slots__ = ("_again", "_arguments", "_first", "_warps")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        warps: int,
    ) -> None:
        full = (*grid, 1)
        self._arguments, self._warps = (*numbers, *constants), warps
        self._first = lambda *given, **options: (kernel[full](*given, **options), full)
        self._again: Callable[..., object] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current device and stream, which must always be the same device."""
        bits = 0
        for tensor in tensors:
            if tensor is not None:
                bits |= tensor.data_ptr()
        aligned = not bits % _ALIGNMENT
        if aligned and self._again is not None:
            self._again(*tensors, *self._arguments)
            return
        compiled, grid = self._first(*tensors, *self._arguments, num_warps=self._warps)
        # The interpreter compiles nothing.
        if aligned and compiled is not None:
            self._again = compiled[grid]
