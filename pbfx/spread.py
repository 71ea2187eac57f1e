"""The mean and the variance of preactivations, over as many batches as it is open for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pbfx.copies import Filling

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Spread(nn.Module):
    """Running mean and variance of the preactivations of C candidates on N neurons.

    Batches are merged by their means and squared deviations, which loses nothing where the mean is
    large against the spread. Nothing is read back to the host.

    Args:
        candidates: C.
        neurons: N.
        like: for the device.
        dtype: of the sums.
        filling: writes their first zeros, with those of others; here if None.

    Source: Chan, Golub and LeVeque, *Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances*, 1979.
    """

    open: bool
    batches: int
    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(
        self,
        candidates: int,
        neurons: int,
        like: Tensor,
        dtype: torch.dtype,
        filling: Filling | None = None,
    ) -> None:
        super().__init__()
        # Told by the host, so that a graph has the measurement or has it not.
        vars(self).update(open=True, batches=0)
        memory = Filling() if filling is None else filling
        for name, shape in {
            "count": (),
            "mean": (candidates, neurons),
            "squares": (candidates, neurons),
        }.items():
            self._buffers[name] = memory.zeros(like, shape, dtype)
        if filling is None:
            memory.fill()

    @torch.no_grad()
    def add(self, z: Tensor, channel_axis: int) -> None:
        """Take in a batch of preactivations.

        Args:
            z: (C, *neuron).
            channel_axis: axis of the neurons, negative.
        """
        if not z.numel():
            return
        channel = z.dim() + channel_axis
        rows = z.to(self.mean.dtype).movedim(channel, 1)
        # A sample without a batch and without space is one position.
        rows = rows.flatten(2) if rows.dim() > 2 else rows[..., None]
        positions = rows.shape[2]
        variance, mean = torch.var_mean(rows, 2, correction=0)
        # A batch that overflowed says nothing about the next one.
        weight = torch.isfinite(variance).all() * positions
        variance, mean = variance.nan_to_num(0, 0, 0), mean.nan_to_num(0, 0, 0)
        total = self.count + weight
        delta = mean - self.mean
        share = weight / total.clamp_min(1)
        self.squares.add_(variance * weight + delta**2 * self.count * share)
        self.mean.add_(delta * share)
        self.count.copy_(total)

    def follow(self, group: ProcessGroup) -> None:
        """Take over what the first rank of a process group has measured."""
        first = dist.get_global_rank(group, 0)
        for sums in (self.count, self.mean, self.squares):
            dist.broadcast(sums, first, group=group)

    @property
    def variance(self) -> Tensor:
        """Population variance (C, N), zero where nothing was measured."""
        return self.squares / self.count.clamp_min(1)
