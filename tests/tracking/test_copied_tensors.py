"""Many tensors are copied, zeroed and put back at once, whatever each of them looks like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pbfx import copies
from pbfx.copies import Backup, Filling, copies_of


class Tagged(Tensor):
    """A tensor of a class with ways of its own."""


@pytest.fixture
def tensors(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    # So that one of them is large.
    monkeypatch.setattr(copies, "_SMALL", 500)
    torch.manual_seed(0)
    return [
        torch.randn(3, 5),
        nn.Parameter(torch.randn(1)),
        torch.randn(()),
        torch.randn(0, 4),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 4).t(),
        torch.randn(129).bfloat16(),
        torch.randn(7).double(),
        torch.arange(5),
        torch.tensor([True, False]),
        torch.randn(30, 30),
    ]


def scribble(tensors: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(1)


@pytest.mark.parametrize("odd", [False, True])
def test_a_backup_writes_back_what_was_there(tensors: list[Tensor], odd: bool) -> None:
    if odd:
        tensors.append(torch.randn(3).as_subclass(Tagged))
    before = [tensor.detach().clone() for tensor in tensors]
    places = [tensor.data_ptr() for tensor in tensors]
    backup = Backup(tensors)
    scribble(tensors)
    backup.write_back()
    assert all(map(torch.equal, tensors, before))
    assert places == [tensor.data_ptr() for tensor in tensors]
    assert [t.stride() for t in tensors[:-1]] == [t.stride() for t in before[:-1]]


def test_a_backup_of_nothing() -> None:
    Backup([]).write_back()


def test_copies_are_their_own(tensors: list[Tensor]) -> None:
    before = [tensor.detach().clone() for tensor in tensors]
    kept = copies_of(tensors)
    scribble(tensors)
    assert all(map(torch.equal, kept, before))
    assert [t.stride() for t in kept if t.numel()] == [t.stride() for t in before if t.numel()]
    scribble(kept[:1])
    assert all(map(torch.equal, kept[1:], before[1:]))
    assert not any(copy.requires_grad for copy in kept)


def test_what_is_copied_into_zeros_comes_after_them() -> None:
    filling, source = Filling(), torch.arange(6.0).view(2, 3)
    # Poisoned, as memory that nobody has written may be.
    like = torch.full((1,), torch.nan)
    zeros = filling.zeros(like, (3, 4))
    filling.into(zeros[:2, :3], source)
    zeros.fill_(torch.nan)
    filling.fill()
    assert torch.equal(zeros, nn.functional.pad(source, (0, 1, 0, 1)))
    # Once is enough.
    zeros.fill_(7)
    filling.fill()
    assert (zeros == 7).all()


def test_what_has_a_place_comes_there_when_all_is_filled() -> None:
    filling, like = Filling(), torch.full((1,), torch.nan)
    source = nn.Parameter(torch.arange(6.0).view(3, 2).t())
    table: dict[str, Tensor] = {}
    filling.place(table, "zeros", like, (2, 3))
    filling.place(table, "wide", like, (2, 3), torch.float64)
    filling.place(table, "number", like, ())
    filling.place_copy(table, "copy", source)
    filling.place(table, "more", like, (2, 3))
    # Their order is that of a state dict.
    assert table == dict.fromkeys(("zeros", "wide", "number", "copy", "more"))
    filling.fill()
    assert torch.equal(table["copy"], source)
    assert not table["copy"].requires_grad
    for name, shape, dtype in (
        ("zeros", (2, 3), torch.float32),
        ("wide", (2, 3), torch.float64),
        ("number", (), torch.float32),
        ("more", (2, 3), torch.float32),
    ):
        assert table[name].is_contiguous()
        assert torch.equal(table[name], torch.zeros(shape, dtype=dtype))
        table[name].fill_(7)
    assert torch.equal(table["copy"], source)
    assert (table["more"] == 7).all()
