"""Moments to statistics: against numpy on the raw samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pbfx.learning import Statistics, statistics
from pbfx_kernels import Moment

C, N, P = 3, 4, 500


def samples(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return activations (C, P, N) and errors (P, N) that have something to do with each other."""
    g = torch.Generator().manual_seed(seed)
    error = torch.randn(P, N, generator=g, dtype=dtype) + 0.2
    noise = torch.randn(C, P, N, generator=g, dtype=dtype)
    weight = torch.linspace(-1, 1, C, dtype=dtype)[:, None, None]
    return torch.tanh(weight * error + noise + 0.3), error


def sums_of(a: Tensor, g: Tensor) -> Tensor:
    rows = {
        Moment.COUNT: torch.full_like(a, 1.0),
        Moment.A: a,
        Moment.AA: a * a,
        Moment.G: g.expand_as(a),
        Moment.GG: (g * g).expand_as(a),
        Moment.AG: a * g,
    }
    return torch.stack([rows[row].sum(1) for row in Moment])


def expected(a: Tensor, g: Tensor) -> dict[str, np.ndarray]:
    activations, errors = a.double().numpy(), g.double().numpy()
    da = activations - activations.mean(1, keepdims=True)
    dg = errors - errors.mean(0)
    covariance = (da * dg).mean(1)
    return {
        "covariance": covariance,
        "correlation": covariance / np.sqrt((da**2).mean(1) * (dg**2).mean(0)),
        "activation_variance": activations.var(1),
        "error_mean": np.broadcast_to(errors.mean(0), covariance.shape),
        "error_variance": np.broadcast_to(errors.var(0), covariance.shape),
        "total": (activations * errors).sum(1),
    }


def distance(found: Tensor, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_statistics_are_numpys(dtype: torch.dtype, tolerance: float) -> None:
    a, g = samples()
    wanted = expected(a, g)
    found = statistics(sums_of(a, g).to(dtype))
    assert set(wanted) == set(Statistics.__dataclass_fields__)
    for name, value in wanted.items():
        assert distance(getattr(found, name), value) < tolerance, name
        assert getattr(found, name).shape == (C, N)


def test_correlation_is_numpys_corrcoef() -> None:
    a, g = samples(1)
    found = statistics(sums_of(a, g)).correlation
    for c in range(C):
        for n in range(N):
            assert found[c, n] == pytest.approx(np.corrcoef(a[c, :, n], g[:, n])[0, 1], abs=1e-12)


def test_sums_of_batches_are_the_sums_of_all() -> None:
    a, g = samples(2)
    parts = sums_of(a[:, :100], g[:100]) + sums_of(a[:, 100:], g[100:])
    assert distance(statistics(parts).covariance, expected(a, g)["covariance"]) < 1e-12


@given(exponent=st.integers(-12, 6))
def test_correlation_knows_no_scale_of_the_error(exponent: int) -> None:
    # Errors of late layers are 1e-12 at times; float32 as in training.
    a, g = samples()
    scaled = sums_of(a, g * 10.0**exponent).float()
    found = statistics(scaled)
    assert distance(found.correlation, expected(a, g)["correlation"]) < 1e-5
    assert distance(found.covariance / 10.0**exponent, expected(a, g)["covariance"]) < 1e-5


@pytest.mark.parametrize("value", [0.0, 1.0, -0.9999, 1e-20])
def test_a_constant_activation_correlates_with_nothing(value: float) -> None:
    a, g = samples()
    a[1] = value
    found = statistics(sums_of(a, g).float())
    assert torch.equal(found.correlation[1], torch.zeros(N))
    assert (found.correlation[[0, 2]] != 0).all()
    assert all(getattr(found, name).isfinite().all() for name in Statistics.__dataclass_fields__)


def test_a_saturated_tanh_counts_as_constant() -> None:
    # In float32 the variance of such a unit is rounding error, and so would be its correlation.
    a, g = samples()
    a[0] = 1 - 1e-7 * torch.rand(P, N, dtype=a.dtype)
    assert torch.equal(statistics(sums_of(a.float(), g.float())).correlation[0], torch.zeros(N))


def test_a_constant_error_correlates_with_nothing() -> None:
    a, g = samples()
    g[:, 2] = 0.7
    found = statistics(sums_of(a.float(), g.float()))
    assert torch.equal(found.correlation[:, 2], torch.zeros(C))
    assert (found.correlation[:, [0, 1, 3]] != 0).all()


def test_a_relu_that_fires_once_is_no_constant() -> None:
    a, g = samples()
    a[0] = 0.0
    a[0, 7] = 2.0
    found = statistics(sums_of(a, g))
    assert distance(found.correlation, expected(a, g)["correlation"]) < 1e-12


def test_nothing_measured_is_zero() -> None:
    found = statistics(torch.zeros(len(Moment), C, N))
    for name in Statistics.__dataclass_fields__:
        assert torch.equal(getattr(found, name), torch.zeros(C, N)), name
