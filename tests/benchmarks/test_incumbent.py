"""`perforatedai` as a provider, where it is installed: everybody's weights, everybody's gate."""

from __future__ import annotations

import csv
import importlib.util

import pytest

from benchmarks import incumbent, runner

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(incumbent.NAME) is None,
    reason="perforatedai is not installed; pip install '.[rival]'",
)


def rows(tmp_path, *arguments: str) -> list[dict[str, str]]:
    path = tmp_path / "rows.csv"
    assert runner.main([*arguments, "--threads", "1", "--out", str(path)]) == 0
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["provider"] == incumbent.NAME]


@pytest.mark.filterwarnings("ignore")
def test_single_layers(tmp_path):
    layers = ["linear 128x10x128", "mnist conv1 b64"]
    arguments = ["kernels", "--layers", *layers, "--dendrites", "0", "1", "3", "--seconds", "0.01"]
    found = rows(tmp_path, *arguments)
    # One linear layer, one convolution in two layouts; three D, forward and step.
    assert len(found) == 3 * 3 * 2
    assert all(float(row["us_p50"]) > 0 for row in found)


@pytest.mark.filterwarnings("ignore")
def test_whole_models(tmp_path):
    arguments = ["step", "--models", "mnist", "mlp", "--width", "0.1", "--dendrites", "0", "2"]
    found = rows(tmp_path, *arguments, "--batch-size", "4", "--seconds", "0.01")
    assert len(found) == 2 * 2 * 2
