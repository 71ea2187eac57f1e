"""One model in a training loop: its steps, what it says and learns, and a step as a CUDA graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.memory import peak_mib
from benchmarks.models import Batch

# Steps until nothing is compiled, captured or allocated any more.
_WARM = 4


@dataclasses.dataclass(frozen=True)
class Look:
    """What a model made of one batch: its output, and the gradients by names of parameters."""

    output: Tensor
    gradients: dict[str, Tensor]


@dataclasses.dataclass
class Training:
    """A model under one way of running it.

    Attributes:
        model: it.
        call: the model, or what compiles it.
        optimizer: of its parameters.
        loss: from outputs and targets.
        batches: to rotate over.
        device: where all of it lies.
        compile_seconds: what the first call took, if it compiled; caches on disk count.
    """

    model: nn.Module
    call: Callable[..., Tensor]
    optimizer: Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: list[Batch]
    device: torch.device
    compile_seconds: float | None = None
    _turn: int = 0

    def step(self) -> None:
        """Do one training step."""
        self._turn += 1
        x, y = self.batches[self._turn % len(self.batches)]
        # The autocast of a run lies around all of its steps, and only as it ends it would forget
        # the weights that a step has changed.
        torch.clear_autocast_cache()
        self.optimizer.zero_grad()
        self.loss(self.call(x), y).backward()
        self.optimizer.step()

    def look(self, batch: int = 0) -> Look:
        """Compute a batch, without a step.

        A model that drops units out does it in eval mode, because no two ways draw alike.
        """
        self.model.train(not drops_out(self.model))
        x, y = self.batches[batch]
        torch.clear_autocast_cache()
        out = self.call(x)
        self.loss(out, y).backward()
        grads = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        self.model.train()
        return Look(out.detach().clone(), grads)

    def warm(self) -> None:
        """Take steps until they are what they stay."""
        aside = _aside(self.device)
        with torch.cuda.stream(aside):
            for _ in range(_WARM):
                self.step()
        if aside is not None:
            torch.cuda.current_stream(self.device).wait_stream(aside)

    def peak_mib(self) -> float | None:
        """Take a step, and return how many MiB it needs at most; None where there is no GPU."""
        return peak_mib(self.step, self.model, self.optimizer, self.device)

    def captured(self, pool: Any) -> Callable[[], object]:
        """Return the replay of one step: what the device does, without the time of launches.

        Args:
            pool: memory that the graphs of one comparison share, since they are never needed at the
                same time.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.step()
        return graph.replay


def drops_out(model: nn.Module) -> bool:
    """Return whether a training step of `model` draws random numbers."""
    return any(isinstance(m, nn.Dropout | nn.Dropout2d) and m.p > 0 for m in model.modules())


def _aside(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream that has seen all that was asked for so far; none where there is no GPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
