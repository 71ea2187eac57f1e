"""A layer that is registered under two names has its keys twice, its dendrites' too."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx
from pbfx.parts import network_state


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again = self.layer
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.again(F.relu(self.layer(x)))))


def make(model: nn.Module) -> pbfx.Tracker:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 3), max_dendrites=2)


@pytest.fixture(params=["neuron", "dendrite"])
def run(request: pytest.FixtureRequest) -> tuple[nn.Module, pbfx.Tracker]:
    torch.manual_seed(0)
    model = pbfx.transform(Twice())
    tracker = make(model)
    x, y = torch.randn(32, 4), torch.randint(0, 2, (32,))
    while tracker.dendrites < 1 or tracker.phase != request.param:
        F.cross_entropy(model(x), y).backward()
        tracker.step(0.0)
    return model, tracker


def test_the_network_has_no_candidates(run: tuple[nn.Module, pbfx.Tracker]) -> None:
    keys = network_state(run[0])
    assert "again.dendrites.weight" in keys
    assert not [key for key in keys if "candidates" in key]


def test_save_and_load(run: tuple[nn.Module, pbfx.Tracker], tmp_path: Path) -> None:
    model, tracker = run
    pbfx.save(model, tmp_path / "run.safetensors", tracker)
    network = pbfx.load(tmp_path / "run.safetensors", Twice())
    x = torch.randn(8, 4)
    assert torch.equal(network(x), model(x))
    assert network_state(network).keys() == network_state(model).keys()
    other = pbfx.transform(Twice())
    pbfx.load(tmp_path / "run.safetensors", other, make(other))
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
