"""Uniform random numbers that are the same on every device, made where they are needed.

A generator of torch's gives other numbers on another device, so a seed would mean the CPU's only;
drawing 25 million weights there and moving them costs more than the rest of a restructure. Here
every number is a hash of its index, in 32-bit arithmetic that wraps alike everywhere.

Source of the hash: Wellons, "Prospecting for Hash Functions", nullprogram.com, 2018 (lowbias32).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbfx.sites import Site

# As signed 32-bit numbers.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32
# Elements hashed at a time on a CPU: what several passes over find in the cache again.
_AT_A_TIME = 2**15
# Numbers drawn at once on a device: each takes 12 bytes on the way.
_MOST_AT_ONCE = 2**25
# Bits of a float32's fraction, so that every number is a multiple of 2⁻²⁴.
_BITS = 24


def uniform(shape: tuple[int, ...], seed: str, device: torch.device) -> Tensor:
    """Return float32 numbers, uniform in [0, 1), that depend on `shape` and `seed` only."""
    return _uniforms([(shape, seed)], device)[0]


def _has_own_memory(device: torch.device) -> bool:
    """Return whether numbers drawn together on `device` lie apart from each other."""
    return device.type == "cpu"


def _uniforms(wanted: Sequence[tuple[tuple[int, ...], str]], device: torch.device) -> list[Tensor]:
    """Return what `uniform` does for each shape and seed; except on a CPU they share memory."""
    totals = [math.prod(shape) for shape, _ in wanted]
    keys = [[zlib.crc32(f"{seed}/{part}".encode()) for part in (1, 2)] for _, seed in wanted]
    if _has_own_memory(device):
        # torch shifts integers one by one on a CPU: fifteen times slower.
        drawn = (torch.from_numpy(_on_cpu(n, *key)) for n, key in zip(totals, keys, strict=True))
    else:
        drawn = _on_device(totals, keys, device).split(totals)
    return [numbers.view(shape) for numbers, (shape, _) in zip(drawn, wanted, strict=True)]


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


def _on_device(totals: list[int], keys: list[list[int]], device: torch.device) -> Tensor:
    """Return all the numbers in a row: one launch for each step of the hash, not for each site."""
    bits = torch.arange(sum(totals), dtype=torch.int32, device=device)
    parts = bits.split(totals)
    _foreach_sub_(parts, list(itertools.accumulate(totals[:-1], initial=0)))
    # Sums of numbers and lists are one launch for many parts; of an exclusive or there is none.
    firsts = torch.zeros_like(bits)
    _foreach_add_(firsts.split(totals), [_signed(first) for first, _ in keys])
    bits.bitwise_xor_(firsts)
    del firsts
    _mix(bits)
    # Twice, with a key before each: after one round two seeds give the same sequence from another
    # start on.
    _foreach_add_(parts, [_signed(second) for _, second in keys])
    # The shift drags the sign along.
    fractions = _mix(bits).bitwise_right_shift_(32 - _BITS).bitwise_and_(2**_BITS - 1)
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


@dataclasses.dataclass(frozen=True)
class Draw:
    """What to draw for a site.

    Attributes:
        site: for the shape, and whether to draw biases too.
        like: the soma's weight, for dtype and device.
        count: D or C.
        seed: names the draw; the same words give the same numbers on every machine.
    """

    site: Site
    like: Tensor
    count: int
    seed: str

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str, Draw]]:
        """Yield shape and seed of each tensor, and this."""
        yield (self.count, *self.site.shape), f"{self.seed}/weight", self
        if self.site.biased:
            yield (self.count, self.site.neurons), f"{self.seed}/bias", self


def draw_weights(draws: Sequence[Draw]) -> list[tuple[Tensor, Tensor | None]]:
    """Draw sets of weights as torch initialises fresh linear or conv layers, U(±1/sqrt(fan_in)).

    For a transposed convolution torch takes the fan-in of the convolution that it transposes; here
    it is what a neuron reads, so that preactivations have the same scale at every site.

    Returns:
        For each draw weights (count, *site.shape), and biases (count, N) or None, in memory of
        their own. torch's global streams are not touched.
    """
    wanted = [tensor for draw in draws for tensor in draw.tensors()]
    batches: dict[torch.device, list[list[int]]] = {}
    taken: dict[torch.device, int] = {}
    for index, (shape, _, draw) in enumerate(wanted):
        device, size = draw.like.device, math.prod(shape)
        together = batches.setdefault(device, [])
        if not together or taken[device] + size > _MOST_AT_ONCE:
            together.append([])
            taken[device] = 0
        together[-1].append(index)
        taken[device] += size
    drawn: dict[int, Tensor] = {}
    for device, lists in batches.items():
        for indices in lists:
            drawn |= zip(indices, _drawn([wanted[i] for i in indices], device), strict=True)
    inorder = (drawn[index] for index in range(len(wanted)))
    return [(next(inorder), next(inorder) if draw.site.biased else None) for draw in draws]


def _drawn(
    wanted: Sequence[tuple[tuple[int, ...], str, Draw]], device: torch.device
) -> list[Tensor]:
    if device.type == "meta":
        return [torch.empty(shape, dtype=d.like.dtype, device=device) for shape, _, d in wanted]
    numbers = _uniforms([(shape, seed) for shape, seed, _ in wanted], device)
    scales = [draw.site.fan_in**0.5 for *_, draw in wanted]
    _foreach_mul_(numbers, 2.0)
    _foreach_sub_(numbers, 1.0)
    if _has_own_memory(device):
        _foreach_div_(numbers, scales)
    else:
        numbers = _foreach_div(numbers, scales)
    return [n.to(draw.like.dtype) for n, (*_, draw) in zip(numbers, wanted, strict=True)]


# They have no public names.
_foreach_add_: Any = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
_foreach_sub_: Any = torch._foreach_sub_  # pyright: ignore[reportPrivateImportUsage]
_foreach_mul_: Any = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
_foreach_div_: Any = torch._foreach_div_  # pyright: ignore[reportPrivateImportUsage]
_foreach_div: Any = torch._foreach_div  # pyright: ignore[reportPrivateImportUsage]
