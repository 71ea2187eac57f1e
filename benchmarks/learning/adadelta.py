"""Adadelta in one pass over memory, for the many small steps of a study.

torch steps all tensors with a dozen passes, each by few blocks: at MNIST's full width that takes as
long as the rest of the training step. Here one launch steps eight tensors,

    s ← ρ s + (1 - ρ) g²      Δ = g √(u + ε) / √(s + ε)      u ← ρ u + (1 - ρ) Δ²      p ← p - lr Δ

with the state of `torch.optim.Adadelta` and, up to rounding, its numbers. Floor: 28 bytes a
parameter.

Source: Zeiler, *ADADELTA*, arXiv 1212.5701.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim import Adadelta

# Tensors a launch. The last launch is filled up with empty ones, so that one kernel serves all.
TOGETHER = 8
BLOCK = 1024


class Slot(NamedTuple):
    """A tensor that is stepped, with its gradient and its state, all float32 and dense."""

    parameter: Tensor
    gradient: Tensor
    square: Tensor
    change: Tensor


class FusedAdadelta(Adadelta):
    """`torch.optim.Adadelta` with a rate on the device, stepped by one kernel.

    The state's `step`, on which nothing depends, stays 0.

    Raises:
        ValueError: at a step, for a setting that the kernel does not have.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self._sizes: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step every parameter that has a gradient."""
        for group in self.param_groups:
            if closure is not None or group["weight_decay"] or group["maximize"]:
                raise ValueError("FusedAdadelta takes no closure, weight decay or maximize")
            found: tuple[list[Tensor], ...] = ([], [], [], [], [])
            self._init_group(group, *found)
            slots_of_all = [_dense(Slot(*tensors)) for tensors in zip(*found[:4], strict=True)]
            for first in range(0, len(slots_of_all), TOGETHER):
                slots = slots_of_all[first : first + TOGETHER]
                step_(slots, self._sizes_of(slots), group["lr"], group["rho"], group["eps"])

    def _sizes_of(self, slots: Sequence[Slot]) -> Tensor:
        """Return the numbers of elements on the device, uploaded once: no graph could do it."""
        sizes = tuple(slot.parameter.numel() for slot in slots)
        if sizes not in self._sizes:
            whole = sizes + (0,) * (TOGETHER - len(sizes))
            self._sizes[sizes] = torch.tensor(whole, device=slots[0].parameter.device)
        return self._sizes[sizes]


def step_(slots: Sequence[Slot], sizes: Tensor, rate: Tensor, rho: float, eps: float) -> None:
    """Step at most `TOGETHER` tensors in one launch.

    Args:
        slots: parameters and states are edited in place.
        sizes: `(TOGETHER,)`, int64, numbers of elements; 0 beyond the slots.
        rate: `()`, float32, on the device.
        rho, eps: as in `torch.optim.Adadelta`.
    """
    blocks = sum(triton.cdiv(slot.parameter.numel(), BLOCK) for slot in slots)
    filled = [*slots, *[slots[0]] * (TOGETHER - len(slots))]
    launch: Any = _step_kernel
    if blocks:
        launch[(blocks,)](*zip(*filled, strict=True), sizes, rate, rho, eps, BLOCK)


def _dense(slot: Slot) -> Slot:
    """Return `slot` with its gradient laid out as the parameter is.

    Raises:
        ValueError: if a tensor is not float32, or its memory has gaps.
    """
    for tensor in (slot.parameter, slot.square, slot.change):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(
                f"FusedAdadelta steps contiguous float32 tensors, got {tensor.dtype} with strides "
                f"{tensor.stride()}; use torch.optim.Adadelta"
            )
    return slot._replace(gradient=slot.gradient.contiguous())


@triton.jit
def _step_kernel(
    parameters, gradients, squares, changes, sizes, rate, rho, eps, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    lr = tl.load(rate)
    # As many as `TOGETHER`; what a kernel reads of its module is compared at every launch.
    for i in tl.static_range(8):  # pyright: ignore[reportGeneralTypeIssues]
        size = tl.load(sizes + i).to(tl.int32)
        blocks = tl.cdiv(size, BLOCK)
        if (block >= 0) & (block < blocks):
            at = block * BLOCK + tl.arange(0, BLOCK)
            inside = at < size
            g = tl.load(gradients[i] + at, inside, 0.0)
            s = rho * tl.load(squares[i] + at, inside, 0.0) + (1 - rho) * g * g
            u = tl.load(changes[i] + at, inside, 0.0)
            delta = tl.div_rn(tl.sqrt_rn(u + eps), tl.sqrt_rn(s + eps)) * g
            p = tl.load(parameters[i] + at, inside, 0.0)
            tl.store(squares[i] + at, s, inside)
            tl.store(changes[i] + at, rho * u + (1 - rho) * delta * delta, inside)
            tl.store(parameters[i] + at, p - lr * delta, inside)
        block -= blocks
