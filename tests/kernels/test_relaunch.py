"""Kernels that tell of their launches, and boxes that their launchers are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from pbfx_kernels import tape
from pbfx_kernels.relaunch import Boxes, Launch, TensorDescriptor, boxes, relaunched


@relaunched
def _add_kernel(out, x, N, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < N) * SCALE, mask=at < N)


@relaunched
def _box_kernel(out, x, N, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.reshape(x.load([0, 0]), (BLOCK,)))


@triton.jit
def _plain_kernel(out, x, N, SCALE: tl.constexpr):
    tl.store(out, tl.load(x) * SCALE * N)


class Driver:
    """Stands for Triton, and for who records: notes what both are told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.again: list[tuple[Any, ...]] = []
        self.told: list[tuple[Any, ...]] = []
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)
        monkeypatch.setattr(tape, "recording", lambda: True)
        monkeypatch.setattr(tape, "launched", lambda *told: self.told.append(told))

        def run(_: Any, *args: Any, grid: Any, warmup: bool, **__: Any) -> Driver:
            self.asked.append((grid, warmup, *args))
            return self

        monkeypatch.setattr(JITFunction, "run", run)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, stream: self.again.append((grid, stream, *args))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def aligned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory that starts at a multiple of 16 bytes, whatever the allocator does."""
    count = torch.Size(shape).numel()
    memory = torch.zeros(count + 16, dtype=dtype)
    skip = -memory.data_ptr() % 16 // memory.element_size()
    return memory[skip : skip + count].view(shape)


def test_a_launch_is_told_with_constants_in_their_place(driver: Driver):
    x, out = aligned(8), aligned(8)
    _add_kernel[(3,)](out, x, 8, BLOCK=8, SCALE=2, num_warps=1)
    assert driver.asked == [((3,), False, out, x, 8)]
    assert driver.told == [(driver, (3, 1, 1), (out, x, 8, 2, 8))]


def test_warming_up_is_not_told(driver: Driver):
    x, out = aligned(8), aligned(8)
    _add_kernel.warmup(out, x, 8, grid=(1,), SCALE=2, BLOCK=8)
    assert [warmup for _, warmup, *_ in driver.asked] == [True]
    assert not driver.told


def test_a_prepared_launch_is_told_first_and_again(driver: Driver):
    launch = Launch(_plain_kernel, (3, 2), (8,), (2,), 1)
    x, out = aligned(8), aligned(8)
    told = (driver, (3, 2, 1), (out, x, 8, 2))
    launch(0, out, x)
    assert driver.told == [told]
    launch(0, out, x)
    assert driver.again == [((3, 2, 1), 7, out.data_ptr(), x.data_ptr(), 8, 2)]
    assert driver.told == [told, told]
    with pytest.raises(AssertionError, match="twice"):
        Launch(_add_kernel, (3, 2), (8,), (2, 8), 1)


def test_a_launch_that_was_never_aligned_cannot_be_told(driver: Driver):
    launch = Launch(_plain_kernel, (1, 1), (8,), (2,), 1)
    launch(0, aligned(8), aligned(9)[1:])
    assert [compiled for compiled, *_ in driver.told] == [None]


def test_boxes_are_checked_when_they_are_launched(driver: Driver):
    x, out = aligned(4, 8), aligned(8)
    given = boxes(x, x.shape, x.stride(), (1, 8))
    _box_kernel[(1,)](out, given, 8, BLOCK=8)
    described = driver.asked[0][3]
    assert isinstance(described, TensorDescriptor)
    assert (described.base is x, described.shape, described.strides) == (True, [4, 8], [8, 1])
    assert described.block_shape == [1, 8]
    assert driver.told[0][2][1] is given
    with pytest.raises(AssertionError, match="strides must be 16-byte aligned"):
        _box_kernel[(1,)](out, boxes(x.T, x.T.shape, x.T.stride(), (1, 4)), 8, BLOCK=8)
    odd = aligned(33)[1:].view(4, 8)
    with pytest.raises(AssertionError, match="base must be 16-byte aligned"):
        _box_kernel[(1,)](out, boxes(odd, odd.shape, odd.stride(), (1, 8)), 8, BLOCK=8)


def test_boxes_have_what_tritons_launcher_reads():
    """It takes whatever says these of itself, of either version."""
    x = aligned(4, 8)
    ours = Boxes(x, x.shape, x.stride(), (1, 8))
    theirs = ours.checked()
    for named in (ours, ours.placing()(x.data_ptr())):
        assert named.base.data_ptr() == theirs.base.data_ptr()
        assert [*named.shape, *named.strides] == [*theirs.shape, *theirs.strides]
        for option in ("padding", "round_f32_to_tf32"):
            # Triton of torch 2.11 has one of them.
            default = getattr(ours, option)
            assert getattr(named, option) == getattr(theirs, option, default)
