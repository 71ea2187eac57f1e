"""Place the steps of a data flow from top to bottom, in as many columns as make a page.

Steps stand in layers, each below all that it reads. A long edge runs through a lane: an invisible
cell in every layer that it passes. Layers are ordered by barycentres (Sugiyama 1981) and placed by
least squares: every cell wants to stand in line with its neighbours above and below, cells of a
layer keep their distance, and the best compromise is an isotonic regression.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

Point = tuple[float, float]

# Lanes give way to steps; among themselves they keep straight.
_LANE_WEIGHT = 0.01
_LANE_WIDTH = 0.14
_SWEEPS = 16
# Layers of a column.
_LEAST = 12
# Lines between two columns keep this distance, and so many share the gutter before they overlap.
_SPREAD = 0.045
_SPREADS = 9
# Rows between the end of a column and the line that leads to the next.
_TURN = 0.65


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything stands; y grows downwards.

    Attributes:
        centres: of the steps.
        routes: for each edge the points that it runs through, from centre to centre.
        left: least x of anything.
        right: greatest x of anything.
        top: least y of anything.
        bottom: greatest y of anything.
    """

    centres: tuple[Point, ...]
    routes: tuple[tuple[Point, ...], ...]
    left: float
    right: float
    top: float
    bottom: float


@dataclasses.dataclass(eq=False)
class _Cell:
    """A step, or the place of a lane in one layer."""

    layer: int
    width: float
    weight: float
    x: float = 0.0
    # Neighbours, and what standing in line with each is worth.
    above: list[tuple[_Cell, float]] = dataclasses.field(default_factory=list)
    below: list[tuple[_Cell, float]] = dataclasses.field(default_factory=list)


def place(
    widths: Sequence[float],
    edges: Sequence[tuple[int, int]],
    *,
    row: float,
    gap: float,
    gutter: float,
    aspect: float,
) -> Layout:
    """Return where to draw steps.

    Args:
        widths: of the steps, in an order in which each comes after what it reads.
        edges: pairs of places in `widths`, from earlier to later ones.
        row: distance between two layers.
        gap: least distance between two steps of a layer.
        gutter: distance between two columns.
        aspect: width by height of the page, to aim at.
    """
    steps = [
        _Cell(layer, width, 1.0)
        for layer, width in zip(_ranks(len(widths), edges), widths, strict=True)
    ]
    chains, lanes = _route(steps, edges)
    layers: list[list[_Cell]] = [[] for _ in range(1 + max(cell.layer for cell in steps))]
    for cell in (*steps, *lanes):
        layers[cell.layer].append(cell)
    _order(layers)
    _settle(layers, gap)
    return _paginate(steps, chains, layers, row, gutter, aspect)


