"""Uniform random numbers that are the same on every device, made where they are needed.

A generator of torch's gives other numbers on another device, so a seed would mean the CPU's only;
drawing 25 million weights there and moving them costs more than the rest of a restructure. Here
every number is a hash of its index, in 32-bit arithmetic that wraps alike everywhere.

Source of the hash: Wellons, "Prospecting for Hash Functions", nullprogram.com, 2018 (lowbias32).
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

# As signed 32-bit numbers.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32
# Elements hashed at a time: what several passes over find in the cache again.
_AT_A_TIME = {"cpu": 2**16}
_MOST = 2**30
# Bits of a float32's fraction, so that every number is a multiple of 2⁻²⁴.
_BITS = 24


def uniform(shape: tuple[int, ...], seed: str, device: torch.device) -> Tensor:
    """Return float32 numbers, uniform in [0, 1), that depend on `shape` and `seed` only."""
    total = math.prod(shape)
    drawn = torch.empty(total, dtype=torch.float32, device=device)
    first, second = (_signed(zlib.crc32(f"{seed}/{part}".encode())) for part in (1, 2))
    each = _AT_A_TIME.get(device.type, _MOST)
    for start in range(0, total, each):
        bits = torch.arange(
            start, min(start + each, total), dtype=torch.int32, device=device
        ).bitwise_xor_(first)
        # Twice, with a key before each: after one round two seeds give the same sequence from
        # another start on.
        bits = _mix(_mix(bits).add_(second))
        # The shift drags the sign along.
        fractions = bits.bitwise_right_shift_(32 - _BITS).bitwise_and_(2**_BITS - 1)
        drawn[start : start + each] = fractions.to(torch.float32).mul_(2.0**-_BITS)
    return drawn.view(shape)


def _mix(bits: Tensor) -> Tensor:
    """Hash 32-bit numbers in place, one to one."""
    for shift, factor in ((16, _FIRST), (15, _SECOND), (16, 1)):
        # Logical, where torch shifts signed numbers arithmetically.
        moved = bits.bitwise_right_shift(shift).bitwise_and_(2 ** (32 - shift) - 1)
        bits.bitwise_xor_(moved)
        if factor != 1:
            bits.mul_(factor)
    return bits


def _signed(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number
