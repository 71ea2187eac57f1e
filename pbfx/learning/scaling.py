"""Scale candidates that join after a norm, once, while they prime.

    z -> (z - E[z]) / σ_z        by        V -> V / σ_z    U -> U / σ_z    c -> (c - E[z]) / σ_z

(plus the bend of the activation, where candidates are to start there.)

A norm gives its neuron zero mean and unit spread whatever its weight is; nothing does that for a
dendrite, whose activation would be linear or saturated where its preactivation is tiny or huge. A
norm per dendrite would cost parameters, statistics and a pass at inference, and would have to be of
the neuron's kind. Scaling the weights once, from what the first batches show, costs nothing later,
and the candidates then learn from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pbfx.candidates import Candidates, bend_of
from pbfx.config import Config
from pbfx.learning.moments import CONSTANT

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def scaling_batches(config: Config, dendrites: int) -> int:
    """Return how many batches show the scale; the rest of the priming fills the moments anew.

    Args:
        config: says how many batches prime.
        dendrites: how many a site has already.
    """
    return max(1, config.phase(dendrites).priming_batches // 2)


def resume_scaling(pool: Candidates, batches: int, config: Config) -> None:
    """Take up where a pool that has seen so many batches left off."""
    if pool.spread is not None:
        pool.spread.batches = batches
        pool.spread.open = batches < scaling_batches(config, pool.dendrites)


@torch.no_grad()
def scale_candidates(pool: Candidates, config: Config, group: ProcessGroup | None = None) -> None:
    """Fold mean and spread of the preactivations into the weights when enough batches have passed.

    To be called once after each backward pass; the passes are counted here, on the host. What was
    measured of the candidates as they were is forgotten. A candidate whose preactivation does not
    vary stays as it is.

    Args:
        pool: the candidates of a site.
        config: says how many batches show the scale.
        group: of the processes that train the model together. Each sees other batches; the first
            one's show the scale for all.
    """
    spread = pool.spread
    if spread is None or not spread.open:
        return
    spread.batches += 1
    if spread.batches < scaling_batches(config, pool.dendrites):
        return
    spread.open = False
    if group is not None:
        spread.follow(group)
    variance = spread.variance
    varies = variance > CONSTANT * (variance + spread.mean**2)
    scale = torch.where(varies, variance.clamp_min(torch.finfo(variance.dtype).tiny).rsqrt(), 1.0)
    shift = torch.where(varies, spread.mean, 0.0)
    # The mean took it away.
    bend = torch.where(varies, bend_of(config), 0.0)
    unmeasured = pool.best_score == 0
    for name, value in {
        "weight": pool.weight * pool.site.along_weight(scale),
        "bias": None if pool.bias is None else (pool.bias - shift) * scale + bend,
        "to_dendrite": pool.to_dendrite * scale[:, None],
    }.items():
        if value is None:
            continue
        live, best = getattr(pool, name), getattr(pool, f"best_{name}")
        live.copy_(value)
        # What stands in for the best until something has been measured.
        rows = {"bias": unmeasured, "to_dendrite": unmeasured[:, None]}
        best.copy_(torch.where(rows.get(name, pool.site.along_weight(unmeasured)), live, best))
    for sums in (pool.running, pool.running_batches, pool.heldout, pool.heldout_batches):
        sums.zero_()
    # Through `.data`, because graphs of later forwards of the same step may still hold these.
    pool.direction.data.zero_()
    pool.error_mean.data.zero_()
    if pool.regression is not None:
        pool.regression.data.zero_()
