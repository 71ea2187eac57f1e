"""Small networks, real small tasks, and the training loops that users write around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import pbfx
from pbfx.learning import SiteLearner
from pbfx.parts import network_state

Loss = Callable[[Tensor, Tensor], Tensor]
Epoch = Callable[[nn.Module, Optimizer, "Task"], None]


class Task:
    """Inputs and targets, split into batches by torch's global stream, as a DataLoader does."""

    def __init__(self, x: Tensor, y: Tensor, loss: Loss, batch: int = 32) -> None:
        self.x, self.y, self.loss, self.batch = x, y, loss, batch

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.x)).split(self.batch):
            yield self.x[rows], self.y[rows]

    def loss_of(self, model: nn.Module) -> Tensor:
        return self.loss(model(self.x), self.y)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Return the negative loss in eval mode: larger is better."""
        model.eval()
        return -float(self.loss_of(model))


def regression(rows: int = 256, inputs: int = 6, seed: int = 0, noise: float = 0.05) -> Task:
    """Draw y = a sum of products and sines of x, which a narrow network cannot fit."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=g)
    y = (x[:, :1] * x[:, 1:2] + torch.sin(2 * x[:, 2:3]) + x[:, 3:4]).tanh()
    return Task(x, y + noise * torch.randn(y.shape, generator=g), F.mse_loss)


def images(rows: int = 96, seed: int = 0, batch: int = 16, signal: float = 1.5) -> Task:
    """Draw 8x8 images with a bar at one of three places, in noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % 3
    x = 0.7 * torch.randn(rows, 1, 8, 8, generator=g)
    for row, label in enumerate(y.tolist()):
        x[row, 0, 2 * label + 1] += signal
    return Task(x, y, F.cross_entropy, batch)


class Mlp(nn.Module):
    def __init__(self, inputs: int = 6, hidden: int = 5, outputs: int = 1) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc1(x))
        x = torch.tanh(self.fc2(x))
        return self.head(x)


class Cnn(nn.Module):
    """Everything that a frozen network could move by: norms, dropout, functional dropout."""

    def __init__(self, width: int = 4, outputs: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, bias=False)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(width * 16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        x = self.dropout(torch.tanh(self.conv2(x)))
        x = F.dropout(x.flatten(1), 0.1, self.training)
        return self.head(x)


class Around(nn.Module):
    """A user's own module around a perforated part, with a norm and dropouts of its own."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.part = part
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            raise ValueError("a branch that no trace survives")
        x = self.dropout(self.part(self.norm(x)))
        return self.last(F.dropout(x, 0.5, self.training))


def train(model: nn.Module, optimizer: Optimizer, task: Task) -> None:
    """Train one epoch, as anyone does."""
    model.train()
    for x, y in task.batches():
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        optimizer.step()


def run(
    model: nn.Module, optimizer: Optimizer, tracker: pbfx.Tracker, task: Task, epochs: int = 100
) -> None:
    """Train until the tracker is done, or for so many epochs."""
    for _ in range(epochs):
        if tracker.complete:
            return
        train(model, optimizer, task)
        tracker.step(task.score(model))


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def enter_dendrite_phase(
    model: nn.Module, optimizer: Optimizer, epochs: int = 100, **settings: object
) -> pbfx.Tracker:
    """Make a tracker and grow at once; the dendrite phase then lasts `epochs` steps."""
    policy = pbfx.Interval(1, epochs)
    tracker = pbfx.Tracker(model, optimizer, policy=policy, **settings)
    assert tracker.step(0.0).phase is pbfx.Phase.DENDRITE
    return tracker


def learners(tracker: pbfx.Tracker) -> dict[str, SiteLearner]:
    return dict(tracker._learners)


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def network(model: nn.Module) -> dict[str, Tensor]:
    """Copy every tensor of the network, candidates left out."""
    return copied(network_state(model))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return whether two state dicts hold the same keys and the same bits."""
    return a.keys() == b.keys() and all(identical(a[name], b[name]) for name in a)


def identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((bits(a) == bits(b)).all())


def equal(a: Any, b: Any) -> bool:
    """Return whether two trees of plain data and tensors are the same to the last bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return identical(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out - reference).norm() / reference.norm())
