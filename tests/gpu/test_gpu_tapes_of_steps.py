"""The ops of two models' training steps: tapes from the second call on, with the bits of bodies."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from test_gpu_tapes import Case, Site, assert_same, beside, deterministic, forget, tapes, whole

from pbfx_kernels import Geometry, launcher
from pbfx_kernels.shares import added

pytestmark = pytest.mark.gpu
_form = Geometry.convolution
SITES = {
    "mnist image": Site((1024, 1, 28, 28), (32, 1, 3, 3), _form(2)),
    "mnist conv": Site((1024, 32, 26, 26), (64, 32, 3, 3), _form(2), True),
    "mnist hidden": Site((1024, 9216), (128, 9216)),
    "mnist classes": Site((1024, 128), (10, 128)),
    "resnet stem": Site((32, 3, 224, 224), (64, 3, 7, 7), _form(2, 2, 3), True),
    "resnet 56": Site((32, 64, 56, 56), (64, 64, 3, 3), _form(2, 1, 1), True),
    "resnet 28, half": Site((32, 64, 56, 56), (128, 64, 3, 3), _form(2, 2, 1), True),
    "resnet 28, shortcut": Site((32, 64, 56, 56), (128, 64, 1, 1), _form(2, 2), True),
    "resnet 7": Site((32, 512, 7, 7), (512, 512, 3, 3), _form(2, 1, 1), True),
    "resnet head": Site((32, 512), (1000, 512)),
}
RUNS = {"whole": whole, "beside": beside}
each_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
each_site = pytest.mark.parametrize("site", SITES.values(), ids=SITES.keys())
# Libraries choose the same algorithm for the same call.
_ = deterministic


def test_tapes_launch_past_tritons_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version not in launcher._KNOWN:
        pytest.skip(f"nothing is known of Triton {triton.__version__}")
    ends: list[Any] = []
    straight = launcher.straight
    monkeypatch.setattr(launcher, "straight", lambda run: ends.append(straight(run)) or ends[-1])
    for name in ("mnist image", "mnist classes", "resnet 56"):
        for seed in range(2):
            beside(Case(SITES[name], torch.bfloat16, 3, seed))
            whole(Case(SITES[name], torch.bfloat16, 3, seed))
    assert ends
    assert None not in ends
    assert any(end.boxes for end in ends)


@pytest.mark.parametrize("shares", [2, 63, 1056, 5408])
def test_shares_are_added(shares: int) -> None:
    partial = torch.randn(shares, 3, 33, device="cuda")
    total, exact = added(partial), partial.double().sum(0)
    assert (total - exact).norm() <= 1e-6 * exact.norm()
    assert torch.equal(added(partial), total)


@pytest.mark.parametrize("name", ["mnist image", "resnet 56"])
def test_boxes_are_where_their_tensors_are(name: str) -> None:
    """More addresses than a launcher remembers, and back to the first."""
    site = SITES[name]
    small = Site((2, *site.x[1:]), site.weight, site.geometry, site.last)
    images = [Case(small, torch.bfloat16, 3, seed) for seed in range(launcher._MOST_ADDRESSES + 3)]
    for _ in range(3):
        whole(images[0])
    found = [whole(case) for case in (*images, images[0])]
    forget()
    for case, each in zip((*images, images[0]), found, strict=True):
        assert_same(each, whole(case))
        forget()


@each_run
@each_site
def test_every_op_is_a_tape_at_its_second_call(
    site: Site, run: Callable[[Case], Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "pbfx_kernels.tape"):
        for seed in range(2):
            run(Case(site, torch.bfloat16, 3, seed))
    made = [tape for op in tapes() for tape in op._tapes.values()]
    assert made
    assert all(map(callable, made)), caplog.text
    case = Case(site, torch.bfloat16, 3, 2)
    found = run(case)
    forget()
    assert_same(found, run(case))
