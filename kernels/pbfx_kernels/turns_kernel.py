"""Book the batch of all sites in one launch; `turns.take_turn` is the specification.

One program per site, which finds the site's tensors by addresses in a table: they stay where they
are from batch to batch, and only the sums, fresh from autograd, have to be gathered. A program
reads the sums twice, first to learn whether all are finite. Floor: a launch. The largest site of a
4096-wide net, four candidates, has 400 KB of sums and as much of moments.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.booking import CONSTANT, Memory, Rules, Tables, Verdict, is_capturing
from pbfx_kernels.moments import Moment
from pbfx_kernels.relaunch import Launch
from pbfx_kernels.walking import on_device, power_of_two

# Kernels of as many models' cohorts.
_REMEMBERED = 1024
_MOST_TABLES = 64
# Columns (candidate, neuron) per step of a program: six rows of sums and six of moments each.
_MOST_COLUMNS = 1024
_WARPS = 8
# Links, bias and weight have one of Adam's counters each.
_STEPS = 3
# A line of the table: columns, neurons, addresses of running, running_batches, heldout,
# heldout_batches, direction, error_mean, turns, of the counters, and of the regression.
_FIELDS = 10 + _STEPS


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
    FIELDS: tl.constexpr,
    STEPS: tl.constexpr,
    CONSTANT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # The numbers of rows and fields are written out: what a kernel reads of its module, Triton
    # compares with its old value at every launch.
    site = tl.program_id(0)
    number = sums_ptr.dtype.element_ty
    before = tl.zeros((), tl.int64)
    for earlier in range(0, site):
        before += tl.load(table_ptr + earlier * FIELDS)
    line = table_ptr + site * FIELDS
    columns, neurons = tl.load(line), tl.load(line + 1)
    sums = sums_ptr + before * 6
    bad = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, columns, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        for row in tl.static_range(6):
            bad += _is_bad(tl.load(sums + row * columns + at, mask=at < columns, other=0.0))
    finite = tl.max(bad, axis=0) == 0
    counter = tl.load(line + 8).to(tl.pointer_type(tl.int64))
    turn = tl.load(counter) + 1
    measures = turn % measure_every == 0
    learns = finite & (measures == 0) & (turn > priming_batches)
    running = tl.load(line + 2).to(tl.pointer_type(number))
    running_batches = tl.load(line + 3).to(tl.pointer_type(number))
    usual = tl.load(running) / tl.maximum(tl.load(running_batches), 1.0)
    count = tl.where(finite, tl.load(sums), 0.0)
    share = tl.maximum(usual, 1.0) / tl.maximum(count, 1.0)
    # What a batch adds to depends on its turn, and how is the same.
    into = tl.load(line + tl.where(measures, 4, 2)).to(tl.pointer_type(number))
    batches = tl.load(line + tl.where(measures, 5, 3))
    batches = batches.to(tl.pointer_type(number))
    # A constant of the kernel: as an argument it would be rounded to float32.
    decay, one = tl.full((), DECAY, number), tl.full((), 1.0, number)
    fade = tl.where(finite & (measures == 0), decay, one)
    batches_now = tl.load(batches) * fade + finite.to(number)
    # Every thread has read the first sum, the first moment and the number of batches.
    tl.debug_barrier()
    direction = tl.load(line + 6).to(tl.pointer_type(number))
    error_mean = tl.load(line + 7).to(tl.pointer_type(number))
    where_regression = tl.load(line + 9 + STEPS)
    regression = where_regression.to(tl.pointer_type(number))
    constant = tl.full((), CONSTANT, number)
    overflow = tl.where(finite, 0.0, float("inf")).to(number)
    for start in range(0, columns, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        real = at < columns
        for row in tl.static_range(6):
            place = row * columns + at
            s = tl.where(finite, tl.load(sums + place, mask=real, other=0.0), 0.0)
            total = tl.load(into + place, mask=real, other=0.0) * fade + s
            tl.store(into + place, total, mask=real)
            tl.store(sums + place, overflow + tl.zeros_like(total), mask=real)
            if row == 0:
                p = tl.maximum(total, 1.0)
            elif row == 1:
                mean_a = total / p
            elif row == 2:
                square_a = total / p
            elif row == 3:
                mean_g = total / p
            elif row == 4:
                spread = tl.sqrt(tl.maximum(total / p - mean_g * mean_g, 0.0))
            elif row == 5:
                covariance = total / p - mean_a * mean_g
        sign = tl.where(covariance > 0, 1.0, tl.where(covariance < 0, -1.0, 0.0))
        steered = real & (measures == 0)
        known = spread > 0
        uphill = tl.where(known, sign / tl.where(known, spread, 1.0), 0.0)
        tl.store(direction + at, uphill.to(number), mask=steered)
        # The error is the same for all candidates; the first one's row speaks for them.
        tl.store(error_mean + at, mean_g, mask=steered & (at < neurons))
        fits = steered & (where_regression != 0)
        variance = square_a - mean_a * mean_a
        varies = variance > constant * square_a
        trend = tl.where(varies, covariance / tl.where(varies, variance, 1.0), 0.0)
        tl.store(regression + at, trend.to(number), mask=fits)
        tl.store(regression + columns + at, mean_a, mask=fits)
    tl.store(batches, batches_now)
    tl.store(counter, turn)
    for i in tl.static_range(STEPS):
        place = tl.load(line + 9 + i)
        step = place.to(tl.pointer_type(tl.float32))
        there = place != 0
        tl.store(step, tl.load(step, mask=there, other=0.0) + learns.to(tl.float32), mask=there)
    tl.store(verdict_ptr + site, share.to(tl.float32))
    tl.store(verdict_ptr + sites + site, 1.0 - learns.to(tl.float32))


def line_of(memory: Memory) -> Tensor:
    """Return the site's line of the table: sizes and addresses, int64."""
    parts = memory[1:8]
    assert len(memory.steps) <= _STEPS, "weight, bias and links learn"
    columns = memory.running[0].numel()
    steps = [step.data_ptr() for step in memory.steps]
    numbers = [columns, memory.error_mean.numel(), *(part.data_ptr() for part in parts)]
    numbers += steps + [0] * (_STEPS - len(steps))
    numbers.append(0 if memory.regression is None else memory.regression.data_ptr())
    assert len(numbers) == _FIELDS
    # By fills, each a launch with its number as argument: a copy from the host would wait for the
    # device, or keep host memory alive that a captured graph reads again.
    return torch.cat([memory.turns.new_full((1,), number) for number in numbers])


