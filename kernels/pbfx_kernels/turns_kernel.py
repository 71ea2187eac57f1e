"""Book the batch of all sites in one launch; `turns.take_turn` is the specification.

One program per site, which finds the site's tensors by addresses in a table: they stay where they
are from batch to batch, and only the sums, fresh from autograd, have to be gathered. A program
reads the sums twice, first to learn whether all are finite. Floor: a launch. The largest site of a
4096-wide net, four candidates, has 400 KB of sums and as much of moments.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.moments import Moment
from pbfx_kernels.turns import Memory, Rules, Verdict
from pbfx_kernels.walking import on_device

# Columns (candidate, neuron) per step of a program: six rows of sums and six of moments each.
_MOST_COLUMNS = 1024
_WARPS = 8
# Links, bias and weight have one of Adam's counters each.
_STEPS = 3
_COUNT, _A, _AA, _G, _GG, _AG = (tl.constexpr(int(row)) for row in Moment)
_ROWS = tl.constexpr(len(Moment))
# The columns of the table.
_COLUMNS, _NEURONS, _RUNNING, _RUNNING_BATCHES, _HELDOUT, _HELDOUT_BATCHES = (
    tl.constexpr(i) for i in range(6)
)
_DIRECTION, _ERROR_MEAN, _TURNS, _FIRST_STEP = (tl.constexpr(i) for i in range(6, 10))
_FIELDS = tl.constexpr(9 + _STEPS)
_STEP_FIELDS = tl.constexpr(_STEPS)


@triton.jit
def _is_bad(values):
    return ((values != values) | (tl.abs(values) == float("inf"))).to(tl.int32)


@triton.jit
def _take_turns_kernel(
    sums_ptr,
    table_ptr,
    verdict_ptr,
    sites,
    measure_every,
    priming_batches,
    DECAY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    site = tl.program_id(0)
    number = sums_ptr.dtype.element_ty
    before = tl.zeros((), tl.int64)
    for earlier in range(0, site):
        before += tl.load(table_ptr + earlier * _FIELDS + _COLUMNS)
    line = table_ptr + site * _FIELDS
    columns = tl.load(line + _COLUMNS)
    neurons = tl.load(line + _NEURONS)
    sums = sums_ptr + before * _ROWS
    bad = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, columns, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        for row in tl.static_range(_ROWS):
            bad += _is_bad(tl.load(sums + row * columns + at, mask=at < columns, other=0.0))
    finite = tl.max(bad, axis=0) == 0
    counter = tl.load(line + _TURNS).to(tl.pointer_type(tl.int64))
    turn = tl.load(counter) + 1
    measures = turn % measure_every == 0
    learns = finite & (measures == 0) & (turn > priming_batches)
    running = tl.load(line + _RUNNING).to(tl.pointer_type(number))
    running_batches = tl.load(line + _RUNNING_BATCHES).to(tl.pointer_type(number))
    usual = tl.load(running) / tl.maximum(tl.load(running_batches), 1.0)
    count = tl.where(finite, tl.load(sums), 0.0)
    share = tl.maximum(usual, 1.0) / tl.maximum(count, 1.0)
    # What a batch adds to depends on its turn, and how is the same.
    into = tl.load(line + tl.where(measures, _HELDOUT, _RUNNING)).to(tl.pointer_type(number))
    batches = tl.load(line + tl.where(measures, _HELDOUT_BATCHES, _RUNNING_BATCHES))
    batches = batches.to(tl.pointer_type(number))
    # A constant of the kernel: as an argument it would be rounded to float32.
    decay, one = tl.full((), DECAY, number), tl.full((), 1.0, number)
    fade = tl.where(finite & (measures == 0), decay, one)
    batches_now = tl.load(batches) * fade + finite.to(number)
    # Every thread has read the first sum, the first moment and the number of batches.
    tl.debug_barrier()
    direction = tl.load(line + _DIRECTION).to(tl.pointer_type(number))
    error_mean = tl.load(line + _ERROR_MEAN).to(tl.pointer_type(number))
    overflow = tl.where(finite, 0.0, float("inf")).to(number)
    for start in range(0, columns, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        real = at < columns
        for row in tl.static_range(_ROWS):
            place = row * columns + at
            s = tl.where(finite, tl.load(sums + place, mask=real, other=0.0), 0.0)
            total = tl.load(into + place, mask=real, other=0.0) * fade + s
            tl.store(into + place, total, mask=real)
            tl.store(sums + place, overflow + tl.zeros_like(total), mask=real)
            if row == _COUNT:
                p = tl.maximum(total, 1.0)
            elif row == _A:
                mean_a = total / p
            elif row == _G:
                mean_g = total / p
            elif row == _GG:
                spread = tl.sqrt(tl.maximum(total / p - mean_g * mean_g, 0.0))
            elif row == _AG:
                covariance = total / p - mean_a * mean_g
        sign = tl.where(covariance > 0, 1.0, tl.where(covariance < 0, -1.0, 0.0))
        steered = real & (measures == 0)
        known = spread > 0
        uphill = tl.where(known, sign / tl.where(known, spread, 1.0), 0.0)
        tl.store(direction + at, uphill.to(number), mask=steered)
        # The error is the same for all candidates; the first one's row speaks for them.
        tl.store(error_mean + at, mean_g, mask=steered & (at < neurons))
    tl.store(batches, batches_now)
    tl.store(counter, turn)
    for i in tl.static_range(_STEP_FIELDS):
        place = tl.load(line + _FIRST_STEP + i)
        step = place.to(tl.pointer_type(tl.float32))
        there = place != 0
        tl.store(step, tl.load(step, mask=there, other=0.0) + learns.to(tl.float32), mask=there)
    tl.store(verdict_ptr + site, share.to(tl.float32))
    tl.store(verdict_ptr + sites + site, 1.0 - learns.to(tl.float32))


def line_of(memory: Memory) -> Tensor:
    """Return the site's line of the table: sizes and addresses, int64."""
    parts = memory[1:8]
    assert all(part.is_contiguous() for part in parts), "the buffers of candidates are contiguous"
    assert len(memory.steps) <= _STEPS, "weight, bias and links learn"
    columns = memory.running[0].numel()
    steps = [step.data_ptr() for step in memory.steps]
    numbers = [columns, memory.error_mean.numel(), *(part.data_ptr() for part in parts)]
    numbers += steps + [0] * (_STEPS - len(steps))
    assert len(numbers) == _FIELDS.value
    # By fills, each a launch with its number as argument: a copy from the host would wait for the
    # device, or keep host memory alive that a captured graph reads again.
    return torch.cat([memory.turns.new_full((1,), number) for number in numbers])


def take_turns_fused(
    memories: Sequence[Memory], lines: Sequence[Tensor], rules: Rules
) -> list[Verdict]:
    """Do `take_turn` for all `memories` in one launch; they share a device and a dtype.

    Args:
        memories: edited in place; no site is empty.
        lines: `line_of` each of them.
        rules: the same for all.
    """
    sizes = [memory.sums.numel() for memory in memories]
    gathered = torch.cat([memory.sums.reshape(-1) for memory in memories])
    table = torch.cat(list(lines))
    verdict = gathered.new_empty((2, len(memories)), dtype=torch.float32)
    widest = max(sizes) // len(Moment)
    with on_device(gathered):
        _take_turns_kernel[(len(memories),)](
            gathered,
            table,
            verdict,
            len(memories),
            rules.measure_every,
            rules.priming_batches,
            DECAY=rules.moment_decay,
            COLUMNS=min(triton.next_power_of_2(widest), _MOST_COLUMNS),
            num_warps=_WARPS,
        )
    shares, idles = (row.unbind() for row in verdict.unbind())
    return [
        Verdict(share, idle, overflow.view_as(memory.sums))
        for memory, share, idle, overflow in zip(
            memories, shares, idles, gathered.split(sizes), strict=True
        )
    ]
