"""The learners whose errors arrive in the same backward passes, and step together at their end.

A hook that acted for each site as its gradients come would launch every kernel once per site. So a
hook only notes that its site was reached, and the first one of a pass asks the autograd engine to
call back when the pass is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Variable


class Cohort:
    """Collects, per backward pass, who was reached.

    Args:
        act: called at the end of each pass, before `backward()` returns, with all that were reached
            in it, in the order of their arrival.
    """

    def __init__(self, act: Callable[[Sequence[Any]], None]) -> None:
        self._act = act
        self._reached: dict[int, list[Any]] = {}

    def reach(self, member: Any) -> None:
        """Note that the backward pass that is running has reached `member`, once per pass."""
        # Passes nest (reentrant checkpointing), and one that breaks off never calls back.
        now = torch._C._current_graph_task_id()
        if now not in self._reached:
            self._reached[now] = []
            Variable._execution_engine.queue_callback(lambda: self._wait(now))
        self._reached[now].append(member)

    def _wait(self, now: int) -> None:
        """Let others that were called back at the end of the pass go first.

        DistributedDataParallel writes the averaged gradients then, and has asked later than we did.
        """
        Variable._execution_engine.queue_callback(lambda: self._act(self._reached.pop(now)))

    def forget(self) -> None:
        """Drop what passes that broke off have left behind."""
        self._reached.clear()
