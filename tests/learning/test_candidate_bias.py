"""Where candidates start: as a fresh layer would, or at the bend of their activation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pbfx
from learning.loops import Cnn, Mlp, enter_dendrite_phase, images, relative_error, sgd, train
from pbfx.candidates import Candidates, bend_of
from pbfx.learning import statistics
from pbfx_kernels import ACTIVATIONS
from pbfx_kernels.reference import activate


def pools(kind: type[torch.nn.Module], **settings: object) -> dict[str, Candidates]:
    """Return fresh pools, by the site's path."""
    torch.manual_seed(0)
    model = pbfx.transform(kind(), pbfx.Config(**settings))
    enter_dendrite_phase(model, sgd(model))
    return {name: m for name, m in model.named_modules() if isinstance(m, Candidates)}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_bend_is_where_the_second_derivative_is_largest(activation: str) -> None:
    at = bend_of(pbfx.Config(activation=activation, candidate_bias="bend"))
    if activation == "relu":
        # All of it lies at the kink.
        assert at == 0
        return
    z = torch.linspace(-6, 6, 24001, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(activate(activation, z).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    most = float(second.abs().max())
    here = torch.tensor([at], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activate(activation, here).sum(), here, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), here)
    assert float(bend.abs()) == pytest.approx(most, rel=1e-6)


def test_biases_are_moved_and_nothing_else() -> None:
    drawn, moved = pools(Mlp), pools(Mlp, candidate_bias="bend")
    for name, pool in moved.items():
        assert pool.weight.equal(drawn[name].weight)
        by = (pool.bias - drawn[name].bias).detach()
        assert relative_error(by, torch.full_like(by, 0.6584789)) < 1e-5
        # What is promoted if nothing is ever measured.
        assert pool.best_bias.equal(pool.bias)


def test_a_site_without_biases_stays_as_it_is() -> None:
    assert pools(Cnn, candidate_bias="bend")["conv2.dendrites.candidates"].bias is None


def test_after_a_norm_the_scale_keeps_the_bend() -> None:
    """Preactivations get unit spread around the bend, and not around zero."""
    torch.manual_seed(0)
    config = pbfx.Config(candidate_bias="bend", priming_batches=2, candidate_lr=1e-30)
    model = pbfx.transform(Cnn(), config)
    optimizer, task = sgd(model), images(48)
    enter_dendrite_phase(model, optimizer)
    seen: list[Tensor] = []
    pool = model.get_submodule("conv1.dendrites.candidates")
    assert isinstance(pool, Candidates)
    train(model, optimizer, task)
    assert pool.spread is not None
    assert not pool.spread.open
    for x, _ in task.batches():
        z = torch.nn.functional.conv2d(x, pool.weight.flatten(0, 1), pool.bias.flatten())
        seen.append(z.unflatten(1, pool.bias.shape).detach())
    z = torch.cat(seen).movedim(0, 2).flatten(2)
    # Of other batches than the first, which set the scale.
    assert (z.mean(-1) - bend_of(config)).abs().max() < 0.3
    assert (z.std(-1) - 1).abs().max() < 0.3


def test_squares_show_at_the_bend() -> None:
    """Where the error is a square of the input, random candidates see it there, and hardly else."""

    class Even(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    found = {}
    for where in ("drawn", "bend"):
        torch.manual_seed(0)
        config = pbfx.Config(
            candidate_bias=where, candidate_lr=1e-30, measure_every=2, priming_batches=0
        )
        model = pbfx.transform(Even(), config)
        enter_dendrite_phase(model, sgd(model))
        x = torch.randn(20_000, 8)
        error = x @ torch.randn(8, 16)
        error = error.square() - error.square().mean(0)
        for _ in range(2):
            model(x).backward(error)
        (pool,) = [m for m in model.modules() if isinstance(m, Candidates)]
        found[where] = statistics(pool.heldout).correlation.abs().mean()
    assert found["bend"] > 2 * found["drawn"]
