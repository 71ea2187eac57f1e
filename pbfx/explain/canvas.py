"""A page in inches, and the few things that pictures put on it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from pbfx.explain.flow import APART, EDGE, LEFT_OUT, OTHER, SITE

# Okabe and Ito's palette, which colour-blind eyes tell apart too; blue stands for dendrites.
BLUE, ORANGE = "#0072b2", "#d98200"
INK, GREY, FAINT = "#222222", "#767676", "#a3a3a3"
# Face, border, text of each kind of box.
STYLES: dict[str, tuple[str, str, str]] = {
    SITE: ("#d7e8f5", BLUE, INK),
    LEFT_OUT: ("#ffffff", ORANGE, "#6b4a0b"),
    APART: ("#ececec", GREY, INK),
    OTHER: ("#f6f6f6", "#dddddd", GREY),
    EDGE: ("#ffffff", FAINT, GREY),
}
LEGEND = {
    SITE: "site, with its number of dendrites",
    LEFT_OUT: "has parameters, left out",
    APART: "a part of its own, or runs its own forward",
    OTHER: "other ops",
}
SIZE = 7.0
# Inches that a letter takes of the default font, measured on paths of layers and rounded up.
LETTER = 0.0092 * SIZE
MARGIN = 0.25
LINE = 0.24
# A box of the legend, with room before the next.
_KEY = 0.62


class Canvas:
    """A figure whose coordinates are inches, y downwards."""

    def __init__(
        self,
        left: float,
        right: float,
        top: float,
        bottom: float,
        title: str,
        kinds: Collection[str],
    ) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # A page is never too narrow for its title and legend.
        explained = [kind for kind in LEGEND if kind in kinds]
        key = sum(_KEY + len(LEGEND[kind]) * LETTER for kind in explained)
        right = max(right, left + key, left + len(title) * LETTER * 1.5)
        self._left, self._right = left - MARGIN, right + MARGIN
        self._top, self._bottom = top - MARGIN - 2 * LINE, bottom + MARGIN + 2 * LINE
        width, height = self._right - self._left, self._bottom - self._top
        self.figure = Figure(figsize=(width, height))
        FigureCanvasAgg(self.figure)
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set_xlim(self._left, self._right)
        self.axes.set_ylim(self._bottom, self._top)
        self.text(left, top - 1.5 * LINE, title, size=SIZE + 4, weight="bold")
        self._legend(left, bottom + LINE + 0.1, explained)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write text, by default from `x` on and centred on `y`."""
        style = {"fontsize": style.pop("size", SIZE), "color": INK, "va": "center"} | style
        # A dollar sign in a name is no formula.
        self.axes.text(x, y, text, parse_math=False, **style)

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """Draw the box of a kind of step around a centre."""
        from matplotlib.patches import FancyBboxPatch

        face, border, _ = STYLES[kind]
        corner = height / 2 if kind == EDGE else 0.04
        self.axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle=f"round,pad=0,rounding_size={corner}",
                facecolor=face,
                edgecolor=border,
                linewidth=0.7 if kind in (OTHER, EDGE) else 1.0,
                linestyle=(0, (3, 2)) if kind == LEFT_OUT else "solid",
                zorder=3,
            )
        )

    def badge(self, x: float, y: float, dendrites: int) -> None:
        """Draw a site's number of dendrites: a hollow disc for none."""
        from matplotlib.patches import FancyBboxPatch

        text, size = str(dendrites), 0.17
        width = max(size, 0.08 + 0.075 * len(text))
        self.axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - size / 2),
                width,
                size,
                boxstyle=f"round,pad=0,rounding_size={size / 2}",
                facecolor=BLUE if dendrites else "#ffffff",
                edgecolor=BLUE,
                linewidth=0.9,
                zorder=4,
            )
        )
        self.text(
            x,
            y,
            text,
            size=SIZE - 0.5,
            color="#ffffff" if dendrites else BLUE,
            ha="center",
            va="center_baseline",
            weight="bold",
            zorder=5,
        )

    def _legend(self, x: float, y: float, kinds: Sequence[str]) -> None:
        """Explain the kinds of boxes in one line."""
        for kind in kinds:
            self.box(x + 0.17, y, 0.34, 0.15, kind)
            if kind == SITE:
                self.badge(x, y, 1)
            self.text(x + 0.42, y, LEGEND[kind], size=SIZE + 0.5, color=GREY)
            x += _KEY + len(LEGEND[kind]) * LETTER


def clip(text: str, letters: int) -> str:
    """Return `text` with its start left out where it is long: ends of paths tell more."""
    return text if len(text) <= letters else f"…{text[1 - letters :]}"
