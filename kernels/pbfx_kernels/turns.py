"""A batch's turn: to learn or only to measure, decided and booked on the device.

A site's candidates keep running moments of the batches they learn from, and held-out moments of
those they only measure. For the t-th batch with sums s (rows of `Moment`):

    measures = t mod m = 0            finite = no sum is infinite or NaN
    held-out += s                     if it measures and is finite
    running   = decay running + s     if it learns and is finite, likewise both numbers of batches
    direction = sign(Cov) / σ_g       ḡ = Σg / P             of the running moments
    β         = Cov / σ_a²            with ā = Σa / P, for candidates that climb the correlation
    share     = usual P / P           what the gradients are divided by, so that a small batch
                                      counts by its size

Nothing here is decided on the host, so one CUDA graph of a training step serves every batch,
whatever its turn. On a GPU one launch books the batch of all sites: their sums are gathered in one
buffer, which the kernel overwrites with the gradient that a loss scaler has to find, zero or, after
an overflow, infinity. Elsewhere, `take_turn` does the same site by site.

Source: Fahlman and Lebiere, *The Cascade-Correlation Learning Architecture*, 1990.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pbfx_kernels.booking import CONSTANT, Memory, Rules, Tables, Verdict
from pbfx_kernels.candidate_autograd import triton_is_there
from pbfx_kernels.moments import Moment


def take_turn(memory: Memory, rules: Rules) -> Verdict:
    """Book one batch of one site, in plain torch; `memory` is edited in place."""
    sums = memory.sums.view_as(memory.running)
    finite = torch.isfinite(sums).all()
    memory.turns.add_(1)
    measures = memory.turns % rules.measure_every == 0
    tested, learnt = finite & measures, finite & ~measures
    steps = learnt & (memory.turns > rules.priming_batches)
    usual = memory.running[Moment.COUNT, 0, 0] / memory.running_batches.clamp_min(1)
    count = torch.where(finite, sums[Moment.COUNT, 0, 0], 0.0)
    share = usual.clamp_min(1) / count.clamp_min(1)
    memory.heldout.add_(torch.where(tested, sums, 0.0))
    memory.heldout_batches.add_(tested)
    # In the memory's dtype: a number on its own would be rounded to float32.
    fade = torch.where(learnt, sums.new_full((), rules.moment_decay), 1.0)
    memory.running.mul_(fade).add_(torch.where(learnt, sums, 0.0))
    memory.running_batches.mul_(fade).add_(learnt)
    _steer(memory)
    for step in memory.steps:
        step.add_(steps)
    overflow = torch.where(finite, 0.0, torch.inf).to(sums.dtype)
    return Verdict(share.float(), (~steps).float(), overflow.expand_as(memory.sums).clone())


def _steer(memory: Memory) -> None:
    """Point each candidate's gradient uphill in |Cov|, in units of the neuron's error.

    Where there is a regression, uphill in the correlation: a candidate that is constant has no
    slope, and climbs the covariance until it varies. Dividing by the error's spread makes the step
    independent of the loss's scale: of batch size, of the number of positions, and of a loss
    scaler.
    """
    count = memory.running[Moment.COUNT].clamp_min(1)
    mean_g = memory.running[Moment.G] / count
    variance_g = (memory.running[Moment.GG] / count - mean_g**2).clamp_min(0)
    mean_a = memory.running[Moment.A] / count
    covariance = memory.running[Moment.AG] / count - mean_a * mean_g
    spread = variance_g.sqrt()
    known = spread > 0
    direction = torch.where(known, covariance.sign() / torch.where(known, spread, 1.0), 0.0)
    # Through `.data`, because graphs of later forwards of the same step may still hold these.
    memory.direction.data.copy_(direction)
    memory.error_mean.data.copy_(mean_g[0])
    if memory.regression is None:
        return
    square_a = memory.running[Moment.AA] / count
    variance_a = square_a - mean_a**2
    varies = variance_a > CONSTANT * square_a
    trend = torch.where(varies, covariance / torch.where(varies, variance_a, 1.0), 0.0)
    memory.regression.data.copy_(torch.stack([trend, mean_a]))


def take_turns(
    memories: Sequence[Memory],
    addresses: Sequence[Tensor | None],
    rules: Rules,
    tables: Tables,
) -> list[Verdict]:
    """Book one batch of several sites on one device, their moments of one dtype.

    Args:
        memories: edited in place.
        addresses: `addresses_of` each of them.
        rules: the same for all.
        tables: remembers the addresses of sites that take their turns together. Keep it as long as
            a CUDA graph that was captured with it.
    """
    if any(address is None for address in addresses):
        return [take_turn(memory, rules) for memory in memories]
    from pbfx_kernels.turns_kernel import table_of, take_turns_fused

    table = table_of([a for a in addresses if a is not None], tables)
    return take_turns_fused(memories, table, rules)


def places(memory: Memory) -> tuple[int, ...]:
    """Return where `memory` lies, this batch's sums aside; what `addresses_of` depends on."""
    return tuple(tensor.data_ptr() for tensor in (*memory.kept, *memory.steps))


def addresses_of(memory: Memory) -> Tensor | None:
    """Return the line about a site that the kernel reads, int64 on its device.

    None where the kernel cannot run: off a GPU, or where memory has gaps. The line holds addresses:
    keep it as long as `places` of the memory stays the same, and no longer.
    """
    dense = all(tensor.is_contiguous() for tensor in memory.kept)
    if not (memory.running.is_cuda and dense and triton_is_there()):
        return None
    from pbfx_kernels.turns_kernel import line_of

    return line_of(memory)
