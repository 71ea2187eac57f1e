"""Neuron phases in which dendrites' weights train, on a CUDA device: captured, and as on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx
from pbfx import restructure
from pbfx.dendrites import Dendrites

pytestmark = pytest.mark.gpu

WAYS = {
    "newest": {"tuning": "newest"},
    "all": {"tuning": "all"},
    "finishing": {"tuning": "links", "finish": True},
}
ways = pytest.mark.parametrize("way", WAYS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1))


class Run:
    """A network with two dendrites whose links are not zero, and a training step."""

    def __init__(self, way: str, device: str = "cuda") -> None:
        torch.manual_seed(0)
        model = pbfx.grow(pbfx.transform(Net(), pbfx.Config(**WAYS[way])), 2)
        for module in model.modules():
            if isinstance(module, Dendrites):
                nn.init.normal_(module.to_soma, std=0.1)
        if way == "finishing":
            restructure.set_finishing(model, True)
        self.model = model.to(device)
        self.start = copy.deepcopy(self.model.state_dict())
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2
        )
        self.tracker = pbfx.Tracker(self.model, self.optimizer)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def batches(count: int, device: str = "cuda") -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 64, 1, 8, 8, generator=generator)
    y = torch.randint(0, 10, (count, 64), generator=generator)
    return list(zip(x.to(device), y.to(device), strict=True))


@ways
def test_a_captured_step_trains_as_the_step_itself(way: str) -> None:
    eager, graphed, data = Run(way), Run(way), batches(8)
    x, y = (t.clone() for t in data[0])
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for batch in data[:3]:
            x.copy_(batch[0])
            y.copy_(batch[1])
            graphed.step(x, y)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step(x, y)
    for number, batch in enumerate(data):
        eager.step(*batch)
        if number >= 3:
            x.copy_(batch[0])
            y.copy_(batch[1])
            graph.replay()
    found = graphed.model.state_dict()
    for name, wanted in eager.model.state_dict().items():
        # The norm counts batches; all else is made of floats.
        torch.testing.assert_close(found[name], wanted, msg=name)
    check_moved(graphed, way)


@ways
def test_it_trains_as_on_a_cpu(way: str) -> None:
    runs = {device: Run(way, device) for device in ("cpu", "cuda")}
    for device, run in runs.items():
        for batch in batches(4, device):
            run.step(*batch)
        check_moved(run, way)
    found = runs["cuda"].model.state_dict()
    for name, wanted in runs["cpu"].model.state_dict().items():
        torch.testing.assert_close(found[name].cpu(), wanted, msg=name, rtol=1e-3, atol=1e-5)


def check_moved(run: Run, way: str) -> None:
    """Check that of each dendrite's weights those have moved that should have, and no others."""
    for name, module in run.model.named_modules():
        if not isinstance(module, Dendrites):
            continue
        for row, weight in enumerate(module.weight):
            moves = way != "newest" or row == module.count - 1
            assert torch.equal(weight, run.start[f"{name}.weight"][row]) is not moves, (name, row)
