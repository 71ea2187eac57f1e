"""Two processes that train one model through DistributedDataParallel grow alike."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import pbfx
from learning.loops import Mlp, bits
from pbfx import RestructureError, ScoreError, TrackerError

RANKS = 2
ROWS = 16


class Normed(nn.Module):
    """A site that ends in a norm, whose candidates are scaled once, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.rest = nn.Linear(6, 6), nn.BatchNorm1d(6), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(torch.tanh(self.norm(self.first(x))))


def join(rank: int, scenario: Callable[[int], None], folder: str) -> None:
    """Be one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=RANKS)
    try:
        scenario(rank)
        # No rank may leave while another still talks to it, nor a group before its wrappers.
        dist.barrier()
        gc.collect()
    finally:
        dist.destroy_process_group()


def together(scenario: Callable[[int], None], folder: Path) -> None:
    """Run `scenario` in all processes; what one raises is raised here."""
    spawn(join, (scenario, str(folder)), nprocs=RANKS)


def batch(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return what all ranks together see in a step."""
    x = torch.randn(RANKS * ROWS, 6, generator=generator, dtype=dtype)
    return x, (x[:, :1] * x[:, 1:2] + torch.sin(2 * x[:, 2:3])).tanh()


def train(model: nn.Module, optimizer: Any, share: slice, generator: Any, steps: int = 24) -> None:
    model.train()
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x, y = (rows[share] for rows in batch(generator, dtype))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def made(net: type[nn.Module] = Normed, **settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = pbfx.transform(net(), pbfx.Config(**settings))
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def share_of(rank: int) -> slice:
    return slice(rank, None, RANKS)


def assert_alike(model: nn.Module, tracker: pbfx.Tracker) -> None:
    """Assert that all ranks have the same bits, but for the network's own running statistics."""
    mine = {
        name: bits(tensor).tolist()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not name.startswith("norm.running")
    }
    last = tracker.history[-1]
    theirs: list[Any] = [None] * RANKS
    dist.all_gather_object(theirs, (mine, last.candidate_score, last.reason, last.sites))
    (mine, *figures), *others = theirs
    for other, *of_other in others:
        assert other.keys() == mine.keys()
        assert not [name for name in mine if other[name] != mine[name]]
        assert of_other == figures


def grow_alike(rank: int) -> None:
    options: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"gradient_as_bucket_view": True}, {"sites": "auto"}),
        ({}, {"objective": "correlation", "finish": True}),
        ({"find_unused_parameters": True}, {"tuning": "newest", "initial_link": 0.1}),
        ({"find_unused_parameters": True}, {"learning": "gradient"}),
    ]
    for of_wrapper, settings in options:
        model, optimizer = made(**settings)
        wrapped = DistributedDataParallel(model, **of_wrapper)
        tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(2, 3), max_dendrites=2)
        generator = torch.Generator().manual_seed(1)
        phases = set()
        while not tracker.complete:
            phases.add(tracker.phase)
            train(wrapped, optimizer, share_of(rank), generator)
            assert_alike(model, tracker) if tracker.history else None
            tracker.step(float(len(tracker.history)))
            assert_alike(model, tracker)
        assert tracker.dendrites >= 1
        assert len(phases) == (1 if settings.get("learning") == "gradient" else 2)


def learn_what_one_process_learns(rank: int) -> None:
    def candidates(share: slice, wrap: bool) -> tuple[dict[str, Tensor], pbfx.Tracker]:
        model, optimizer = made(Mlp, candidates=2)
        model.double()
        module = DistributedDataParallel(model) if wrap else model
        tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 9))
        tracker.step(0.0)
        train(module, optimizer, share, torch.Generator().manual_seed(2))
        tracker.step(0.0)
        found = {n: p.detach() for n, p in model.named_parameters() if ".candidates." in n}
        return {n: p for n, p in found.items() if not n.endswith("moments")}, tracker

    several, tracker = candidates(share_of(rank), wrap=True)
    one, alone = candidates(slice(None), wrap=False)
    assert several.keys() == one.keys()
    for name, value in one.items():
        assert (several[name] - value).norm() <= 1e-9 * value.norm(), name
    expected, found = (t.history[-1].candidate_score for t in (alone, tracker))
    assert expected == pytest.approx(found, rel=1e-9)


def refuse_what_would_part_them(rank: int) -> None:
    model, optimizer = made()
    wrapped = DistributedDataParallel(model)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 3))
    with pytest.raises(TrackerError, match=r"different scores, \[0.0, 1.0\]"):
        tracker.step(float(rank))
    refusal = (TrackerError, ScoreError)[rank]
    with pytest.raises(refusal, match=("not a finite number", "must be finite")[rank]):
        tracker.step(float("nan") if rank else 0.0)
    assert not tracker.history
    assert tracker.step(0.0).restructured
    # Not through the wrapper.
    train(model, optimizer, share_of(rank), torch.Generator().manual_seed(3))
    with pytest.raises(TrackerError, match="candidates' scores differ between ranks"):
        tracker.step(0.0)
    del wrapped


def refuse_other_groups(rank: int) -> None:
    model, optimizer = made()
    wrapped = DistributedDataParallel(model, process_group=dist.new_group([0, 1]))
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.EveryTime())
    before = {name: bits(p) for name, p in model.named_parameters()}
    with pytest.raises(RestructureError, match="another process group"):
        tracker.step(0.0)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert wrapped(torch.zeros(2, 6)).shape == (2, 1)


@pytest.mark.parametrize(
    "scenario",
    [grow_alike, learn_what_one_process_learns, refuse_what_would_part_them, refuse_other_groups],
    ids=lambda scenario: scenario.__name__,
)
def test_ranks(scenario: Callable[[int], None], tmp_path: Path):
    together(scenario, tmp_path)
