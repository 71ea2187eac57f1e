"""Against `perforatedai` 3.2.9 itself, where it can be imported (the `rival` extra)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from compat.make_rival_files import FILES, NETWORKS, SCRIPTS, decision_jobs
from compat.rival_nets import NETS
from compat.rival_rules import events
from pbfx.compat import load_perforatedai

ROOT = Path(__file__).resolve().parents[2]
VERSION = "3.2.9"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("perforatedai") is None,
    reason="perforatedai is not installed; pip install '.[rival]'",
)

ACTIVATIONS = ("sigmoid", "tanh", "relu")


def drive(jobs: list[dict[str, Any]], folder: Path) -> list[Any]:
    """Run the jobs in a process without a terminal."""
    results = folder / "results.json"
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "compat.rival_driver", str(results)],
        input=json.dumps(jobs),
        text=True,
        capture_output=True,
        timeout=600,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(results.read_text())
    for job, answer in zip(jobs, answers, strict=True):
        assert "error" not in answer, f"{job}: {answer['error']}"
    return [answer["result"] for answer in answers]


def test_it_is_the_version_that_the_files_are_of():
    assert metadata.version("perforatedai") == VERSION


@pytest.fixture(scope="module")
def layers(tmp_path_factory) -> Path:
    """Let it write single layers with one to three dendrites, and nets with D as committed."""
    folder = tmp_path_factory.mktemp("layers")
    jobs = [
        {
            **{"kind": "files", "seed": seed, "net": net, "dendrites": dendrites},
            **{"activation": activation, "gradients": True},
            "folder": str(folder / f"{net}-{dendrites}-{activation}"),
        }
        for net in ("linear", "conv")
        for dendrites in (1, 2, 3)
        for seed, activation in enumerate(ACTIVATIONS)
    ]
    jobs += [
        {"kind": "files", "seed": 7, "folder": str(folder / name), **job}
        for name, job in NETWORKS.items()
    ]
    drive(jobs, folder)
    return folder


def ulp(value: Tensor) -> Tensor:
    """Return the distance from each |value| to the next float32."""
    above = torch.nextafter(value.float(), torch.tensor(torch.inf))
    return (above - value.float()).double()


def summands(model: torch.nn.Module, x: Tensor, activation: str) -> Tensor:
    """Return the largest magnitude that adds up to each output, in float64."""
    layer, own = model.layer, model.layer.dendrites

    def op(weight: Tensor, bias: Tensor) -> Tensor:
        if weight.dim() == 2:
            return F.linear(x.double(), weight.double(), bias.double())
        return F.conv2d(x.double(), weight.double(), bias.double(), layer.stride, layer.padding)

    tail = (1,) * (x.dim() - 2)
    function, largest, earlier = getattr(torch, activation), op(layer.weight, layer.bias).abs(), []
    for d in range(own.count):
        z = op(own.weight[d], own.bias[d])
        for e, a in enumerate(earlier):
            z = z + own.to_dendrite[d, e].double().reshape(-1, *tail) * a
        earlier.append(function(z))
        term = own.to_soma[d].double().reshape(-1, *tail) * earlier[-1]
        largest = torch.maximum(largest, term.abs())
    return largest


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dendrites", [1, 2, 3])
@pytest.mark.parametrize("net", ["linear", "conv"])
def test_one_layer_gives_its_bits(layers, net, dendrites, activation):
    """Bit for bit, but for sigmoids of several dendrites, which one ulp may part.

    torch computes a sigmoid by vectors and the end of a row by itself, in another rounding; pbfx
    has the rows of all dendrites in one tensor, so its rows end elsewhere.
    """
    folder = layers / f"{net}-{dendrites}-{activation}"
    tensors = load_file(folder / "expected.safetensors")
    model = load_perforatedai(folder / "best_model.pt", NETS[net]()).eval()
    with torch.no_grad():
        found, wanted = model(tensors["x"]), tensors["y"]
        assert wanted.std() > 0.5
        if activation == "sigmoid" and dendrites > 1:
            apart = (found.double() - wanted.double()).abs()
            bound = ulp(summands(model, tensors["x"], activation))
            assert (apart <= bound).all()
            assert (apart > 0).float().mean() < 0.02
        else:
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dendrites", [1, 2, 3])
@pytest.mark.parametrize("net", ["linear", "conv"])
def test_one_layer_gives_its_gradients(layers, net, dendrites, activation):
    """All that learns in gradient mode, and the input: equal but for the order of sums."""
    folder = layers / f"{net}-{dendrites}-{activation}"
    tensors = load_file(folder / "expected.safetensors")
    model = load_perforatedai(folder / "best_model.pt", NETS[net]())
    x = tensors["x"].requires_grad_()
    model(x).square().sum().backward()
    layer, own = model.layer, model.layer.dendrites
    pairs = {
        "dx": (x.grad, tensors["dx"]),
        "weight": (layer.weight.grad, tensors["grad/layer.main_module.weight"]),
        "bias": (layer.bias.grad, tensors["grad/layer.main_module.bias"]),
        "to_soma": (own.to_soma.grad, tensors[f"grad/layer.dendrites_to_top.{dendrites - 1}"]),
    }
    for d in range(dendrites):
        theirs = "grad/layer.dendrite_module"
        pairs[f"V {d}"] = (own.weight.grad[d], tensors[f"{theirs}.layers.{d}.weight"])
        pairs[f"c {d}"] = (own.bias.grad[d], tensors[f"{theirs}.layers.{d}.bias"])
        if d:
            links = tensors[f"{theirs}.dendrites_to_dendrites.{d}"]
            pairs[f"U {d}"] = (own.to_dendrite.grad[d, :d], links)
    for name, (found, wanted) in pairs.items():
        assert (found - wanted).norm() <= 1e-6 * wanted.norm(), name


@pytest.mark.parametrize("name", NETWORKS)
def test_a_net_that_it_wrote_just_now_gives_its_outputs(layers, name):
    tensors = load_file(layers / name / "expected.safetensors")
    net = NETS[NETWORKS[name]["net"]]()
    found = load_perforatedai(layers / name / "best_model.pt", net).eval()(tensors["x"])
    assert (found - tensors["y"]).norm() < 1e-6 * tensors["y"].norm()


def test_it_still_decides_what_is_recorded(tmp_path):
    recorded = json.loads((FILES / "decisions.json").read_text("utf-8"))
    # One script of each setting, since each takes half a second.
    rows = range(0, len(recorded), len(recorded) // len(SCRIPTS))
    jobs = decision_jobs()
    found = drive([jobs[row] for row in rows], tmp_path)
    assert [events(decisions) for decisions in found] == [recorded[row] for row in rows]
