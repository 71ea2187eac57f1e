"""Trials of the learning studies: restrictions hold, sizes are right, and a search never harms."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any

import pytest
import torch

import pbfx
from benchmarks.errors import UsageError
from benchmarks.learning import lanes, run, studies
from benchmarks.learning.arms import arm_named, setting
from benchmarks.learning.command import main
from benchmarks.learning.connections import Connections, Grouped, LowRank
from benchmarks.learning.line_search import LINKS, line_search
from benchmarks.learning.problem import Problem, Split, loss_of
from benchmarks.learning.task import Task
from benchmarks.learning.trainer import Trainer, evaluate
from benchmarks.learning.trials import Trial
from pbfx.demo.nets import MnistNet
from pbfx.parts import parameter_count, parts_of
from pbfx.sites import Site

CPU = torch.device("cpu")


def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        targets = torch.arange(count) % 10
        images = torch.randn(count, 1, 28, 28, generator=generator)
        images[torch.arange(count), 0, targets] += 2.0
        return Split(images, targets)

    return Problem("mnist", split(160), split(40), split(40))


@pytest.fixture(autouse=True)
def short_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let epochs have 20 steps of eight rows."""
    ablations = dataclasses.replace(studies.STUDIES["ablations"], steps=20, batch_size=8)
    monkeypatch.setitem(studies.STUDIES, "ablations", ablations)


def finish(arm: str, dendrites: int = 2) -> run.Outcome:
    job = Task("ablations", arm_named(arm, {}), 0.1, 0, 1, 2, dendrites)
    data = problem()
    [ended] = lanes.run_all(iter([job, None]).__next__, lambda t, _: run.start(t, data), 1, CPU)
    assert ended.fault is None, ended.fault
    assert ended.outcome is not None
    return ended.outcome


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, tuple[str, torch.Tensor]]]:
    """Return the weights of candidates and of dendrites, by site, after every epoch to come."""
    found, epoch = [], Trainer.epoch

    def looking(self: Trainer, rows: torch.Tensor | None = None) -> Generator[Any, None, Any]:
        loss = yield from epoch(self, rows)
        weights = {}
        for part in parts_of(self.model).values():
            for name, dendrites in part.grown().items():
                if dendrites.candidates is not None:
                    weights[name] = "candidates", dendrites.candidates.weight.detach().clone()
                elif dendrites.count:
                    weights[name] = "dendrites", dendrites.weight.detach().clone()
        found.append(weights)
        return loss

    monkeypatch.setattr(Trainer, "epoch", looking)
    return found


def sites() -> dict[str, Site]:
    [part] = parts_of(pbfx.transform(MnistNet(0.1))).values()
    return {site.name: site for site in part.perforation.sites}


