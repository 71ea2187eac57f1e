"""What is prepared once: by the form of tensors, launches by all but their pointers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels import relaunch
from pbfx_kernels.relaunch import Boxes, boxes, relaunched


def test_prepares_once_for_a_form():
    prepared: list[Any] = []

    def prepare(*arguments: Any) -> int:
        prepared.append(arguments)
        return len(prepared)

    recall = Recall(prepare)
    x = torch.zeros(2, 3)
    assert [recall((x, None), "tanh"), recall((torch.ones(2, 3), None), "tanh")] == [1, 1]
    others = [
        ((x.T, None), "tanh"),
        ((x.new_zeros(3, 2), None), "tanh"),
        ((x.double(), None), "tanh"),
        ((x.to("meta"), None), "tanh"),
        ((x, x), "tanh"),
        ((x, None), "relu"),
    ]
    assert [recall(*call) for call in others] == [2, 3, 4, 5, 6, 7]
    assert recall((x, None), "tanh") == 1


def test_a_failure_is_not_remembered():
    def prepare(*_: Any) -> None:
        raise ValueError("does not fit")

    recall = Recall(prepare)
    for _ in range(2):
        with pytest.raises(ValueError, match="does not fit"):
            recall((torch.zeros(1),))


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

        monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
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
    memory = torch.zeros(shape.count and torch.Size(shape).numel() + 16, dtype=dtype)
    skip = -memory.data_ptr() % 16 // memory.element_size()
    return memory[skip : skip + torch.Size(shape).numel()].view(shape)


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
    with pytest.raises(AssertionError, match="Last dimension must be contiguous"):
        _box_kernel[(1,)](out, boxes(x.T, x.T.shape, x.T.stride(), (1, 4)), 8, BLOCK=8)
    with pytest.raises(AssertionError, match="aligned"):
        odd = aligned(33)[1:].view(4, 8)
        _box_kernel[(1,)](out, boxes(odd, odd.shape, odd.stride(), (1, 8)), 8, BLOCK=8)


def test_boxes_have_what_tritons_launcher_reads():
    """It takes whatever says these of itself, of either version."""
    x = aligned(4, 8)
    ours, theirs = Boxes(x, x.shape, x.stride(), (1, 8)), None
    theirs = ours.checked()
    read = ("base", "shape", "strides", "padding", "round_f32_to_tf32")
    for name in (name for name in read if hasattr(theirs, name)):
        mine, triton_s = getattr(ours, name), getattr(theirs, name)
        assert mine is triton_s or tuple(mine) == tuple(triton_s), name
