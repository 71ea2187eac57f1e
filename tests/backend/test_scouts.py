"""Processes that lower graphs ahead: they save work, and what fails in them is done here."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache

import pbfx
from pbfx.backend import compile_graph, scouts
from pbfx.backend.regions import forget_regions
from pbfx.backend.scouts import await_scouts, send_scouts

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="scouts are forked on Linux"),
]
needs_cxx = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")),
    reason="Inductor needs a C++ compiler",
)


@pytest.fixture(autouse=True)
def four_workers():
    with torch._inductor.config.patch(compile_threads=4, force_disable_caches=False):
        yield


def test_each_job_but_the_first_is_done_once_and_elsewhere(tmp_path: Path):
    def job(number: int) -> Callable[[], object]:
        return lambda: (tmp_path / str(number)).open("a").write(f"{os.getpid()} ")

    found = send_scouts([job(number) for number in range(6)], {})
    await_scouts(found)
    assert len(found) == 3
    done = {path.name: path.read_text().split() for path in tmp_path.iterdir()}
    assert done.keys() == {"1", "2", "3", "4", "5"}
    assert {int(pid) for (pid,) in done.values()} == set(found)
    assert os.getpid() not in found


def test_scouts_that_fail_or_are_stuck_hold_nobody_up(monkeypatch, caplog):
    monkeypatch.setattr(scouts, "_PATIENCE", 0.3)
    caplog.set_level("INFO", "pbfx.backend.scouts")

    def fails() -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    def is_stuck() -> None:
        time.sleep(1e6)

    found = send_scouts([fails, fails, is_stuck], {})
    await_scouts(found)
    assert len(found) == 2
    assert sum("has failed" in record.message for record in caplog.records) == 2
    for pid in found:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("jobs", "config", "options"),
    [
        (1, {}, {}),
        (0, {}, {}),
        (3, {"compile_threads": 1}, {}),
        (3, {"force_disable_caches": True}, {}),
        (3, {"fx_graph_cache": False}, {}),
        (3, {}, {"max_autotune": True}),
        (3, {"coordinate_descent_tuning": True}, {}),
    ],
)
def test_where_scouts_could_not_help_there_are_none(jobs: int, config, options):
    with torch._inductor.config.patch(**config):
        assert send_scouts([lambda: pytest.fail("was sent")] * jobs, options) == []


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)
        self.act = nn.Tanh()

    def forward(self, x):
        return self.act(self.fc(x))


@needs_cxx
@pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores")
def test_regions_are_found_in_the_caches():
    torch.manual_seed(0)
    sizes = 3, 5, 7
    plain = nn.Sequential(*(Block(a, b) for a, b in itertools.pairwise(sizes)))
    model = pbfx.grow(pbfx.transform(nn.Sequential(plain)))
    x = torch.randn(4, 3)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(model(x).sum(), learnt)
    torch._dynamo.reset()
    forget_regions()
    with fresh_inductor_cache():
        counters.clear()
        call = torch.compile(
            model, backend=lambda gm, inputs: compile_graph(gm, inputs, options={"regional": True})
        )
        found = torch.autograd.grad(call(x).sum(), learnt)
        # Two regions, of which this process has lowered the first.
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
        assert counters["aot_autograd"]["autograd_cache_miss"] == 1
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
