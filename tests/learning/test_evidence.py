"""Evidence that candidates correlate with the error: its null distribution, power and unit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pbfx
from pbfx import restructure
from pbfx.learning.evidence import Evidence, collect, p_value, survival, weigh
from pbfx.learning.learner import SiteLearner
from pbfx_kernels import Moment

SITES = 30


@pytest.mark.parametrize(
    ("t", "freedom", "tail"),
    # Tables of Student's distribution: one-sided 5, 2.5, 1 and 0.1 %.
    [
        (6.313752, 1, 0.05),
        (2.919986, 2, 0.05),
        (3.182446, 3, 0.025),
        (2.570582, 5, 0.025),
        (1.812461, 10, 0.05),
        (2.763769, 10, 0.01),
        (4.024701, 11, 0.001),
        (1.660234, 100, 0.05),
        (0.0, 7, 0.5),
    ],
)
def test_student(t: float, freedom: int, tail: float) -> None:
    assert math.isclose(survival(t, freedom), tail, rel_tol=1e-5)
    assert math.isclose(survival(-t, freedom), 1 - tail, rel_tol=1e-5)


@given(st.floats(-50, 50), st.integers(1, 700))
def test_student_is_a_tail(t: float, freedom: int) -> None:
    assert 0 <= survival(t, freedom) <= 1
    assert survival(t, freedom) >= survival(t + 0.1, freedom) - 1e-15
    normal = 0.5 * math.erfc(t / math.sqrt(2))
    assert abs(survival(t, freedom) - normal) < 0.35 / freedom


# Squares of smaller ones have too few digits to be told apart.
_VALUES = st.floats(-1e3, 1e3).filter(lambda value: value == 0 or abs(value) > 1e-100)


@given(st.lists(_VALUES, min_size=2, max_size=30), st.floats(1e-3, 1e3))
def test_p_values_do_not_depend_on_the_scale(values: list[float], scale: float) -> None:
    def judged(factor: float) -> float | None:
        scaled = [factor * value for value in values]
        return p_value(len(scaled), sum(scaled), sum(value**2 for value in scaled))

    one, other = judged(1.0), judged(scale)
    assert one is not None
    assert other is not None
    assert math.isclose(one, other, abs_tol=1e-3)


def test_too_few_values_say_nothing() -> None:
    assert p_value(0, 0.0, 0.0) is None
    assert p_value(1, 5.0, 25.0) is None
    assert p_value(9, 0.0, 0.0) == 1.0


def test_squares_that_underflow_are_judged() -> None:
    tiny = 2.47e-162
    assert 0 <= (p_value(2, tiny, tiny**2) or 0) <= 1
    assert p_value(3, 6.0, 12.0) == 0.0


def test_a_batch_counts_by_its_own_covariance() -> None:
    """Whatever the level of activation and error in this batch, only their product counts."""
    a, g = torch.randn(9).double() + 3, torch.randn(9).double() - 5
    sums = torch.zeros(len(Moment), 1, 1).double()
    for row, value in {
        Moment.COUNT: torch.tensor(9.0),
        Moment.A: a.sum(),
        Moment.G: g.sum(),
        Moment.AG: (a * g).sum(),
    }.items():
        sums[row] = value
    evidence, direction = Evidence(sums.flatten(0, 1)), torch.full((1, 1), -0.5).double()
    none, one = torch.zeros(()).double(), torch.ones(()).double()
    weighed = weigh([(sums.flatten(0, 1), direction, none)])
    wanted = -0.5 * float(((a - a.mean()) * (g - g.mean())).sum())
    assert torch.allclose(weighed.products, torch.tensor([wanted]).double())
    # It was a batch to learn from: nothing more has been measured.
    collect([evidence], weighed, [none])
    assert not evidence.sums.any()
    # It overflowed, or held no position.
    for spoilt in (sums * math.inf, sums * 0):
        collect([evidence], weigh([(spoilt.flatten(0, 1), direction, none)]), [none])
        assert not evidence.sums.any()
    collect([evidence], weighed, [one])
    assert torch.allclose(evidence.sums, torch.tensor([1.0, wanted, wanted**2, 9.0]).double())


class Side(nn.Module):
    """Many sites that have nothing to do with one another: as many repetitions of one study."""

    def __init__(self, conv: bool) -> None:
        super().__init__()
        build = (lambda: nn.Conv2d(2, 4, 3, padding=1)) if conv else (lambda: nn.Linear(5, 4))
        self.layers = nn.ModuleList(build() for _ in range(SITES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(part) for layer, part in zip(self.layers, x, strict=True)])


def studies(conv: bool, seed: int, batches: int, draw) -> list[SiteLearner]:
    """Teach candidates with errors that `draw` gives; return the learners, their epoch closed."""
    torch.manual_seed(seed)
    config = pbfx.Config(candidate_lr=1e-2, priming_batches=4, measure_every=3, seed=seed)
    model = pbfx.transform(Side(conv), config)
    _, learners = restructure.start_dendrite_phase(model)
    for learner in learners.values():
        learner.attach()
    for _ in range(batches):
        x, error = draw()
        model.zero_grad()
        model(x).backward(error)
    for learner in learners.values():
        learner.measure()
    return list(learners.values())


def linear_noise() -> tuple[Tensor, Tensor]:
    # Neurons share half of their errors, as those of a layer do.
    x, shared = torch.randn(SITES, 16, 5), torch.randn(SITES, 16, 1)
    return x, shared + torch.randn(SITES, 16, 4)


def map_noise() -> tuple[Tensor, Tensor]:
    """Maps whose positions have most of their input and their error in common."""
    x = torch.randn(SITES, 8, 2, 1, 1) + 0.3 * torch.randn(SITES, 8, 2, 5, 5)
    return x, torch.randn(SITES, 8, 4, 1, 1) + 0.3 * torch.randn(SITES, 8, 4, 5, 5)


@pytest.mark.parametrize("conv", [False, True])
def test_at_chance_p_values_are_uniform(conv: bool) -> None:
    """Four candidates on four neurons, each the best of its pool: no inflation follows from it."""
    draw = map_noise if conv else linear_noise
    found = []
    for seed in range(3):
        found += studies(conv, seed, 75, draw)
    p = torch.tensor([learner.figures("", None).p_value for learner in found]).sort().values
    assert len(p) == 3 * SITES
    # Kolmogorov and Smirnov's distance from the uniform distribution; beyond it once in a thousand.
    ranks = torch.arange(1, len(p) + 1) / len(p)
    assert float((p - ranks).abs().max()) < 1.95 / math.sqrt(len(p))
    # 4.5 of 90 are expected; more than 12 once in a thousand.
    assert int((p < 0.05).sum()) <= 12
    heldout = torch.tensor([learner.figures("", None).heldout for learner in found])
    assert abs(float(heldout.mean())) < 4 * float(heldout.std()) / math.sqrt(len(heldout))


def test_positions_of_a_map_are_no_unit() -> None:
    """The same sums, judged as if positions were independent, would see a signal in noise."""
    found = studies(True, 0, 75, map_noise)
    false = 0
    for learner in found:
        batches, total, squares, positions = learner.evidence.sums.tolist()
        per_batch = positions / batches
        # The variance of a batch's sum, if its positions were independent: from their own spread.
        pool = learner.candidates
        spread = pool.best_moments[Moment.AA] / pool.best_moments[Moment.COUNT].clamp_min(1)
        naive = per_batch * float(spread.sum())
        false += total / math.sqrt(batches * naive) > 1.645
        assert squares / batches > 3 * naive
    assert false > SITES / 10


def test_a_signal_is_found() -> None:
    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(SITES, 32, 5)
        return x, 0.5 * torch.randn(SITES, 32, 4) + (2 * x[..., :1] + 1).tanh() - x[..., :1]

    found = [learner.figures("", None) for learner in studies(False, 0, 75, draw)]
    assert sum(figures.p_value < 1e-3 for figures in found) > 0.9 * SITES
    assert all(figures.heldout_batches == 25 for figures in found)
    assert all(figures.gain > 0 and figures.slope > 0 for figures in found)


def test_what_is_seen_does_not_depend_on_the_scale_of_the_loss() -> None:
    def draw(scale: float):
        def one() -> tuple[Tensor, Tensor]:
            x, error = linear_noise()
            return x, scale * error

        return one

    small, large = (
        [learner.figures("", None) for learner in studies(False, 1, 12, draw(scale))]
        for scale in (1e-3, 1e3)
    )
    for one, other in zip(small, large, strict=True):
        assert math.isclose(one.p_value, other.p_value, rel_tol=1e-2)
        assert math.isclose(one.heldout, other.heldout, rel_tol=1e-2, abs_tol=1e-4)


def test_batches_that_overflow_are_no_evidence() -> None:
    turns = iter(range(99))

    def draw() -> tuple[Tensor, Tensor]:
        x, error = linear_noise()
        # The sixth batch only measures, the seventh learns.
        return x, error * (math.inf if next(turns) in (5, 6) else 1.0)

    for learner in studies(False, 0, 12, draw):
        figures = learner.figures("", None)
        assert figures.heldout_batches == 3
        assert math.isfinite(figures.heldout)
        assert math.isfinite(figures.p_value)


def test_before_any_measurement() -> None:
    for learner in studies(False, 0, 2, linear_noise):
        figures = learner.figures("layers.0", None)
        assert (figures.heldout, figures.heldout_batches, figures.p_value) == (None, 0, None)
        assert (figures.gain, figures.slope, figures.neurons) == (0.0, 0.0, 4)
        # 5 weights, a bias and a link for each neuron.
        assert figures.parameters == 28
