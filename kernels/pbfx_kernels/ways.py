"""What there is to choose from for a site: strategies, and configurations of their kernels.

The table chooses a strategy, and each kernel its configuration by a function. Here is what else may
be the fastest: the other strategies that know the site, and neighbours of the configuration. A
handful each, because every one is compiled before it is timed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from pbfx_kernels import measured
from pbfx_kernels.depthwise_configs import UNROLLED_TAPS, WARPS, Strips, wide_of
from pbfx_kernels.fused_configs import (
    MOST_DENDRITES,
    Blocks,
    Streams,
    conv2d_blocks,
    linear_blocks,
    neuron_blocks,
    streams_of,
)
from pbfx_kernels.launching import on_device
from pbfx_kernels.problem import Problem
from pbfx_kernels.strategy import Strategy, can_split, can_stream, is_depthwise, launches

W = TypeVar("W")

_SMALLEST = 16
# Rows beyond which reading the weights once per tile of 64 cannot pay.
_MOST_STREAMED = 1024


def fastest_way(
    op: str,
    tensor: Tensor,
    problem: Problem,
    activation: str,
    keep: bool,
    ways: Iterable[tuple[str, W]],
    usual: W,
    run: Callable[[W], object],
) -> W:
    """Return the way that was measured to be the fastest here, or the usual one.

    Args:
        op: `dendrites`, `gradient` or `neuron`, as of `measured.Question`.
        tensor: any of the site's, for its device.
        problem: the site; not empty.
        activation: f, one of `ACTIVATIONS`.
        keep: whether activations are written.
        ways: what there is, with names; not looked at unless times decide.
        usual: what the table chooses.
        run: computes the site in one of the ways.
    """
    if not measured.active():
        return usual
    named = dict(ways)
    device = torch.cuda.get_device_name(tensor.device)
    question = measured.question_of(op, device, problem, activation, keep)
    with on_device(tensor):
        name = measured.fastest(
            question, {name: functools.partial(run, way) for name, way in named.items()}
        )
    return usual if name is None else named[name]


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """A strategy, and the configuration of its kernel where it is not the usual one.

    Attributes:
        strategy: not the reference, unless by a caller's wish.
        blocks: of the *split* kernels, or None for the usual ones.
        strips: of the *depthwise* kernels, likewise.
    """

    strategy: Strategy
    blocks: Blocks | None = None
    strips: Strips | None = None

    @property
    def name(self) -> str:
        """The way in words, such as `split 128x64x32 8 warps 3 stages`."""
        words = [self.strategy.value]
        if self.blocks is not None:
            words.append(_name(self.blocks))
        if self.strips is not None:
            words.append(f"{self.strips.rows}x{self.strips.strips}x{self.strips.neurons}")
        return " ".join(words)


def ways_of(problem: Problem) -> Iterator[Way]:
    """Yield what can compute a site that the kernels know, the usual configurations first.

    Args:
        problem: the site; not empty.
    """
    yield Way(Strategy.PACKED)
    if is_depthwise(problem):
        yield Way(Strategy.DEPTHWISE)
        for strips in _other_strips(problem):
            yield Way(Strategy.DEPTHWISE, strips=strips)
    if can_split(problem) and problem.dendrites <= MOST_DENDRITES:
        yield Way(Strategy.SPLIT)
        for blocks in _other_blocks(problem):
            yield Way(Strategy.SPLIT, blocks)


def _other_strips(problem: Problem) -> Iterator[Strips]:
    wide = wide_of(problem.neurons, problem.channels_last)
    # A longer kernel is looped over, row by row.
    unrolled = problem.taps <= UNROLLED_TAPS**2
    for rows in (1, 2, 4) if unrolled else (1,):
        for each in (4, 8):
            yield Strips(rows, each * 32 * WARPS // wide, wide)


def _other_blocks(problem: Problem) -> Iterator[Blocks]:
    linear = problem.geometry.spatial == 0
    group = problem.neurons // problem.geometry.groups
    shape = problem.positions, group, problem.inputs, problem.dendrites, problem.dtype.itemsize
    usual = linear_blocks(*shape) if linear else conv2d_blocks(*shape)
    change = dataclasses.replace
    yield change(usual, positions=max(_SMALLEST, usual.positions // 2))
    yield change(usual, warps=12 - usual.warps)
    yield change(usual, stages=7 - usual.stages)


def neuron_ways(problem: Problem) -> Iterator[tuple[str, Blocks | Streams | None]]:
    """Yield how one kernel can compute a linear site, by name; None is the usual way."""
    yield "usual", None
    shape = problem.positions, problem.neurons, problem.inputs, problem.dendrites
    if can_stream(problem) and problem.positions <= _MOST_STREAMED:
        yield from ((_streamed_name(each), each) for each in _streams(problem))
    if launches(problem):
        usual = neuron_blocks(*shape, problem.dtype.itemsize)
        change = dataclasses.replace
        others = (
            change(usual, positions=192 - usual.positions),
            change(usual, stages=7 - usual.stages),
            change(usual, warps=4, resident=2),
            change(usual, positions=64, warps=4, stages=4, resident=2),
        )
        yield from ((_name(blocks), blocks) for blocks in dict.fromkeys(others) if blocks != usual)


def _streams(problem: Problem) -> Iterator[Streams]:
    shape = problem.positions, problem.neurons, problem.inputs, problem.dendrites
    usual = streams_of(*shape, problem.dtype.itemsize)
    fewer, change = max(1, usual.splits // 2), dataclasses.replace
    yield from dict.fromkeys(
        (usual, change(usual, stages=7 - usual.stages), change(usual, splits=fewer))
    )


def _streamed_name(streams: Streams) -> str:
    sizes = f"{streams.positions}x{streams.neurons}x{streams.inputs}"
    splits = f" {streams.splits} splits" if streams.splits > 1 else ""
    return f"streamed {sizes} {streams.warps} warps {streams.stages} stages{splits}"


def _name(blocks: Blocks) -> str:
    sizes = f"{blocks.positions}x{blocks.neurons}x{blocks.inputs}"
    programs = f" {blocks.resident} programs" if blocks.resident > 1 else ""
    return f"{sizes} {blocks.warps} warps {blocks.stages} stages{programs}"
