"""Small things that every launcher needs."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Of a GPU that nobody asked about: kernels then get a grid that fits many.
_MULTIPROCESSORS = 128
_HERE = nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of `tensor` current where it is not: Triton launches on the current one."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _HERE


def multiprocessors(tensor: Tensor) -> int:
    """Return how many multiprocessors the device of `tensor` has; a guess where there are none."""
    return _multiprocessors(tensor.get_device()) if tensor.is_cuda else _MULTIPROCESSORS


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below `number`, which is positive."""
    return 1 << (number - 1).bit_length()


def ceiling(number: int, divisor: int) -> int:
    """Divide two positive integers and round up."""
    return -(-number // divisor)


def fast_activations(soma: Tensor) -> bool:
    """Return whether the hardware's tanh is exact enough; see `triton_math.activate`."""
    return soma.dtype is torch.bfloat16 and soma.is_cuda
