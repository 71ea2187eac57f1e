"""Launches that are repeated: what tells one from another, and what Triton is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from pbfx_kernels import relaunch
from pbfx_kernels.relaunch import Boxes, boxes, relaunched


@relaunched
def _add_kernel(out, x, N, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < N) * SCALE, mask=at < N)


@relaunched
def _box_kernel(out, x, N, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.reshape(x.load([0, 0]), (BLOCK,)))


class Driver:
    """Stands for Triton: notes what is compiled and what is launched again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.again: list[tuple[Any, ...]] = []
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)

        def run(_: Any, *args: Any, grid: Any, warmup: bool, **__: Any) -> Driver:
            self.asked.append((grid, warmup, *args))
            return self

        monkeypatch.setattr(JITFunction, "run", run)
        for kernel in (_add_kernel, _box_kernel):
            monkeypatch.setattr(kernel, "_launches", {})

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, stream: int) -> None:
            self.again.append((grid, stream, *args))

        return launch


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def aligned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory that starts at a multiple of 16 bytes, whatever the allocator does."""
    count = torch.Size(shape).numel()
    memory = torch.zeros(count + 16, dtype=dtype)
    skip = -memory.data_ptr() % 16 // memory.element_size()
    return memory[skip : skip + count].view(shape)


def test_an_equal_launch_asks_triton_once(driver: Driver):
    x, y, out = aligned(8), aligned(8), aligned(8)
    _add_kernel[(3,)](out, x, 8, SCALE=2, BLOCK=8, num_warps=1)
    _add_kernel[(3,)](out, y, 8, SCALE=2, BLOCK=8, num_warps=1)
    assert driver.asked == [((3,), False, out, x, 8)]
    # Pointers, then numbers, then constants by their place in the signature, options not.
    assert driver.again == [((3, 1, 1), 7, out.data_ptr(), y.data_ptr(), 8, 2, 8)]


def test_whatever_is_no_pointer_makes_another_launch(driver: Driver):
    x, out = aligned(8), aligned(8)
    calls = [
        ((3,), (out, x, 8), {"SCALE": 2, "BLOCK": 8}),
        ((4,), (out, x, 8), {"SCALE": 2, "BLOCK": 8}),
        ((3,), (out, x, 7), {"SCALE": 2, "BLOCK": 8}),
        ((3,), (out, x, 8), {"SCALE": 3, "BLOCK": 8}),
        ((3,), (out, x, 8), {"SCALE": 2, "BLOCK": 8, "num_warps": 8}),
        ((3,), (out, aligned(8, dtype=torch.float16), 8), {"SCALE": 2, "BLOCK": 8}),
    ]
    for grid, args, constants in calls * 2:
        _add_kernel[grid](*args, **constants)
    assert len(driver.asked) == len(driver.again) == len(calls)


def test_an_unaligned_pointer_is_never_taken_for_an_aligned_one(driver: Driver):
    x, out = aligned(8), aligned(8)
    for tensor in (x, x[1:], x, x[1:]):
        _add_kernel[(1,)](out, tensor, 7, SCALE=2, BLOCK=8)
    assert [args[3].data_ptr() for args in driver.asked] == [
        tensor.data_ptr() for tensor in (x, x[1:], x[1:])
    ]
    assert [args[3] for args in driver.again] == [x.data_ptr()]


def test_warming_up_launches_nothing(driver: Driver):
    x, out = aligned(8), aligned(8)
    for _ in range(2):
        _add_kernel.warmup(out, x, 8, grid=(1,), SCALE=2, BLOCK=8)
    assert [warmup for _, warmup, *_ in driver.asked] == [True, True]
    assert not driver.again


def test_boxes_are_checked_when_new(driver: Driver):
    x, out = aligned(4, 8), aligned(8)
    for _ in range(2):
        _box_kernel[(1,)](out, boxes(x, x.shape, x.stride(), (1, 8)), 8, BLOCK=8)
    described = driver.asked[0][3]
    assert isinstance(described, relaunch.TensorDescriptor)
    assert (described.base is x, described.shape, described.strides) == (True, [4, 8], [8, 1])
    again = driver.again[0][3]
    assert isinstance(again, Boxes)
    assert (again.base is x, again.shape, again.strides) == (True, (4, 8), (8, 1))
    _box_kernel[(1,)](out, boxes(x, x.shape, x.stride(), (2, 8)), 8, BLOCK=8)
    assert len(driver.asked) == 2
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