def _ranks(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Return the layer of each step: just below the lowest of what it reads."""
    ranks = [0] * count
    readers: list[list[int]] = [[] for _ in range(count)]
    reads: set[int] = set()
    for source, reader in sorted(edges, key=lambda edge: edge[1]):
        ranks[reader] = max(ranks[reader], ranks[source] + 1)
        readers[source].append(reader)
        reads.add(reader)
    for step in reversed(range(count)):
        # What reads nothing stands just above its first reader, not at the top.
        if step not in reads and readers[step]:
            ranks[step] = min(ranks[reader] for reader in readers[step]) - 1
    return ranks


def _route(
    steps: list[_Cell], edges: Sequence[tuple[int, int]]
) -> tuple[list[list[_Cell]], list[_Cell]]:
    """Return for each edge the cells that it runs through, and the lanes among them.

    All edges out of one step share its lane, so that a value with many readers is one line.
    """
    lanes: dict[tuple[int, int], _Cell] = {}
    joined: set[tuple[int, int]] = set()
    chains = []
    for source, reader in edges:
        chain = [steps[source]]
        for layer in range(steps[source].layer + 1, steps[reader].layer):
            lane = lanes.setdefault((source, layer), _Cell(layer, _LANE_WIDTH, _LANE_WEIGHT))
            chain.append(lane)
        chain.append(steps[reader])
        for upper, lower in pairwise(chain):
            if (id(upper), id(lower)) not in joined:
                joined.add((id(upper), id(lower)))
                alike = upper.weight == lower.weight
                worth = 1.0 if alike else _LANE_WEIGHT
                upper.below.append((lower, worth))
                lower.above.append((upper, worth))
        chains.append(chain)
    return chains, list(lanes.values())


def _order(layers: list[list[_Cell]]) -> None:
    """Sort each layer so that lines cross little: lanes to the right where nothing else decides."""
    for layer in layers:
        for place_, cell in enumerate(layer):
            cell.x = float(place_)
    for sweep in range(_SWEEPS):
        downwards = sweep % 2 == 0
        for layer in layers if downwards else reversed(layers):
            # Where nothing is read, a cell stays where it stands.
            keys = {
                id(cell): _mean((n.x for n, _ in (cell.above if downwards else cell.below)), cell.x)
                for cell in layer
            }
            layer.sort(key=lambda cell: (keys[id(cell)], -cell.weight))
            for place_, cell in enumerate(layer):
                cell.x = float(place_)


def _settle(layers: list[list[_Cell]], gap: float) -> None:
    """Give each cell its x."""
    for layer in layers:
        _spread(layer, [cell.x for cell in layer], gap)
    for sweep in range(_SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wishes = []
            for cell in layer:
                around = (*cell.above, *cell.below)
                total = sum(worth for _, worth in around)
                wish = sum(n.x * worth for n, worth in around) / total if total else cell.x
                wishes.append(wish)
            _spread(layer, wishes, gap)
    runs = _runs(layers)
    for _ in range(_SWEEPS):
        wishes_of: dict[int, float] = {}
        for run in runs:
            places = [cell.x for cell in run]
            wish = sum(places) / len(places)
            if run[0].weight < 1:
                # A lane passes the widest step on its way.
                outside = run[0].above[0][0].x
                wish = max(places) if wish >= outside else min(places)
            wishes_of |= {id(cell): wish for cell in run}
        for layer in layers:
            _spread(layer, [wishes_of[id(cell)] for cell in layer], gap)


def _runs(layers: list[list[_Cell]]) -> list[list[_Cell]]:
    """Return the cells in runs that are to be straight lines: lanes, and steps without a fork."""
    runs: list[list[_Cell]] = []
    run_of: dict[int, list[_Cell]] = {}
    for layer in layers:
        for cell in layer:
            above = [c for c, worth in cell.above if worth == 1 and c.weight == cell.weight]
            alone = len(above) == 1 and sum(worth == 1 for _, worth in above[0].below) == 1
            if alone:
                run_of[id(cell)] = run_of[id(above[0])]
                run_of[id(cell)].append(cell)
            else:
                run_of[id(cell)] = [cell]
                runs.append(run_of[id(cell)])
    return runs


def _spread(layer: list[_Cell], wishes: list[float], gap: float) -> None:
    """Place a layer's cells as near to their wishes as order and distances allow.

    With the distances taken off, this is the isotonic regression, by pooling adjacent violators.
    """
    offsets = [0.0]
    for left, right in pairwise(layer):
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + gap)
    pools: list[tuple[float, float, int]] = []
    for cell, wish, offset in zip(layer, wishes, offsets, strict=True):
        value, weight, count = wish - offset, cell.weight, 1
        while pools and pools[-1][0] > value:
            other, more, members = pools.pop()
            value = (value * weight + other * more) / (weight + more)
            weight, count = weight + more, count + members
        pools.append((value, weight, count))
    values = [value for value, _, count in pools for _ in range(count)]
    for cell, value, offset in zip(layer, values, offsets, strict=True):
        cell.x = value + offset


def _paginate(
    steps: list[_Cell],
    chains: list[list[_Cell]],
    layers: list[list[_Cell]],
    row: float,
    gutter: float,
    aspect: float,
) -> Layout:
    """Break the layers into columns, and lead lines from each column to the next."""
    extents = [
        (min(c.x - c.width / 2 for c in layer), max(c.x + c.width / 2 for c in layer))
        for layer in layers
    ]
    crossing = [0] * len(layers)
    for below in range(1, len(layers)):
        crossing[below] = len({id(cell) for cell in layers[below - 1] if cell.below})
    starts = _breaks(crossing, extents, row, gutter, aspect)
    ends = [*starts[1:], len(layers)]
    shifts, rights, x = [], [], 0.0
    for start, end in zip(starts, ends, strict=True):
        low = min(low for low, _ in extents[start:end])
        high = max(high for _, high in extents[start:end])
        shifts.append(x - low)
        rights.append(x + high - low)
        x = rights[-1] + gutter
    column = [sum(start <= layer for start in starts) - 1 for layer in range(len(layers))]
    floors = [(end - start - 1) * row for start, end in zip(starts, ends, strict=True)]

    def point(cell: _Cell) -> Point:
        number = column[cell.layer]
        return cell.x + shifts[number], (cell.layer - starts[number]) * row

    lanes: dict[int, dict[int, int]] = {}
    routes = []
    for chain in chains:
        points = [point(chain[0])]
        for cell, following in pairwise(chain):
            number = column[cell.layer]
            if number != column[following.layer]:
                taken = lanes.setdefault(number, {})
                shift = (taken.setdefault(id(cell), len(taken)) % _SPREADS) * _SPREAD
                middle = rights[number] + gutter / 2 + shift
                below, above = floors[number] + _TURN * row + shift, -_TURN * row - shift
                ahead = point(following)
                points += [
                    (points[-1][0], below),
                    (middle, below),
                    (middle, above),
                    (ahead[0], above),
                ]
            points.append(point(following))
        routes.append(tuple(points))
    most = max((len(taken) for taken in lanes.values()), default=0)
    turn = _TURN * row + _SPREAD * min(most, _SPREADS) if lanes else 0.0
    return Layout(
        tuple(point(cell) for cell in steps),
        tuple(routes),
        left=0.0,
        right=rights[-1],
        top=-turn,
        bottom=max(max(floors), *(floor + turn for floor in floors[:-1]), 0.0),
    )


def _breaks(
    crossing: list[int],
    extents: list[tuple[float, float]],
    row: float,
    gutter: float,
    aspect: float,
) -> list[int]:
    """Return the first layer of each column: near equal columns, broken where few lines cross."""
    count = len(crossing)
    width = max(high - low for low, high in extents) + gutter
    columns = max(1, min(round(math.sqrt(aspect * count * row / width)), count // _LEAST or 1))
    slack = count // columns // 5
    starts = [0]
    for number in range(1, columns):
        ideal = round(number * count / columns)
        window = range(max(starts[-1] + 1, ideal - slack), min(count, ideal + slack + 1))
        if window:
            starts.append(min(window, key=lambda at: (crossing[at], abs(at - ideal))))
    return starts


def _mean(values: Iterable[float], otherwise: float) -> float:
    found = list(values)
    return sum(found) / len(found) if found else otherwise