@pytest.mark.parametrize("groups", [2, 4, 7, 50])
def test_dendrites_of_a_neuron_share_its_inputs_out(groups: int) -> None:
    for site in sites().values():
        masks = [Grouped(groups).mask(site, d) for d in range(groups)]
        assert all(mask.shape == site.shape for mask in masks)
        rows = torch.stack(masks).flatten(2)
        blocks = min(groups, rows.shape[-1])
        # Each input is seen by one of so many dendrites in a row, and by one of so many neighbours.
        assert (rows[:blocks].sum(0) == 1).all()
        assert (rows.sum(-1) - rows.shape[-1] // blocks).unique().tolist() in ([0], [0, 1])
        stored = [Grouped(groups).stored(site, d) for d in range(groups)]
        assert stored == [int(mask.sum()) for mask in masks]


def test_a_grouped_dendrite_sees_its_block_only(seen: list) -> None:
    finish("perforated[trial.groups=4]")
    assert [next(iter(w.values()))[0] if w else None for w in seen] == [
        *[None, "candidates", "candidates", "dendrites"],
        *["candidates", "candidates", "dendrites"],
    ]
    for name, site in sites().items():
        masks = torch.stack([Grouped(4).mask(site, d) for d in range(2)])
        for grown, epochs in enumerate(([1, 2], [4, 5])):
            pools = [seen[epoch][name][1] for epoch in epochs]
            for pool in pools:
                assert (pool[:, ~masks[grown]] == 0).all()
                assert (pool[:, masks[grown]] != 0).all()
            assert not torch.equal(*pools)
        accepted = seen[6][name][1]
        assert (accepted[~masks[: len(accepted)]] == 0).all()
        assert (accepted[masks[: len(accepted)]] != 0).all()


def test_fresh_preactivations_are_as_large_in_a_block() -> None:
    net = pbfx.transform(MnistNet(0.25))
    tracker = begun(net)
    before = {n: x.candidates.weight.detach().clone() for n, x in tracker._learners.items()}
    Grouped(4).begin(tracker._learners)
    for name, learner in tracker._learners.items():
        pool = learner.candidates
        assert torch.equal(pool.weight, pool.best_weight)
        sizes = [w.detach().square().sum(1).mean() for w in (pool.weight, before[name])]
        assert float(sizes[0]) == pytest.approx(float(sizes[1]), rel=0.2)


def begun(net: torch.nn.Module) -> pbfx.Tracker:
    """Return a tracker whose dendrite phase has begun."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    tracker = pbfx.Tracker(net, optimizer, policy=pbfx.Interval(1, 4))
    tracker.step(0.0)
    assert tracker.phase is pbfx.Phase.DENDRITE
    return tracker


@pytest.mark.parametrize("rank", [1, 2])
def test_rank_holds_for_pools_and_for_what_is_accepted_of_them(rank: int, seen: list) -> None:
    finish(f"perforated[trial.rank={rank}]")
    kinds = set()
    for weights in seen:
        for name, (kind, stack) in weights.items():
            # Of one pool whichever rows are chosen; of accepted dendrites each is one of its own.
            for matrix in [stack.flatten(0, 1)] if kind == "candidates" else stack:
                kinds.add(kind)
                assert torch.linalg.matrix_rank(matrix.flatten(1), rtol=1e-5) == rank, name
    assert kinds == {"candidates", "dendrites"}
    for name in sites():
        assert not torch.equal(seen[1][name][1], seen[2][name][1])


def test_factors_learn_by_the_chain_rule() -> None:
    tracker = begun(pbfx.transform(MnistNet(0.25)))
    connections = LowRank(3)
    connections.begin(tracker._learners)
    learner = tracker._learners["conv2"]
    pool, [factors] = learner.candidates, learner._learnt[:1]
    drawn = factors.detach().clone()
    assert all(learnt is not pool.weight for learnt in learner._learnt)
    assert len(learner._learnt) == 2
    count, inputs = pool.count * 16, 8 * 9
    left, right = factors.detach().double().split([3 * count, 3 * inputs])
    left = left.view(count, 3).requires_grad_()
    right = right.view(3, inputs).requires_grad_()
    product = (left @ right).view_as(pool.weight)
    torch.testing.assert_close(pool.weight.double(), product.detach(), rtol=1e-5, atol=1e-7)
    error = torch.randn_like(pool.weight)
    (product * error).sum().backward()
    (pool.weight * error).sum().backward()
    assert left.grad is not None
    assert right.grad is not None
    assert factors.grad is not None
    wanted = torch.cat([left.grad.flatten(), right.grad.flatten()])
    torch.testing.assert_close(factors.grad.double(), wanted, rtol=1e-4, atol=1e-5)
    assert pool.weight.grad is None
    # Weights change by what the factors learn, and nothing is left behind for others.
    factors.grad = None
    data = problem().train
    for _ in range(40):
        loss_of(tracker.model(data.inputs[:32]), data.targets[:32]).backward()
        assert factors.grad is None
        connections.renew()
    assert not torch.equal(factors, drawn)
    left, right = factors.detach().split([3 * count, 3 * inputs])
    product = left.view(count, 3) @ right.view(3, inputs)
    assert torch.equal(pool.weight, product.view_as(pool.weight))


def test_what_would_be_stored_is_counted() -> None:
    # conv1 3 x 9, conv2 6 x 27, fc1 12 x 864, fc2 10 x 12.
    dense = 3 * 9 + 6 * 27 + 12 * 864 + 10 * 12
    low = 2 * (3 + 9) + 2 * (6 + 27) + 2 * (12 + 864) + 2 * (10 + 12)
    net = pbfx.grow(pbfx.transform(MnistNet(0.1)), 2)
    assert Connections().saved(net) == 0
    assert LowRank(2).saved(net) == 2 * (dense - low)
    # Only the largest saves anything by two factors of rank 8.
    assert LowRank(8).saved(net) == 2 * (12 * 864 - 8 * (12 + 864))
    # Blocks of 3 or 2 of the 9 taps: neurons 0, 1, 2 see blocks 0, 1, 2 first, then 1, 2, 3.
    even = 2 * (6 * 27 + 12 * 864 + 10 * 12) // 3 + (3 + 3 + 3) + (3 + 3 + 3)
    assert 2 * dense - Grouped(3).saved(net) == even
    assert Connections().saved(MnistNet(0.1)) == 0


def test_rows_have_the_stored_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if every phase were better than the one before.
    scores = iter(range(100))
    step = pbfx.Tracker.step
    monkeypatch.setattr(pbfx.Tracker, "step", lambda self, _: step(self, float(next(scores))))
    monkeypatch.setattr(run._Figures, "score", lambda self, _: -self.error)
    monkeypatch.setattr(run, "_rank", lambda _, index, __: (index, 0))
    net = pbfx.transform(MnistNet(0.1))
    wanted = [parameter_count(net)]
    for number in (1, 2):
        grown = pbfx.grow(pbfx.transform(MnistNet(0.1)), number)
        wanted.append(parameter_count(grown) - LowRank(2).saved(grown))
    stages = finish("perforated[trial.rank=2]").stages
    assert [stage.parameters for stage in stages] == wanted


@pytest.mark.parametrize(
    "arm", ["perforated[trial.line_search=both]", "sham[trial.line_search=soma]"]
)
def test_a_search_never_raises_the_training_loss(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []

    def watched(model: torch.nn.Module, *rest) -> Generator[Any, None, Any]:
        data = problem().train
        grown = [d for part in parts_of(model).values() for d in part.grown().values()]
        without = [dendrites.to_soma for dendrites in grown]
        full = [links.detach().clone() for links in without]
        with torch.no_grad():
            for links in without:
                links[-1] = 0
            before = float(evaluate(model, data)[1])
            for links, kept in zip(without, full, strict=True):
                links.copy_(kept)
        taken = yield from line_search(model, *rest)
        losses.append((before, float(evaluate(model, data)[1])))
        return taken

    monkeypatch.setattr(run, "line_search", watched)
    stages = finish(arm).stages
    for before, after in losses:
        assert after <= before
    assert len(losses) == 2
    names = {"conv1", "conv2", "fc1", "fc2"}
    searched = {f"{name}.weight" for name in names}
    if arm.startswith("perforated"):
        searched |= {f"{name}.dendrites.to_soma" for name in names}
        assert any(before > after for before, after in losses)
    for stage in stages[1:]:
        assert stage.growth is not None
        assert stage.growth["line_search"].keys() == searched


def result_of(search: Generator[object, None, dict[str, float]]) -> dict[str, float]:
    while True:
        try:
            next(search)
        except StopIteration as end:
            return end.value


def test_a_search_finds_the_least_of_its_line() -> None:
    data = problem().train
    rows = torch.arange(0, 160, 2)
    model = pbfx.grow(pbfx.transform(MnistNet(0.1), pbfx.Config(include=("fc2",))), 1)
    [dendrites] = next(iter(parts_of(model).values())).grown().values()
    torch.nn.init.normal_(dendrites.to_soma)
    start = dendrites.to_soma.detach().clone()
    search = line_search(model, Trial(line_search="links"), data, rows)
    [(name, taken)] = result_of(search).items()
    assert name == "fc2.dendrites.to_soma"
    losses = {}
    for factor in LINKS:
        with torch.no_grad():
            dendrites.to_soma.copy_(start * factor)
        seen = Split(data.inputs[rows], data.targets[rows])
        losses[factor] = float(evaluate(model, seen)[1])
    assert taken == min(losses, key=losses.__getitem__)


def test_trials_are_runs_of_their_own_and_resume(tmp_path, capsys) -> None:
    command = ["digits", "--seeds", "1", "--neuron-epochs", "1", "--dendrite-epochs", "1"]
    command += ["--dendrites", "1", "--out", str(tmp_path), "--arms"]
    arms = "perforated,perforated[trial.groups=2],perforated[trial.rank=2],"
    arms += "perforated[trial.line_search=both]"
    assert main([*command, arms]) == 0
    first = (tmp_path / "digits.csv").read_bytes()
    assert first.count(b"\n") == 5
    assert main([*command, arms]) == 0
    assert (tmp_path / "digits.csv").read_bytes() == first
    assert "4 done; 0 to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("perforated[trial.groups=0]", "at least 1, got 0"),
        ("perforated[trial.rank=two]", "whole number of at least 0, got 'two'"),
        ("perforated[trial.groups=2,trial.rank=2]", "exclude each other"),
        ("perforated[trial.line_search=link]", "links"),
        ("sham[trial.groups=2]", "not of sham"),
        ("gradient[trial.rank=2]", "not of gradient"),
        ("gradient[trial.line_search=soma]", "gradient has none"),
        ("perforated[trial.rank=2,tuning=all]", "leave out tuning"),
        ("perforated[finish=True,trial.groups=2]", "leave out finish"),
    ],
)
def test_what_cannot_be_tried_is_named(arm: str, words: str, capsys, tmp_path) -> None:
    with pytest.raises(UsageError, match=words):
        arm_named(arm, {}).trial  # noqa: B018
    assert main(["digits", "--seeds", "1", "--arms", arm, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_an_unknown_trial_is_named() -> None:
    with pytest.raises(UsageError, match=r"trial\.groups"):
        setting("trial.group=2")
