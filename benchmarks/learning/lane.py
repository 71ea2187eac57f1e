"""What a run has to itself beside others in one process: a stream, memory, random numbers.

Dropout draws from the device's default generator and a new layer from the CPU's. While a lane is
active, both are its own; so a run draws the same numbers whatever runs beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Lane:
    """A CUDA stream, memory for graphs, and random streams, used by one run after another.

    Args:
        device: where its runs compute; on the CPU there is neither stream nor memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host: Tensor = torch.Generator().get_state()
        self._generator: torch.Generator | None = None
        self._keeper = None if self.stream is None else self._keep()

    @property
    def pool(self) -> Any:
        """Return the memory pool of this lane's graphs, None on the CPU."""
        return None if self._keeper is None else self._keeper.pool()

    def _keep(self) -> torch.cuda.CUDAGraph:
        """Return a graph that is never replayed.

        As long as one graph lives, its pool does, and what later graphs leave behind is used again.
        A pool of their own for each would fill the GPU's memory: nothing gives those back before an
        allocation fails.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            something = torch.zeros(1, device=self.device)
            graph.capture_begin(capture_error_mode="thread_local")
            something.add_(something + 1)
            graph.capture_end()
        return graph

    def seed(self, seed: int) -> None:
        """Start both random streams anew."""
        self._host = torch.Generator().manual_seed(seed).get_state()
        if self.stream is not None:
            self._generator = torch.Generator(self.device).manual_seed(seed)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let what is launched in the body go to this lane's stream, and draw from its own."""
        host = torch.get_rng_state()
        torch.set_rng_state(self._host)
        try:
            with torch.cuda.stream(self.stream), _drawing_from(self._generator):
                yield
        finally:
            self._host = torch.get_rng_state()
            torch.set_rng_state(host)


@contextmanager
def _drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Make the device's default generator share the state of `generator`.

    The state is shared, not copied: a captured graph keeps to the state that was the default's
    when it was captured, and replays of several lanes do not touch each other's.
    """
    if generator is None:
        yield
        return
    default = torch.cuda.default_generators[generator.device.index or 0]
    outside = default.graphsafe_get_state()
    default.graphsafe_set_state(generator)
    try:
        yield
    finally:
        default.graphsafe_set_state(outside)
