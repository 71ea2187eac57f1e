"""Choices by time on hardware: what is timed is right, is kept, and stays out of captures."""

from pathlib import Path

import pytest
import torch
from kernel_cases import BY_NAME, Site, make_dendrites, oracle_dendrites
from tolerances import assert_close

import pbfx_kernels
from pbfx_kernels import Geometry, dendrites, measured

pytestmark = pytest.mark.gpu

PLACES = (
    Site("linear", (300, 96), (40, 96)),
    Site("conv", (2, 48, 9, 9), (32, 48, 3, 3), Geometry.convolution(2, padding=1)),
    Site("depthwise", (2, 24, 9, 9), (24, 1, 3, 3), Geometry.convolution(2, 1, 1, 1, 24)),
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(measured.FOLDER, str(tmp_path))
    monkeypatch.delenv(measured.SWITCH, raising=False)
    monkeypatch.setattr(measured, "_answers", {})


@pytest.mark.parametrize("site", PLACES, ids=lambda site: site.name)
def test_measured_ways_are_right_and_kept(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {n: t.detach().cuda() for n, t in make_dendrites(site, 2).args(torch.bfloat16).items()}
    args["to_soma"].requires_grad_()
    upcast = {name: t.detach().cpu().double() for name, t in args.items()}
    wanted, _ = oracle_dendrites(site, upcast, "tanh")
    with pbfx_kernels.measure():
        out, _ = dendrites(**args, geometry=site.geometry, keep=False)
        assert_close(out.cpu(), wanted)
        out.sum().backward()
    kept = len(list(tmp_path.rglob("*.json")))
    assert kept == len(measured._answers) >= 1
    assert all(measured._answers.values())
    measured._answers.clear()
    monkeypatch.setattr(measured, "seconds_of", lambda _: pytest.fail("measured twice"))
    with pbfx_kernels.measure():
        again, _ = dendrites(**args, geometry=site.geometry, keep=False)
    assert torch.equal(again, out)


def test_a_capture_measures_nothing() -> None:
    site = BY_NAME["linear-63-127"]
    args = {n: t.detach().cuda() for n, t in make_dendrites(site, 2).args(torch.bfloat16).items()}
    eager, _ = dendrites(**args, geometry=site.geometry, keep=False)
    graph = torch.cuda.CUDAGraph()
    with pbfx_kernels.measure(), torch.cuda.graph(graph):
        out, _ = dendrites(**args, geometry=site.geometry, keep=False)
    assert measured._answers == {}
    graph.replay()
    assert torch.equal(out, eager)
