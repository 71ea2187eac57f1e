"""Train epochs with data that lies on the device, a few steps to a CUDA graph.

A step is all that a training loop does: gather the batch, zero the gradients, forward, loss,
backward, optimizer. Which batch it gathers is counted on the device, so the same graph serves every
step. The first steps after each change of the network run eagerly, and count: they load kernels,
fill the optimizer's state, and show candidates behind a norm their scale. What is left is captured,
which runs nothing, and replayed. Without CUDA every step runs eagerly.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.learning.problem import Split, judge, loss_of

Ready = Callable[[], bool]

# Replays between two questions whether the device keeps up: a launch that finds the device's queue
# full waits for it, and with it every other run of the process.
_REPLAYS = 8

EVALUATION_BATCH = 1_000
"""Rows of a forward pass without gradients."""


class Trainer:
    """The training loop of one run.

    Args:
        model: what learns; its parameters may be exchanged between epochs, see `forget`.
        optimizer: steps it. On CUDA it must be capturable, its rates tensors on the device.
        split: on the model's device.
        batch_size: rows a step.
        steps: steps an epoch; None for as many full batches as the split has.
        seed: of the order of rows.
        steps_per_graph: 0 runs all steps eagerly.
        eager_steps: steps after a change of the network that are not captured.
        pool: the graphs' memory pool, see `Lane`; None for one of their own.
        after_backward: called in every step between its backward pass and the optimizer's step; it
            must not wait for the device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        steps: int | None = None,
        steps_per_graph: int = 8,
        eager_steps: int = 4,
        pool: Any = None,
        after_backward: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.optimizer, self.split = model, optimizer, split
        device = split.targets.device
        self.steps = steps or len(split) // batch_size
        captures = device.type == "cuda" and steps_per_graph > 0
        # A single step serves what is left of an epoch.
        self._sizes = sorted({steps_per_graph, 1}, reverse=True) if captures else []
        self._eager_steps, self._pool = eager_steps, pool
        self._after_backward = after_backward
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._generator = torch.Generator(device).manual_seed(seed)
        self._order = torch.zeros(self.steps, batch_size, dtype=torch.int64, device=device)
        self._turn = torch.zeros(1, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), device=device)

    def step(self) -> None:
        """Learn from the next batch."""
        rows = self._order.index_select(0, self._turn).view(-1)
        self._turn.add_(1)
        inputs = self.split.inputs.index_select(0, rows)
        targets = self.split.targets.index_select(0, rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.model(inputs), targets)
        loss.backward()
        self._after_backward()
        self.optimizer.step()
        self._loss.add_(loss.detach())

    def epoch(self, rows: Tensor | None = None) -> Generator[Ready, None, Tensor]:
        """Launch an epoch; return its mean loss `()`, which may not have been computed yet.

        It yields where the device has enough to do: what is yielded says when to go on.

        Args:
            rows: indices of those to learn from, again and again until there are enough for as many
                steps as ever; None for all of the split.
        """
        self.model.train()
        number = len(self.split) if rows is None else len(rows)
        wanted, orders = self._order.numel(), []
        for _ in range(-(-wanted // number)):
            orders.append(
                torch.randperm(number, generator=self._generator, device=self._order.device)
            )
        order = torch.cat(orders)[:wanted]
        self._order.copy_((order if rows is None else rows[order]).view_as(self._order))
        self._turn.zero_()
        self._loss.zero_()
        left = self.steps
        if not self._graphs:
            eager = min(left, self._eager_steps) if self._sizes else left
            for _ in range(eager):
                self.step()
            left -= eager
            if left:
                self._capture()
        before, launched = ready(self._order.device), 0
        for size, graph in self._graphs.items():
            for _ in range(left // size):
                graph.replay()
                launched += 1
                if launched % _REPLAYS == 0:
                    # As much again is on its way, so the device does not run dry.
                    yield before
                    before = ready(self._order.device)
            left %= size
        return self._loss / self.steps

    def forget(self) -> None:
        """Drop what was captured, and the gradients in its memory: the network has changed."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.model.parameters():
            parameter.grad = None
        self._graphs.clear()

    def _capture(self) -> None:
        # Not `torch.cuda.graph`: that waits for the whole device, and so for all runs beside this.
        # A collection during the capture could destroy another run's graph, which CUDA refuses.
        gc.disable()
        try:
            for size in self._sizes:
                graph = torch.cuda.CUDAGraph()
                # Replays of one lane come one after another, and can share memory.
                pool = self._pool or next((g.pool() for g in self._graphs.values()), None)
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    for _ in range(size):
                        self.step()
                finally:
                    graph.capture_end()
                self._graphs[size] = graph
        finally:
            gc.enable()


def ready(device: torch.device) -> Ready:
    """Return whether what has been launched so far is done, as a function to ask."""
    if device.type != "cuda":
        return lambda: True
    event = torch.cuda.Event()
    event.record()
    return event.query


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> Tensor:
    """Return `(2,)`: error in percent and mean cross entropy; perhaps not computed yet."""
    model.eval()
    parts = zip(
        split.inputs.split(EVALUATION_BATCH), split.targets.split(EVALUATION_BATCH), strict=True
    )
    found = torch.stack([judge(model(inputs), targets) for inputs, targets in parts]).sum(0)
    return found / split.targets.numel() * found.new_tensor([100.0, 1.0])