def table_of(lines: Sequence[Tensor], tables: Tables) -> Tensor:
    """Return the table with these lines, from `tables` if it is there.

    Nothing is ever dropped from `tables`, since a captured graph may read it.
    """
    key = tuple(id(line) for line in lines)
    if key in tables:
        return tables[key][1]
    table = torch.cat(list(lines))
    # What a capture makes holds nothing before the first replay; and sites that are reached in ever
    # other combinations, such as experts, would fill the memory.
    if len(tables) < _MOST_TABLES and not is_capturing(table):
        tables[key] = lines, table
    return table


def take_turns_fused(memories: Sequence[Memory], table: Tensor, rules: Rules) -> list[Verdict]:
    """Do `take_turn` for all `memories` in one launch; they share a device and a dtype.

    Args:
        memories: edited in place; no site is empty.
        table: `table_of` their lines.
        rules: the same for all.
    """
    sizes = [memory.sums.numel() for memory in memories]
    gathered = torch.cat([memory.sums.reshape(-1) for memory in memories])
    verdict = gathered.new_empty((2, len(memories)), dtype=torch.float32)
    launch = _prepare(len(sizes), max(sizes), rules, gathered.dtype, gathered.get_device())
    with on_device(gathered):
        launch(gathered.get_device(), gathered, table, verdict)
    shares, idles = (row.unbind() for row in verdict.unbind())
    return [
        Verdict(share, idle, overflow.view_as(memory.sums))
        for memory, share, idle, overflow in zip(
            memories, shares, idles, gathered.split(sizes), strict=True
        )
    ]


@functools.lru_cache(_REMEMBERED)
def _prepare(sites: int, widest: int, rules: Rules, _: torch.dtype, __: int) -> Launch:
    """Prepare the launch for so many sites, the widest with so many sums of a dtype on a device."""
    columns = min(power_of_two(widest // len(Moment)), _MOST_COLUMNS)
    return Launch(
        _take_turns_kernel,
        (sites, 1),
        (sites, rules.measure_every, rules.priming_batches),
        (rules.moment_decay, _FIELDS, _STEPS, CONSTANT, columns),
        _WARPS,
    )
