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


def doubled_replica(model: nn.Module) -> nn.Module:
    """Make a replica as torch's `replicate` does, which knows GPUs only; its tensors are double."""
    replicas = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter * 2)
    return replicas[model]


class Blocks(nn.Module):
    """Containers inside a graph, with a parameter of their own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.fc(x)) * self.scale

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


REPLICATED = {name: SUBJECTS[name] for name in ("functional", "parts", "nested")} | {
    "blocks": Case(Blocks, (5, 4), ())
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", REPLICATED.values(), ids=REPLICATED.keys())
def test_a_replica_runs_the_same_graph_over_other_tensors(case: Case, stage: str):
    model, x = make(case, stage).eval(), case.input()
    before, modules = run(model, x), dict(model.named_modules())
    twin = doubled_replica(model)
    double = make(case, stage).eval()
    with torch.no_grad():
        for parameter in double.parameters():
            parameter.mul_(2)
    assert_equal(run(twin, x), run(double, x))
    # The model is as it was, and its containers still answer for themselves.
    assert_equal(run(model, x), before)
    assert dict(model.named_modules()) == modules


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", REPLICATED.values(), ids=REPLICATED.keys())
def test_replicas_on_a_gpu(case: Case, stage: str):
    model, x = make(case, stage).cuda().eval(), case.input().cuda()
    (replica,) = replicate(model, [0])
    found: list[Tensor] = run(replica, x)
    assert_equal(found, run(model, x))
    assert isinstance(model, pbfx.PerforatedModule) is isinstance(replica, pbfx.PerforatedModule)
