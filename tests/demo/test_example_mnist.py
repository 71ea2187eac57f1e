"""The example runs as it stands, on a handful of made-up digits."""

from __future__ import annotations

import importlib.util
import json
import types
from pathlib import Path

import pytest
from test_demo_data import write_mnist

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mnist.py"


@pytest.fixture(scope="module")
def example() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("example_mnist", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while it is being made.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def test_default_net_is_the_well_known_one(example: types.ModuleType):
    assert sum(parameter.numel() for parameter in example.Net().parameters()) == 1_199_882


def test_defaults_grow_three_times(example: types.ModuleType):
    args = example.parse(["--data-dir", "."])
    assert args.dendrites >= 3
    assert args.epochs == 4 * args.neuron_epochs + 3 * args.dendrite_epochs


def test_every_use_of_pbfx_in_training_is_marked():
    body = EXAMPLE.read_text().partition("def fit(")[2].partition("def parse(")[0]
    for line in body.splitlines():
        if "pbfx." in line or "tracker.step" in line or "tracker.complete" in line:
            assert "# pbfx" in line, line


def test_unknown_arm_is_refused(example: types.ModuleType, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        example.main(["--data-dir", ".", "--arms", "plain,magic"])
    assert "unknown magic" in capsys.readouterr().err


def test_missing_data_is_one_line_and_exit_2(
    example: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert example.main(["--data-dir", str(tmp_path)]) == 2
    assert "lacks 4 of MNIST's four files" in capsys.readouterr().err


def test_three_arms_are_compared(
    example: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_mnist(tmp_path, train=5_064, test=50)
    results = tmp_path / "results.json"
    options = {
        "--data-dir": tmp_path,
        "--arms": "plain,sham,perforated",
        "--width": 0.04,
        "--neuron-epochs": 1,
        "--dendrite-epochs": 1,
        "--dendrites": 1,
        "--batch-size": 32,
        "--json": results,
    }
    assert example.main([str(word) for pair in options.items() for word in pair]) == 0
    shown = capsys.readouterr().out
    assert shown.count("result: arm=") == 3
    assert "perforated - sham" in shown
    assert "dendrite phase" in shown
    runs = json.loads(results.read_text())["runs"]
    assert [run["arm"] for run in runs] == ["plain", "sham", "perforated"]
    assert {run["epochs"] for run in runs} == {3}
