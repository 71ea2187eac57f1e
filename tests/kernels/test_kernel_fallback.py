"""A kernel that cannot be launched: the reference instead, warned once; other errors go on."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import pbfx_kernels
from pbfx_kernels import dispatch, fallback, neuron_op
from pbfx_kernels.problem import problem_of
from pbfx_kernels.strategy import Strategy

triton_errors = pytest.importorskip("triton.runtime.errors")


@pytest.fixture(autouse=True)
def forgotten():
    fallback._refused.clear()
    yield
    fallback._refused.clear()


def arguments(positions: int) -> tuple:
    torch.manual_seed(0)
    x = torch.randn(positions, 5)
    weight, bias = torch.randn(2, 3, 5), torch.randn(2, 3)
    to_soma, to_dendrite = torch.randn(2, 3), torch.randn(2, 2, 3)
    return torch.randn(positions, 3), x, weight, bias, to_soma, to_dendrite


def test_a_failed_launch_falls_back_once(monkeypatch):
    launches = []

    def refuses(*_):
        launches.append(1)
        raise triton_errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(dispatch, "choose", lambda problem: Strategy.SPLIT)
    monkeypatch.setattr(dispatch, "_launch", refuses)
    monkeypatch.setattr(dispatch, "_launch_gradient", refuses)
    given = arguments(4)
    with pytest.warns(RuntimeWarning, match=r"N=3, K=5, D=2 in .*reference"):
        out = pbfx_kernels.dendrites(*given)[0]
    assert torch.equal(
        out, pbfx_kernels.reference.dendrites(*given, "tanh", pbfx_kernels.LINEAR)[0]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Another number of positions is the same kernel.
        pbfx_kernels.dendrites(*arguments(7))
        grad, x, weight, bias, _, to_dendrite = given
        dispatch.recompute_to_soma_gradient(
            grad, x, weight, bias, to_dendrite, "tanh", pbfx_kernels.LINEAR
        )
    assert len(launches) == 1
    # Whoever asks for a strategy is told.
    with pytest.raises(triton_errors.OutOfResources):
        dispatch.evaluate_dendrites(
            *given, "tanh", pbfx_kernels.LINEAR, True, strategy=Strategy.SPLIT
        )


def test_other_errors_are_passed_on():
    soma, _, weight, *_ = arguments(4)
    problem = dataclasses.replace(problem_of(soma, weight, pbfx_kernels.LINEAR), device="cuda")

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        fallback.or_reference(problem, broken, lambda: None)
    assert not fallback._refused


def test_a_fused_linear_neuron_falls_back_once(monkeypatch):
    launches = []

    def refuses(*_):
        launches.append(1)
        raise triton_errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(neuron_op, "can_fuse", lambda *_: True)
    monkeypatch.setattr(neuron_op, "_in_one_kernel", refuses)
    _, x, weight, bias, to_soma, to_dendrite = arguments(4)
    soma_weight, soma_bias = torch.randn(3, 5), torch.randn(3)
    links = bias, to_soma, to_dendrite, "tanh"
    op = torch.ops.pbfx.perforated_linear.default
    with pytest.warns(RuntimeWarning, match=r"N=3, K=5, D=2 in .*reference"):
        out, activations = op(x, soma_weight, soma_bias, weight, *links, True)
    soma = torch.nn.functional.linear(x, soma_weight, soma_bias)
    expected = pbfx_kernels.reference.dendrites(soma, x, weight, *links, pbfx_kernels.LINEAR)
    assert torch.equal(out, expected[0])
    assert torch.equal(activations, expected[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op(torch.randn(9, 5), soma_weight, soma_bias, weight, *links, False)
    assert len(launches) == 1
