"""The end of Triton's launcher: what it is given, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.nvidia import driver as nvidia

from pbfx_kernels import launcher, tape
from pbfx_kernels.launcher import apart, straight
from pbfx_kernels.relaunch import Boxes
from pbfx_kernels.tape import Taped

READ_BY_BULK_COPIES = {"swizzle": 3}


class End(list[tuple[Any, ...]]):
    """Stands for the compiled end of a launcher, and keeps what it is given."""

    def __call__(self, *given: Any) -> None:
        self.append(given)


class CudaLauncher:
    """Does what Triton 3.6's does, in as many words."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid, launch_pdl = False, True

    def __init__(self, end: End, boxes: list[Any] | None = None) -> None:
        self.launch: Any = end if boxes is None else around(end, boxes)

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *args: Any) -> None:
        settings = self.launch_cooperative_grid, self.launch_pdl, None, None
        self.launch(x, y, z, stream, function, *settings, *args)


CudaLauncher.__module__ = nvidia.__name__


def around(launcher: End, tensordesc_meta: list[Any]) -> Callable[..., None]:
    """Return the function that Triton puts around an end which is given boxes."""

    def inner(*args: Any) -> None:
        metas = iter(tensordesc_meta)
        given = []
        for arg in args:
            is_box = hasattr(arg, "padding")
            given += nvidia.make_tensordesc_arg(arg, next(metas)) if is_box else [arg]
        launcher(*given)

    return inner


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Make the version one that is known; return addresses as the driver describes them."""
    asked: list[int] = []

    def taken_apart(boxes: Any, metadata: Any) -> list[Any]:
        form = [*boxes.shape, *boxes.strides]
        if metadata is None:
            return [boxes.base.data_ptr(), *form, boxes.padding == "nan", *form]
        asked.append(boxes.base.data_ptr())
        return [("map", boxes.base.data_ptr(), metadata["swizzle"]), *form]

    monkeypatch.setattr(triton, "__version__", "3.6.1")
    monkeypatch.setattr(nvidia, "make_tensordesc_arg", taken_apart)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)
    launcher._is_known.cache_clear()
    yield asked
    launcher._is_known.cache_clear()


class Compiled:
    function, packed_metadata = 17, (4, 1, 0)

    def __init__(self, run: Any) -> None:
        self.run = run


def played(run: Any) -> tuple[Taped, Callable[[Tensor, Tensor], Any]]:
    """Return an op that launches a kernel over two boxes, and how to call it."""
    compiled = Compiled(run)

    def body(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        boxes = [Boxes(t, t.shape, t.stride(), (1, 4)) for t in (x, y)]
        arguments = (out, boxes[0], 3, boxes[1], "mode")
        plain = (out.data_ptr(), *arguments[1:])
        run(2, 1, 1, 7, 17, (4, 1, 0), None, None, None, *(_checked(a) for a in plain))
        tape.launched(compiled, (2, 1, 1), arguments)
        return out

    op = Taped(body, devices=("cpu",))
    return op, lambda x, y: op((x, y))


def _checked(argument: Any) -> Any:
    return argument.placing()(argument.base.data_ptr()) if type(argument) is Boxes else argument


@pytest.mark.parametrize("how", [READ_BY_BULK_COPIES, None], ids=["described", "pointers"])
def test_the_end_is_given_what_the_launcher_gives_it(how: Any) -> None:
    end = End()
    _, call = played(CudaLauncher(end, [how, how]))
    x, y = torch.ones(4, 4), torch.ones(2, 4)
    outs = [call(x, y).data_ptr() for _ in range(4)]
    assert len(end) == 4
    by_body, by_tape = end[1], end[3]
    assert by_tape[13] == outs[3]
    assert (*by_tape[:13], *by_tape[14:]) == (*by_body[:13], *by_body[14:])


def test_a_box_is_described_once_for_each_address(known: list[int]) -> None:
    _, call = played(CudaLauncher(End(), [READ_BY_BULK_COPIES] * 2))
    x, y = torch.ones(4, 4), torch.ones(2, 4)
    for _ in range(2):
        call(x, y)
    known.clear()
    for _ in range(3):
        call(x, y)
    assert known == [x.data_ptr(), y.data_ptr()]
    other = torch.ones(4, 4)
    for _ in range(3):
        call(other, y)
        call(x, y)
    assert known == [x.data_ptr(), y.data_ptr(), other.data_ptr()]


def test_addresses_are_not_remembered_for_ever(known: list[int]) -> None:
    box = Boxes(torch.ones(4, 4), (4, 4), (4, 1), (1, 4))
    describe, rest = apart(READ_BY_BULK_COPIES, box.placing(), 16)
    assert describe is not None
    assert list(rest) == [4, 4, 4, 1]
    for address in range(16, 32 * launcher._MOST_ADDRESSES, 16):
        assert describe(address) == ("map", address, 3)
    known.clear()
    describe(16)
    assert known == [16]


def test_a_kernel_without_boxes_has_no_function_around_its_end() -> None:
    end = End()
    assert straight(CudaLauncher(end)) == (end, (False, True, None, None), ())


@pytest.mark.parametrize("version", ["3.5.1", "3.7.0", "4.6.0", "3.60.0"])
def test_of_other_versions_nothing_is_known(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert straight(CudaLauncher(End())) is None


@pytest.mark.parametrize("kind", ["global", "profile"])
def test_who_allocates_scratch_memory_is_left_to_it(kind: str) -> None:
    run = CudaLauncher(End())
    setattr(run, f"{kind}_scratch_size", 128)
    assert straight(run) is None


def test_other_launchers_are_left_alone() -> None:
    class Other(CudaLauncher):
        pass

    assert straight(Other(End())) is None
    unknown = CudaLauncher(End())
    unknown.launch = lambda *_: None
    assert straight(unknown) is None
