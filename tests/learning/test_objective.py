"""What candidates climb: the covariance with their neuron's error, or the correlation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pbfx
from learning.loops import (
    Cnn,
    Mlp,
    enter_dendrite_phase,
    images,
    regression,
    relative_error,
    same,
    sgd,
    train,
)
from pbfx.candidates import Candidates
from pbfx.learning import statistics
from pbfx_kernels import Moment
from pbfx_kernels.booking import Memory, Rules
from pbfx_kernels.turns import take_turn


def started(kind: type[nn.Module], **settings: object) -> tuple[nn.Module, pbfx.Tracker]:
    """Return a model that has just entered its dendrite phase, and its tracker."""
    torch.manual_seed(0)
    settings = {"measure_every": 2, "priming_batches": 2, "objective": "correlation", **settings}
    model = pbfx.transform(kind(), pbfx.Config(**settings))
    optimizer = sgd(model)
    task = regression(96) if kind is Mlp else images(48)
    for _ in range(3):
        train(model, optimizer, task)
    return model, enter_dendrite_phase(model, optimizer)


def pools(model: nn.Module) -> dict[str, Candidates]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Candidates)}


def drawn(c: int, n: int, positions: int, constant: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return activations (C, P, N), errors (P, N), and their sums as moments (6, C, N)."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(positions, n, generator=generator, dtype=torch.float64) + 0.2
    noise = torch.randn(c, positions, n, generator=generator, dtype=torch.float64)
    a = torch.tanh(noise - 0.5 * g)
    if constant:
        a = torch.ones_like(a)
    rows = (torch.ones_like(a), a, a * a, g.expand_as(a), (g * g).expand_as(a), a * g)
    return a, g, torch.stack([row.sum(1) for row in rows])


@pytest.mark.parametrize("constant", [False, True])
def test_a_turn_fits_the_error_over_the_activation(constant: bool) -> None:
    a, g, sums = drawn(2, 5, 400, constant)
    zeros = torch.zeros_like
    memory = Memory(
        sums.flatten(0, 1),
        zeros(sums),
        sums.new_zeros(()),
        zeros(sums),
        sums.new_zeros(()),
        zeros(sums[0]),
        sums.new_zeros(5),
        torch.zeros((), dtype=torch.int64),
        (),
        sums.new_zeros(2, 2, 5),
    )
    take_turn(memory, Rules(3, 0, 0.9))
    line = memory.regression
    assert line is not None
    assert relative_error(line[1], a.mean(1)) < 1e-12
    if constant:
        assert not line[0].any()
        return
    # Least squares, neuron by neuron.
    for c in range(2):
        for n in range(5):
            design = torch.stack([a[c, :, n], torch.ones(400, dtype=torch.float64)], 1)
            slope = torch.linalg.lstsq(design, g[:, n : n + 1]).solution[0, 0]
            assert float(line[0, c, n]) == pytest.approx(float(slope), rel=1e-9)


@pytest.mark.parametrize("net", [Mlp, Cnn])
def test_candidates_keep_the_line_of_their_running_moments(net: type[nn.Module]) -> None:
    model, tracker = started(net)
    task = regression(96) if net is Mlp else images(48)
    for _ in range(2):
        train(model, tracker.optimizer, task)
    # The last of its batches learnt or measured; either way the line is that of the running sums.
    for name, pool in pools(model).items():
        found = statistics(pool.running)
        count = pool.running[Moment.COUNT]
        varies = found.correlation != 0
        slope = torch.where(varies, found.covariance / found.activation_variance, 0.0)
        assert varies.any(), name
        assert pool.regression is not None
        assert relative_error(pool.regression[0], slope) < 1e-4, name
        assert relative_error(pool.regression[1], pool.running[Moment.A] / count) < 1e-5, name


def test_the_covariance_needs_no_line() -> None:
    model, _ = started(Mlp, objective="covariance")
    for pool in pools(model).values():
        assert pool.regression is None
        assert "regression" not in pool.state_dict()


def learnt(objective: str, rate: float = 1e-2) -> dict[str, Tensor]:
    """Return each site's held-out |correlation| (C, N) after candidates have learnt."""
    model, tracker = started(Mlp, objective=objective, candidate_lr=rate)
    # What saturates: weights far larger than a fresh layer's.
    for pool in pools(model).values():
        pool.weight.data.mul_(4)
    task = regression(512)
    for _ in range(12):
        train(model, tracker.optimizer, task)
        for pool in pools(model).values():
            pool.heldout.zero_()
    train(model, tracker.optimizer, task)
    return {n: statistics(p.heldout).correlation.abs() for n, p in pools(model).items()}


def test_climbing_it_raises_the_correlation_on_batches_not_learnt_from() -> None:
    random, climbed = learnt("correlation", 1e-30), learnt("correlation")
    for name in random:
        assert climbed[name].mean() > 1.5 * random[name].mean(), name


def test_the_two_objectives_differ() -> None:
    one, other = learnt("correlation"), learnt("covariance")
    assert not any(torch.allclose(one[name], other[name]) for name in one)


@pytest.mark.parametrize("net", [Mlp, Cnn])
def test_a_stopped_phase_goes_on_as_if_it_had_not(net: type[nn.Module], tmp_path: Path) -> None:
    model, tracker = started(net)
    task = regression(96) if net is Mlp else images(48)
    train(model, tracker.optimizer, task)
    path = tmp_path / "phase.safetensors"
    pbfx.save(model, path, tracker)
    again = pbfx.transform(net(), model.perforation.config)
    other = pbfx.Tracker(again, sgd(again), policy=tracker.policy)
    pbfx.load(path, again, other)
    assert same(model.state_dict(), again.state_dict())
    for each in (tracker, other):
        torch.manual_seed(1)
        train(each.model, each.optimizer, task)
    assert same(model.state_dict(), again.state_dict())


def test_candidates_of_another_objective_are_not_taken_over(tmp_path: Path) -> None:
    model, tracker = started(Mlp)
    path = tmp_path / "phase.safetensors"
    pbfx.save(model, path, tracker)
    again = pbfx.transform(Mlp(), pbfx.Config(objective="covariance"))
    with pytest.raises(
        pbfx.CheckpointError, match="its objective is 'correlation', the model's 'covariance'"
    ):
        pbfx.load(path, again, pbfx.Tracker(again, sgd(again)))
    # A network has no objective.
    plain = pbfx.load(path, pbfx.transform(Mlp(), pbfx.Config(objective="covariance")))
    assert plain.fc1.weight.equal(model.fc1.weight)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_climbs_it_too(backend: str) -> None:
    task = regression(96)
    ways = []
    for compile_it in (False, True):
        model, tracker = started(Mlp, candidate_lr=0.1)
        run = torch.compile(model, backend=backend, fullgraph=True) if compile_it else model
        torch.manual_seed(1)
        for _ in range(2):
            train(run, tracker.optimizer, task)
        ways.append({name: pool.weight.detach() for name, pool in pools(model).items()})
    for name, weight in ways[0].items():
        assert relative_error(ways[1][name], weight) < 1e-5, name
