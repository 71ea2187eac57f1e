"""Wrappers that run a model in several places find in a transformed one what they look for."""

from __future__ import annotations

import socket

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel, replicate

import pbfx
from models import Case, assert_equal, run
from subjects import STAGES, SUBJECTS, gradients, loss_of, make


@pytest.fixture
def group():
    """A process group of this process alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["functional", "parts", "nested"])
def test_distributed_data_parallel_gives_the_same_gradients(group, name: str, stage: str):
    case = SUBJECTS[name]
    model, x = make(case, stage), case.input()
    loss_of(model, x).backward()
    expected = gradients(model)
    model.zero_grad()
    wrapped = DistributedDataParallel(model)
    loss_of(wrapped, x).backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    names = [name.removeprefix("module.") for name in wrapped.state_dict()]
    assert names == list(model.state_dict())


def test_data_parallel_without_devices_calls_the_model():
    case = SUBJECTS["parts"]
    model, x = make(case, "grown").eval(), case.input()
    assert_equal(run(DataParallel(model), x), run(model, x))


@pytest.mark.parametrize("stage", STAGES)
def test_a_replica_runs_the_same_graph_over_other_tensors(stage: str):
    """As torch's `replicate` makes it: a shallow twin, whose tensors it then exchanges."""
    case = SUBJECTS["functional"]
    model, x = make(case, stage).eval(), case.input()
    twin = model._replicate_for_data_parallel()
    for name, parameter in model._parameters.items():
        setattr(twin, name, parameter * 2)
    assert twin._is_replica
    assert_equal(run(twin, x), run(scaled(case, stage), x))
    assert not any(name in twin._parameters for name in model._parameters)
    assert_equal(run(model, x), run(make(case, stage).eval(), x))


def scaled(case: Case, stage: str) -> nn.Module:
    model = make(case, stage).eval()
    with torch.no_grad():
        for parameter in model._parameters.values():
            parameter.mul_(2)
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["functional", "parts", "nested"])
def test_replicas_on_a_gpu(name: str, stage: str):
    case = SUBJECTS[name]
    model, x = make(case, stage).cuda().eval(), case.input().cuda()
    (replica,) = replicate(model, [0])
    found: list[Tensor] = run(replica, x)
    assert_equal(found, run(model, x))
    assert isinstance(model, pbfx.PerforatedModule) is isinstance(replica, pbfx.PerforatedModule)
