"""Uniform random numbers that are the same on every device, made where they are needed.

A generator of torch's gives other numbers on another device, so a seed would mean the CPU's only;
drawing 25 million weights there and moving them costs more than the rest of a restructure. Here
every number is a hash of its index, in 32-bit arithmetic that wraps alike everywhere.

Source of the hash: Wellons, "Prospecting for Hash Functions", nullprogram.com, 2018 (lowbias32).
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor

from pbfx.sites import Site

# As signed 32-bit numbers.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32
# Elements hashed at a time on a CPU: what several passes over find in the cache again.
_AT_A_TIME = 2**15
# Bits of a float32's fraction, so that every number is a multiple of 2⁻²⁴.
_BITS = 24


def uniform(shape: tuple[int, ...], seed: str, device: torch.device) -> Tensor:
    """Return float32 numbers, uniform in [0, 1), that depend on `shape` and `seed` only."""
    total = math.prod(shape)
    first, second = (zlib.crc32(f"{seed}/{part}".encode()) for part in (1, 2))
    if device.type == "cpu":
        # torch shifts integers one by one on a CPU: fifteen times slower.
        return torch.from_numpy(_on_cpu(total, first, second)).view(shape)
    return _on_device(total, first, second, device).view(shape)


def _on_cpu(total: int, first: int, second: int) -> np.ndarray:
    drawn = np.empty(total, dtype=np.float32)
    for start in range(0, total, _AT_A_TIME):
        bits = np.arange(start, min(start + _AT_A_TIME, total), dtype=np.uint32)
        bits ^= np.uint32(first)
        _mix_array(bits)
        bits += np.uint32(second)
        _mix_array(bits)
        bits >>= np.uint32(32 - _BITS)
        np.multiply(bits, np.float32(2.0**-_BITS), out=drawn[start : start + len(bits)])
    return drawn


def _mix_array(bits: np.ndarray) -> None:
    """Hash 32-bit numbers in place, one to one."""
    for shift, factor in ((16, _FIRST), (15, _SECOND), (16, 1)):
        bits ^= bits >> np.uint32(shift)
        if factor != 1:
            bits *= np.uint32(factor % 2**32)


def _on_device(total: int, first: int, second: int, device: torch.device) -> Tensor:
    bits = torch.arange(total, dtype=torch.int32, device=device).bitwise_xor_(_signed(first))
    # Twice, with a key before each: after one round two seeds give the same sequence from another
    # start on.
    bits = _mix(_mix(bits).add_(_signed(second)))
    # The shift drags the sign along.
    fractions = bits.bitwise_right_shift_(32 - _BITS).bitwise_and_(2**_BITS - 1)
    return fractions.to(torch.float32).mul_(2.0**-_BITS)


def _mix(bits: Tensor) -> Tensor:
    """Hash 32-bit numbers in place, one to one."""
    for shift, factor in ((16, _FIRST), (15, _SECOND), (16, 1)):
        # Logical, where torch shifts signed numbers arithmetically.
        bits.bitwise_xor_(bits.bitwise_right_shift(shift).bitwise_and_(2 ** (32 - shift) - 1))
        if factor != 1:
            bits.mul_(factor)
    return bits


def _signed(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number


def draw_weights(site: Site, like: Tensor, count: int, seed: str) -> tuple[Tensor, Tensor | None]:
    """Draw `count` sets of weights as torch initialises a fresh linear or conv layer,
    U(±1/sqrt(fan_in)).

    For a transposed convolution torch takes the fan-in of the convolution that it transposes; here
    it is what a neuron reads, so that preactivations have the same scale at every site.

    Args:
        site: for the shape, and whether to draw biases too.
        like: the soma's weight, for dtype and device.
        count: D or C.
        seed: names the draw; the same words give the same numbers on every machine.

    Returns:
        Weights (count, *site.shape), and biases (count, N) or None. torch's global streams are not
        touched.
    """

    def drawn(role: str, *shape: int) -> Tensor:
        if like.is_meta:
            return torch.empty(shape, dtype=like.dtype, device="meta")
        numbers = uniform(shape, f"{seed}/{role}", like.device)
        return numbers.mul_(2).sub_(1).div_(site.fan_in**0.5).to(like.dtype)

    weight = drawn("weight", count, *site.shape)
    return weight, drawn("bias", count, site.neurons) if site.biased else None
