"""Training across restructures, compiled to CUDA graphs, and by regions."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx
from pbfx.backend import compile_graph

pytestmark = pytest.mark.gpu


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.fc(x)))


def losses(options: dict[str, Any] | None) -> list[float]:
    """Train through a dendrite phase and on, and return the loss of every step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Sequential(Block(), Block()), nn.Linear(32, 4))
    model = pbfx.transform(net, pbfx.Config(priming_batches=2)).cuda()
    backend = functools.partial(compile_graph, options=options)
    call = model if options is None else torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    tracker = pbfx.Tracker(call, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=1)
    x = torch.randn(8, 32, 16, device="cuda")
    y = torch.randint(0, 4, (8, 32), device="cuda")
    found = []
    while not tracker.complete:
        model.train()
        for batch, labels in zip(x, y, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(call(batch), labels)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        tracker.step(-found[-1])
    assert tracker.dendrites == 1
    return found


# What torch says of the empty graph that it records first in a process.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize(
    "options", [{"mode": "reduce-overhead"}, {"regional": True}, {"regional": "sites"}]
)
def test_a_run_is_the_eager_one(options: dict[str, Any]) -> None:
    found = losses(options)
    assert found == pytest.approx(losses(None), rel=2e-3, abs=2e-3)
