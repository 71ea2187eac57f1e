"""`python -m benchmarks kernels`: a tiny run on the CPU, and a gate that holds."""

from __future__ import annotations

import argparse
import csv
import math

import pytest
import torch
from torch import Tensor

from benchmarks import kernels, neurons, tune
from benchmarks.environment import COLUMNS
from benchmarks.neurons import Layer
from benchmarks.runner import main
from pbfx_kernels import Geometry

CPU = torch.device("cpu")
TINY = (
    Layer("linear tiny", (5, 4), (6, 4), Geometry()),
    Layer("conv tiny", (2, 4, 5, 5), (6, 2, 3, 3), Geometry.convolution(2, 1, 1, 1, 2)),
    Layer("conv tiny NHWC", (2, 4, 5, 5), (6, 4, 3, 3), Geometry.convolution(2), True),
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LAYERS", TINY)


def test_tiny_run(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    options = ["--dendrites", "0", "2", "--seconds", "0.001", "--out", str(path), "--revision", "a"]
    assert main(["kernels", *options]) == 0
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == (*COLUMNS, *kernels.COLUMNS)
    assert len(rows) == len(TINY) * 2 * len(kernels.MODES) * 4
    assert {row["provider"] for row in rows} == {"plain", "pbfx", "eager loop", "eager packed"}
    assert all(math.isfinite(float(row["us_p50"])) for row in rows)
    assert all(float(row["x_plain"]) == 1 for row in rows if row["provider"] == "plain")
    shares = [row["roofline_share"] for row in rows if row["mode"] == "forward"]
    assert any(shares)
    assert "best rival" in capsys.readouterr().out


@pytest.mark.parametrize("layer", TINY, ids=lambda layer: layer.name)
@pytest.mark.parametrize("mode", kernels.MODES)
def test_the_gate_names_who_is_wrong(layer: Layer, mode: str):
    tensors = neurons.draw(layer, 2, torch.float32, CPU, 0, 1)
    args = argparse.Namespace(compile=False)
    providers = kernels._providers(args, tensors, mode)
    assert kernels.check(tensors, providers, mode, "float32") == []

    def without_links(*arguments: Tensor) -> Tensor:
        return neurons.loop(layer)(*arguments[:-1], torch.zeros_like(arguments[-1]))

    faults = kernels.check(tensors, providers | {"pbfx": without_links}, mode, "float32")
    assert len(faults) == 1
    assert "pbfx" in faults[0]


def test_counts():
    layer = TINY[0]
    assert layer.flops(3) == 2 * 4 * 5 * 6 * 4
    assert layer.elements(3) == 5 * 4 + 4 * 6 * 4 + 5 * 6
    roofline = kernels.Roofline(bandwidth=1.0, rate=1e9)
    assert roofline.seconds(layer, 0, 2) == 2 * layer.elements(0)
    names = [layer.name for layer in neurons.LAYERS]
    assert len(set(names)) == len(names)


def test_tuning_without_the_gpu_that_it_needs(monkeypatch, capsys, tmp_path):
    """The table and the gate, with the loop in the place of the kernel."""
    layer = neurons.LAYERS[8]
    assert layer.name == "linear 128x10x128"
    monkeypatch.setattr(tune, "LAYERS", (layer,))
    assert main(["tune"]) == 2
    assert "Hopper" in capsys.readouterr().err

    def loop(tensors, blocks):
        x, *rest = tensors.inputs[0], tensors.weight, tensors.bias, *tensors.dendrites
        return lambda _: neurons.loop(layer)(x, *rest).detach() * factor

    monkeypatch.setattr(tune, "can_fuse", lambda *_: True)
    monkeypatch.setattr(neurons, "forced", lambda layer, _: neurons.loop(layer))
    monkeypatch.setattr(tune, "_fused", loop)
    path = tmp_path / "tune.csv"
    factor = 1.0
    arguments = ["tune", "--dendrites", "3", "--seconds", "0.01", "--out", str(path)]
    assert main(arguments) == 0
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows][:2] == ["plain", "packed"]
    assert sum(row["chosen"] == "True" for row in rows) == 1
    factor = 1.1
    assert main(arguments) == 1
    assert "output is off" in capsys.readouterr().err
