"""Calls that are played again: what a tape holds, when there is one, and when there is none."""

from __future__ import annotations

import ast
import ctypes
import dis
import gc
import logging
import math
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pbfx_kernels
from pbfx_kernels import measured, tape
from pbfx_kernels.relaunch import Boxes
from pbfx_kernels.tape import Taped, launched

UNKNOWN = torch.ones(4)
PACKAGE = Path(pbfx_kernels.__file__).parent


class Counted(TorchDispatchMode):
    """Notes the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class Kernel:
    """Stands for a compiled kernel whose launches write where its pointers say."""

    function, packed_metadata = 17, (4, 1, 0)

    def __init__(self, work: Callable[..., None]) -> None:
        self.work = work
        self.grids: list[tuple[int, ...]] = []

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        function, packed, *hooks = rest[:5]
        assert (stream, function, packed, hooks) == (7, 17, (4, 1, 0), [None, None, None])
        self.grids.append((x, y, z))
        self.work(*rest[5:])

    def launch(self, *arguments: Any) -> None:
        """Do as `relaunch` does: launch, then tell."""
        grid = (2, 3, 1)
        plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        self.run(*grid, 7, self.function, self.packed_metadata, None, None, None, *plain)
        launched(self, grid, arguments)


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)


def at(address: int, *shape: int) -> numpy.ndarray:
    """Return the float32 that lie at an address: no tensor, as no kernel has any."""
    count = math.prod(shape)
    memory = (ctypes.c_float * count).from_address(address)
    return numpy.frombuffer(memory, numpy.float32).reshape(shape)


def taped(body: Callable[..., Any]) -> tuple[Taped, list[Any]]:
    """Return `body` for tensors on CPUs, and a list that grows with each of its calls."""
    calls: list[Any] = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return body(*arguments)

    return Taped(counted, devices=("cpu",)), calls


def test_the_third_call_is_played():
    play, calls = taped(lambda x, y, scale: (x.relu() @ y.T) * scale)
    for count, seed in ((1, 0), (2, 1), (2, 2), (2, 3)):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(3, 4, generator=generator), torch.randn(2, 4, generator=generator)
        assert torch.equal(play((x, y), 3.0), (x.relu() @ y.T) * 3.0)
        assert len(calls) == count


def test_whatever_a_body_may_decide_by_has_a_tape_of_its_own():
    play, calls = taped(lambda x, y, word: x * 2 if word == "twice" else x * 3)
    x = torch.ones(4, 2)
    forms = [
        ((x, None), "twice"),
        ((x, None), "thrice"),
        ((x, x.clone()), "twice"),
        ((x.double(), None), "twice"),
        ((torch.ones(2, 4).T, None), "twice"),
        ((torch.ones(4, 3), None), "twice"),
    ]
    for _ in range(3):
        for tensors, word in forms:
            assert torch.equal(play(tensors, word), tensors[0] * (2 if word == "twice" else 3))
    assert len(calls) == 2 * len(forms)


def test_launches_get_the_pointers_of_each_call():
    def add(out: int, x: int, row: int, nothing: int, scale: int, mode: str, none: None) -> None:
        assert (nothing, mode, none) == (0, "add", None)
        at(out, 4, 4)[:] = scale * at(x, 4, 4) + at(row, 4)

    kernel = Kernel(add)

    def body(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(x)
        # A pointer into the middle of an argument.
        kernel.launch(out, x, rows[2], x[:0].clone(), 3, "add", None)
        return out, x.new_empty(0, 4)

    play, calls = taped(body)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x, rows = (torch.randn(4, 4, generator=generator) for _ in range(2))
        out, empty = play((x, rows))
        assert torch.equal(out, 3 * x + rows[2])
        assert empty.shape == (0, 4)
    assert len(calls) == 2
    assert kernel.grids == [(2, 3, 1)] * 5


def test_boxes_move_with_their_tensor():
    def check(out: int, boxes: Any) -> None:
        assert (boxes.shape, boxes.strides, boxes.padding) == ((4, 4), (4, 1), "zero")
        at(out, 4, 4)[:] = at(boxes.base.data_ptr(), 4, 4)

    kernel = Kernel(check)

    def body(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        kernel.launch(out, Boxes(x, x.shape, x.stride(), (1, 4)))
        return out

    play, calls = taped(body)
    for seed in range(4):
        x = torch.full((4, 4), float(seed))
        assert torch.equal(play((x,)), x)
    assert len(calls) == 2


def test_views_are_not_played_and_memory_is_let_go():
    def body(x: Tensor) -> Tensor:
        first = x.flatten() + 1
        second = first.view(2, 2).T[0].exp()
        unused = x.new_empty(1000)
        return second.sum() + unused.numel()

    play, _ = taped(body)
    x = torch.arange(4.0).view(2, 2)
    expected = body(x)
    for _ in range(2):
        play((x,))
    with Counted() as counted:
        found = play((x,))
    assert torch.equal(found, expected)
    names = [name.split(".")[1] for name in counted.ops]
    assert [name for name in names if name != "as_strided"] == ["add", "exp", "sum", "add"]
    (played,) = [tape for tape in play._tapes.values() if callable(tape)]
    names = [instruction.opname for instruction in dis.get_instructions(played)]
    # Of four results one is returned, and the memory that nobody used is not asked for.
    assert names.count("DELETE_FAST") == 3


def test_a_tape_holds_no_tensors():
    play = Taped(lambda x, y: (x + y).exp(), devices=("cpu",))
    x, y = torch.ones(3), torch.ones(3)
    for _ in range(3):
        play((x, y))
    seen = [weakref.ref(x), weakref.ref(y)]
    del x, y
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_writing_in_place_is_played():
    def body(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_strided((2, 3), (1, 2))
        out.copy_(x)
        out[1].add_(y)
        return out

    play, calls = taped(body)
    for seed in range(4):
        x, y = torch.full((2, 3), float(seed)), torch.arange(3.0)
        assert torch.equal(play((x, y)), body(x, y))
        assert play((x, y)).stride() == (1, 2)
    assert len(calls) == 2


def test_lists_of_tensors_and_parts_of_results():
    def body(x: Tensor) -> tuple[Tensor, None, Tensor]:
        stacked = torch.stack([x, x * 2])
        _, at = stacked.max(0)
        return stacked[1], None, (stacked.sum(0) * at)[:2]

    play, calls = taped(body)
    for seed in range(4):
        x = torch.arange(3.0) + seed
        first, none, last = play((x,))
        assert none is None
        assert torch.equal(first, 2 * x)
        assert torch.equal(last, 3 * x[:2])
    assert len(calls) == 2


def test_products_keep_their_dtype_under_autocast():
    def body(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x @ y

    play, calls = taped(body)
    x, y = torch.randn(3, 3), torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            assert torch.equal(play((x, y)), body(x, y))
    assert play((x, y)).dtype is torch.float32
    assert len(calls) == 2


def odd(x: Tensor) -> Tensor:
    """Return a copy that starts four bytes past a multiple of 16."""
    memory = torch.empty(x.numel() + 8)
    skip = (4 - memory.data_ptr() % 16) % 16 // 4
    return memory[skip : skip + x.numel()].view(x.shape).copy_(x)


def test_pointers_that_are_not_aligned_are_not_for_a_tape():
    def double(out: int, x: int) -> None:
        at(out, 4)[:] = 2 * at(x, 4)

    kernel = Kernel(double)

    def body(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        kernel.launch(out, x)
        return out

    x = torch.arange(4.0)
    play, calls = taped(body)
    for _ in range(3):
        play((x,))
    assert len(calls) == 2
    assert torch.equal(play((odd(x),)), 2 * x)
    assert len(calls) == 3
    # Nor is a tape made of one.
    play, calls = taped(body)
    for count in range(1, 5):
        assert torch.equal(play((odd(x),)), 2 * x)
        assert len(calls) == count


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda x, y: x, "it returns tensor 0"),
        (lambda x, y: x[1:], "it returns tensor 0"),
        (
            lambda x, y: torch.empty_like(x, dtype=torch.int32).view(torch.float32).copy_(x + y),
            "memory of form (3,) belongs to nobody",
        ),
        (lambda x, y: x + y if x.sum().item() > 0 else x - y, "Python reads what aten._local"),
        (lambda x, y: launched(None, (1,), ()) or x + y, "a launch was interpreted"),
        (
            lambda x, y: launched(Kernel(print), (1, 1, 1), (UNKNOWN,)) or x + y,
            "memory of form (4,) belongs to nobody",
        ),
    ],
    ids=["argument", "part", "dtype", "read", "interpreted", "unknown"],
)
def test_what_cannot_be_told_is_not_recorded(
    body: Callable[..., Tensor], why: str, caplog: pytest.LogCaptureFixture
):
    play, calls = taped(body)
    x, y = torch.arange(3.0), torch.ones(3)
    with caplog.at_level(logging.DEBUG, "pbfx_kernels.tape"):
        for count in range(1, 5):
            assert torch.equal(play((x, y)), body(x, y))
            assert len(calls) == count
    (message,) = caplog.messages
    assert f"of (3,), (3,) is not played: {why}" in message


def test_the_log_says_what_is_played(caplog: pytest.LogCaptureFixture):
    def add(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    play = Taped(add, devices=("cpu",))
    with caplog.at_level(logging.DEBUG, "pbfx_kernels.tape"):
        for size in (2, 3):
            for _ in range(4):
                play((torch.ones(size), torch.ones(size)))
    says = "add of ({0},), ({0},) is played from now on"
    assert [message.rpartition(".")[2] for message in caplog.messages] == [
        says.format(2),
        says.format(3),
    ]


def test_tensors_may_be_parts_of_one_memory():
    """As parameters are that somebody has flattened."""

    def subtract(out: int, x: int, y: int) -> None:
        at(out, 4)[:] = at(x, 4) - at(y, 4)

    kernel = Kernel(subtract)

    def body(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        kernel.launch(out, x, y)
        return out * y[1:].sum()

    play, calls = taped(body)
    for seed in range(4):
        flat = torch.arange(16.0) * (seed + 1)
        x, y = flat[:4], flat[8:12]
        assert torch.equal(play((x, y)), (x - y) * y[1:].sum())
    assert len(calls) == 2
    x, y = torch.ones(4), torch.full((4,), 2.0)
    assert torch.equal(play((x, y)), (x - y) * 6)
    assert len(calls) == 2


def test_tensors_that_overlap_are_not_recorded():
    play, calls = taped(lambda x, y: x * y)
    x = torch.arange(8.0)
    for count in range(1, 5):
        assert torch.equal(play((x, x)), x * x)
        assert len(calls) == count


def test_memory_that_is_used_again_is_not_mistaken():
    """What the body lets go of, the allocator gives to the next: at the same address."""

    def body(x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for part in x:
            total = total + (part * part.sum()).sum()
        return total

    play, calls = taped(body)
    for seed in range(4):
        x = torch.arange(4000.0).view(4, 1000) * seed
        assert torch.equal(play((x,)), body(x))
    assert len(calls) == 2


def test_recording_keeps_nothing_alive():
    seen: list[weakref.ref[Tensor]] = []

    def body(x: Tensor) -> Tensor:
        first = x + 1
        second = first * 2
        seen.append(weakref.ref(first))
        del first
        alive.append(seen[-1]() is not None)
        return second

    alive: list[bool] = []
    play, _ = taped(body)
    for _ in range(3):
        play((torch.ones(3),))
    assert alive == [False, False]


def test_measuring_plays_nothing():
    play, calls = taped(lambda x: x + 1)
    x = torch.ones(2)
    for _ in range(3):
        play((x,))
    with measured.measure(new=False):
        play((x,))
    assert len(calls) == 3


def test_a_process_that_measures_records_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(measured.SWITCH, "1")
    play, calls = taped(lambda x: x + 1)
    for count in range(1, 5):
        assert torch.equal(play((torch.ones(2),)), torch.full((2,), 2.0))
        assert len(calls) == count


def test_other_devices_play_nothing():
    calls: list[Any] = []
    play = Taped(lambda x: calls.append(x) or x + 1)
    for _ in range(4):
        play((torch.ones(2),))
    assert len(calls) == 4


def test_a_body_within_a_body_is_part_of_its_tape():
    inner, inner_calls = taped(lambda x: x * 2)
    outer, outer_calls = taped(lambda x: inner((x,)) + 1)
    x = torch.arange(3.0)
    for _ in range(3):
        inner((x,))
    for _ in range(4):
        assert torch.equal(outer((x,)), 2 * x + 1)
    assert len(outer_calls) == 2
    # Two of its own; played in the first call of the other, and recorded there in the second.
    assert len(inner_calls) == 3


def test_a_failure_is_raised_and_not_recorded():
    fails = [False, True, False]

    def body(x: Tensor) -> Tensor:
        if fails.pop(0):
            raise ValueError("out of memory")
        return x + 1

    play, _ = taped(body)
    x = torch.ones(2)
    play((x,))
    with pytest.raises(ValueError, match="out of memory"):
        play((x,))
    assert not tape.recording()
    for _ in range(3):
        assert torch.equal(play((x,)), x + 1)


def test_launches_of_other_threads_are_not_recorded():
    kernel = Kernel(lambda *_: None)

    def body(x: Tensor) -> Tensor:
        other = threading.Thread(target=kernel.launch, args=(x,))
        other.start()
        other.join()
        return x + 1

    play, _ = taped(body)
    x = torch.ones(2)
    for _ in range(4):
        assert torch.equal(play((x,)), x + 1)
    assert len(kernel.grids) == 2


def test_a_table_that_is_full_starts_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tape, "_MOST_TAPES", 2)
    play, calls = taped(lambda x: x + 1)
    for _ in range(3):
        for size in range(1, 4):
            assert torch.equal(play((torch.zeros(size),)), torch.ones(size))
    assert len(play._tapes) <= 2
    assert len(calls) > 6


def test_every_kernel_tells_of_its_launches():
    """One that does not would be missing from a tape, and its results with it."""
    untold = []
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text())
        plain = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef)
            and any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
        }
        # `kernel[grid](...)`; `Launch` is told the kernel by its name.
        launched_here = {
            node.func.value.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Subscript)
            and isinstance(node.func.value, ast.Name)
        }
        untold += [f"{path.name}: {name}" for name in sorted(plain & launched_here)]
    assert not untold
