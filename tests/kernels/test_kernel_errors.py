"""What a caller is told: every fault at once, what was expected and what was got."""

import pickle
from typing import Any

import pytest
import torch
from kernel_cases import BY_NAME, make_candidates, make_dendrites

from pbfx_kernels import ArgumentError, Geometry, candidates, dendrites


def _dendrites(**changes: Any) -> None:
    args: dict[str, Any] = dict(make_dendrites(BY_NAME["linear"], 2).args(torch.float32))
    dendrites(**(args | changes))


def _candidates(**changes: Any) -> None:
    args: dict[str, Any] = dict(make_candidates(BY_NAME["linear"], 2, 1).args(torch.float32))
    candidates(**(args | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"to_soma": torch.zeros(2, 5)},
            r"to_soma: expected shape \(D, N\) = \(2, 6\), got \(2, 5\)",
        ),
        ({"bias": torch.zeros(6)}, r"bias: expected shape \(D, N\) = \(2, 6\), got \(6,\)"),
        ({"to_dendrite": torch.zeros(2, 6)}, r"to_dendrite: expected shape \(D, D, N\)"),
        ({"soma": torch.zeros(5, 7)}, r"soma: expected shape of the op's output = \(5, 6\), got"),
        ({"x": torch.zeros(5, 3)}, r"x: expected 4 channels on axis -1, got 3 in shape \(5, 3\)"),
        ({"x": torch.zeros(())}, r"x: expected 1 or more dimensions, got shape \(\)"),
        ({"weight": torch.zeros(6, 4)}, r"weight: expected 3 dimensions, got shape \(6, 4\)"),
        ({"x": torch.zeros(5, 4, dtype=torch.int64)}, r"x: expected a floating-point dtype"),
        ({"x": torch.zeros(5, 4, device="meta")}, r"x: expected on cpu, got meta"),
        ({"activation": "softplus"}, r"activation: expected one of sigmoid, tanh,.*'softplus'"),
        ({"geometry": Geometry.convolution(2)}, r"weight: expected 5 dimensions"),
    ],
)
def test_dendrites_says_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        _dendrites(**changes)
    assert caught.value.where == "pbfx::dendrites"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moments": torch.zeros(6, 2, 6)}, r"moments: expected shape \(6 \* C, N\) = \(12, 6\)"),
        ({"moments": torch.zeros(12, 6).bfloat16()}, r"moments: expected torch.float32 or torch.f"),
        ({"activations": torch.zeros(5, 6)}, r"activations: expected shape \(D, \*neuron\)"),
        ({"to_dendrite": torch.zeros(2, 2, 6)}, r"to_dendrite: .* = \(2, 1, 6\), got \(2, 2, 6\)"),
        ({"direction": torch.zeros(6)}, r"direction: expected shape \(C, N\) = \(2, 6\)"),
        ({"error_mean": torch.zeros(2, 6)}, r"error_mean: expected shape \(N,\) = \(6,\)"),
        ({"regression": torch.zeros(2, 6)}, r"regression: expected .* = \(2, 2, 6\), got \(2, 6\)"),
        ({"neuron": torch.zeros(5, 7)}, r"neuron: expected shape of the op's output"),
        ({"activation": "Tanh"}, r"activation: expected one of"),
    ],
)
def test_candidates_says_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        _candidates(**changes)
    assert caught.value.where == "pbfx::candidates"


def test_all_faults_at_once() -> None:
    with pytest.raises(ArgumentError) as caught:
        _dendrites(to_soma=torch.zeros(2, 5), bias=torch.zeros(6))
    assert len(caught.value.faults) == 2
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("weight", "x", "groups", "message"),
    [
        ((2, 5, 2, 3, 3), (2, 4, 7, 7), 2, r"weight: expected neurons in 2 equal groups, got 5"),
        ((2, 6, 2, 3, 3), (4, 7), 2, r"x: expected 3 or 4 dimensions, got shape \(4, 7\)"),
        ((2, 6, 2, 3, 3), (2, 6, 7, 7), 2, r"x: expected 4 channels on axis -3, got 6"),
    ],
)
def test_convolution_says_what_does_not_fit(
    weight: tuple[int, ...], x: tuple[int, ...], groups: int, message: str
) -> None:
    args = make_dendrites(BY_NAME["conv2d-form"], 2).args(torch.float32)
    changed: dict[str, Any] = {**args, "weight": torch.zeros(weight), "x": torch.zeros(x)}
    with pytest.raises(ArgumentError, match=message):
        dendrites(**changed, geometry=Geometry.convolution(2, groups=groups))


def test_output_padding_stays_below_stride_or_dilation() -> None:
    with pytest.raises(ArgumentError, match=r"less than stride or dilation, got \(2,\) with"):
        Geometry.convolution(1, stride=2, transposed=True, output_padding=2)
    assert Geometry.convolution(1, dilation=3, transposed=True, output_padding=2).transposed


def test_transposed_convolution_says_what_does_not_fit() -> None:
    args = make_dendrites(BY_NAME["transposed2d-form"], 2).args(torch.float32)
    geometry = BY_NAME["transposed2d-form"].geometry
    for name, shape, message in (
        ("weight", (2, 5, 3, 3, 2), "weight: expected channels in 2 equal groups, got 5"),
        ("x", (2, 6, 4, 3), "x: expected 4 channels on axis -3, got 6"),
        ("soma", (2, 6, 4, 3), "soma: expected shape of the op's output = "),
    ):
        changed: dict[str, Any] = {**args, name: torch.zeros(shape)}
        with pytest.raises(ArgumentError, match=message):
            dendrites(**changed, geometry=geometry)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"stride": (1,), "padding": (), "dilation": (1,)}, "the same number of entries, 0 to 3"),
        ({"stride": (0,), "padding": (0,), "dilation": (1,)}, r"stride: expected at least 1, got"),
        ({"stride": (1,), "padding": (-1,), "dilation": (1,)}, r"padding: expected at least 0"),
        ({"groups": 2}, "groups: a linear op has one group, got 2"),
        ({"transposed": True}, "transposed: a linear op has no transposed form"),
        (
            {"stride": (2,), "padding": (0,), "dilation": (1,), "transposed": True},
            r"output_padding: expected 1 entries as for stride, got \(\)",
        ),
        (
            {"stride": (2,), "padding": (0,), "dilation": (1,), "output_padding": (0,)},
            "only a transposed convolution has one",
        ),
        ({"groups": 0}, r"groups: expected at least 1, got \(0,\)"),
    ],
)
def test_geometry_says_what_is_impossible(form: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Geometry(**form)


def test_compile_reports_the_fault() -> None:
    torch._dynamo.reset()
    args = make_dendrites(BY_NAME["linear"], 2).args(torch.float32)
    args["to_soma"] = torch.zeros(2, 5)
    with pytest.raises(RuntimeError, match=r"to_soma: expected shape \(D, N\) = \(2, 6\)"):
        torch.compile(dendrites, backend="aot_eager", fullgraph=True)(**args)


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ArgumentError("pbfx::dendrites", ["x: bad", "y: worse"])))
    assert str(error) == "pbfx::dendrites: x: bad; y: worse"
    assert error.faults == ("x: bad", "y: worse")
