"""The data flow of the parts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pbfx.explain.canvas import FAINT, LETTER, LINE, SIZE, STYLES, Canvas, clip
from pbfx.explain.flow import OTHER, SITE, Flow, Step
from pbfx.explain.layout import Layout, Point, place

_ROW, _GAP, _GUTTER, _HEIGHT = 0.42, 0.16, 0.5, 0.2
# Two lines of text.
_TALL = 0.3
_ASPECT = 2.0
_LETTERS = 30
# Names in a row of ops.
_NAMES = 3
_APART = 0.7


def draw_flows(class_name: str, flows: Sequence[Flow]) -> Any:
    """Return a figure of the data flows, each from top to bottom."""
    drawn = [_contract(flow) for flow in flows]
    layouts = [
        place(
            [_width(step) for step in flow.steps],
            flow.edges,
            row=_ROW,
            gap=_GAP,
            gutter=_GUTTER,
            aspect=_ASPECT,
        )
        for flow in drawn
    ]
    titled = len(flows) > 1 or bool(flows[0].path)
    top = min(layout.top for layout in layouts) - _HEIGHT / 2 - (1.5 * LINE if titled else 0)
    bottom = max(layout.bottom for layout in layouts) + _TALL / 2
    titles = [f"{flow.path or class_name} ({flow.rung})" if titled else "" for flow in flows]
    spans = [
        max(layout.right - layout.left, len(title) * LETTER * 1.2)
        for layout, title in zip(layouts, titles, strict=True)
    ]
    kinds = {step.kind for flow in drawn for step in flow.steps}
    right = sum(spans) + _APART * (len(spans) - 1)
    canvas = Canvas(0, right, top, bottom, class_name, kinds)
    x = 0.0
    for flow, layout, title, span in zip(drawn, layouts, titles, spans, strict=True):
        if titled:
            canvas.text(x, top + LINE / 2, title, size=SIZE + 1.5)
        _draw(canvas, flow, layout, x - layout.left + (span - (layout.right - layout.left)) / 2)
        x += span + _APART
    return canvas.figure


def _draw(canvas: Canvas, flow: Flow, layout: Layout, x: float) -> None:
    for (source, reader), route in zip(flow.edges, layout.routes, strict=True):
        points = [(px + x, py) for px, py in route]
        points[0] = points[0][0], points[0][1] + _height(flow.steps[source]) / 2
        points[-1] = points[-1][0], points[-1][1] - _height(flow.steps[reader]) / 2
        _line(canvas, points)
    for step, (cx, y) in zip(flow.steps, layout.centres, strict=True):
        width, height, colour = _width(step), _height(step), STYLES[step.kind][2]
        canvas.box(cx + x, y, width, height, step.kind)
        texts = [text for text in (clip(step.label, _LETTERS), step.detail) if text]
        for number, text in enumerate(texts):
            shift = 0.125 * (number - (len(texts) - 1) / 2)
            size = SIZE if number == 0 else SIZE - 1
            style = {"color": colour, "ha": "center", "va": "center_baseline", "zorder": 4}
            canvas.text(cx + x, y + shift, text, size=size, **style)
        if step.kind == SITE:
            canvas.badge(cx + x - width / 2, y, step.dendrites)


def _line(canvas: Canvas, points: list[Point]) -> None:
    """Draw an edge with an arrow at its end; it leaves and enters every point vertically."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    places, codes = [points[0]], [Path.MOVETO]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 > y0 and abs(x1 - x0) > 1e-6:
            bend = (y1 - y0) * 0.55
            places += [(x0, y0 + bend), (x1, y1 - bend), (x1, y1)]
            codes += [Path.CURVE4] * 3
        else:
            places.append((x1, y1))
            codes.append(Path.LINETO)
    canvas.axes.add_patch(
        FancyArrowPatch(
            path=Path(places, codes),
            arrowstyle="-|>,head_length=2.6,head_width=1.5",
            color=FAINT,
            linewidth=0.8,
            shrinkA=0,
            shrinkB=0,
            joinstyle="round",
            zorder=2,
        )
    )


def _contract(flow: Flow) -> Flow:
    """Return `flow` with each chain of other ops as one step."""
    count = len(flow.steps)
    readers: list[list[int]] = [[] for _ in range(count)]
    sources: list[list[int]] = [[] for _ in range(count)]
    for source, reader in flow.edges:
        readers[source].append(reader)
        sources[reader].append(source)
    chains: list[list[int]] = []
    chain_of: dict[int, list[int]] = {}
    for number, step in enumerate(flow.steps):
        before = sources[number]
        joins = (
            step.kind == OTHER
            and len(before) == 1
            and flow.steps[before[0]].kind == OTHER
            and len(readers[before[0]]) == 1
        )
        if joins:
            chain_of[number] = chain_of[before[0]]
            chain_of[number].append(number)
        else:
            chain_of[number] = [number]
            chains.append(chain_of[number])
    # A chain stands where its last step stood, so that everything it reads comes before it.
    chains.sort(key=lambda chain: chain[-1])
    place_of = {number: at for at, chain in enumerate(chains) for number in chain}
    steps = tuple(_together([flow.steps[number] for number in chain]) for chain in chains)
    edges = {(place_of[a], place_of[b]) for a, b in flow.edges if place_of[a] != place_of[b]}
    return Flow(flow.path, flow.class_name, flow.rung, steps, tuple(sorted(edges)))


def _together(steps: list[Step]) -> Step:
    if len(steps) == 1:
        return steps[0]
    names = [step.label for step in steps]
    if len(names) > _NAMES:
        names = [names[0], f"{len(names) - 2} more", names[-1]]
    return Step(OTHER, " · ".join(names))


def _width(step: Step) -> float:
    letters = max(min(len(step.label), _LETTERS), len(step.detail) * (SIZE - 1) / SIZE)
    badge = 0.14 if step.kind == SITE else 0.0
    return letters * LETTER + 0.14 + badge


def _height(step: Step) -> float:
    return _TALL if step.detail else _HEIGHT
