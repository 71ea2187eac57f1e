"""What booking a batch's turn reads and says, whoever books it; see `turns`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Below this share of E[a²] a variance is rounding error, and a slope would be noise over nothing.
CONSTANT = 1e-5


class Rules(NamedTuple):
    """When candidates measure, when they start to learn, and how fast they forget."""

    measure_every: int
    priming_batches: int
    moment_decay: float


class Memory(NamedTuple):
    """What a site remembers of its batches, and this batch's sums. All on one device.

    Attributes:
        sums: `(6 * C, N)`, this batch's; float32 or float64, as all moments.
        running: `(6, C, N)`, decayed sums of the batches that learnt.
        running_batches: `()`, how many batches those are, decayed likewise.
        heldout: `(6, C, N)`, sums of the batches that only measured.
        heldout_batches: `()`, how many.
        direction: `(C, N)`, sign(Cov) / σ_g.
        error_mean: `(N,)`, ḡ.
        turns: `()`, int64, batches so far.
        steps: `()` each, float32, Adam's counters of the tensors that learn, at most three.
        regression: `(2, C, N)`, β and ā, for candidates that climb the correlation; else None.
    """

    sums: Tensor
    running: Tensor
    running_batches: Tensor
    heldout: Tensor
    heldout_batches: Tensor
    direction: Tensor
    error_mean: Tensor
    turns: Tensor
    steps: tuple[Tensor, ...]
    regression: Tensor | None = None

    @property
    def kept(self) -> list[Tensor]:
        """What stays where it is from batch to batch, Adam's counters aside."""
        regression = () if self.regression is None else (self.regression,)
        return [*self[1:8], *regression]


class Verdict(NamedTuple):
    """What follows from a batch for the site's optimizer, and for the user's.

    Attributes:
        share: `()`, float32, what the gradients have to be divided by.
        idle: `()`, float32, 1 if the candidates must not step (`found_inf` of torch's fused Adam).
        overflow: shape and dtype of the sums: zeros, or infinity if the batch was not finite.
    """

    share: Tensor
    idle: Tensor
    overflow: Tensor


# Lines that make up a table, kept alive as long as it is, and the table.
Tables = dict[tuple[int, ...], tuple[Sequence[Tensor], Tensor]]


def is_capturing(tensor: Tensor) -> bool:
    """Return whether what is done with `tensor` now goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
