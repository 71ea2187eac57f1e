"""Draw what `python -m benchmarks kernels` measured, from its CSV file and nothing else.

`python -m benchmarks.kernels_plot --help` says how.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import kernels_summary
from benchmarks.environment import DTYPES, ROOT
from benchmarks.layer_providers import (
    COMPILED,
    INDUCTOR,
    LOOP,
    MODES,
    PACKED_INDUCTOR,
    PBFX,
    PLAIN,
)

RESULTS = ROOT / "benchmarks" / "results" / "kernels.csv"
IMAGE = ROOT / "docs" / "kernels.svg"
_ROOFLINE = "roofline"
_PROVIDERS = (PBFX, COMPILED, INDUCTOR, PACKED_INDUCTOR, LOOP, _ROOFLINE)
_DENDRITES = 3
_INCHES_AROUND, _INCHES_A_LINE = 1.5, 0.18


def latest(rows: Sequence[dict[str, str]], dtype: str, mode: str) -> dict[str, dict[str, float]]:
    """Return microseconds by layer and provider, and the roofline's.

    Of which run: see `kernels_summary.compared`.
    """
    wanted = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
    found: dict[str, dict[str, float]] = {}
    for (layer, dendrites), case in kernels_summary.compared(wanted).items():
        if dendrites == _DENDRITES and PLAIN in case:
            found[layer] = {name: float(row["us_p50"]) for name, row in case.items()}
            if PBFX in case and (floor := case[PBFX]["roofline_us"]):
                found[layer][_ROOFLINE] = float(floor)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the forward and the step at D = 3, as multiples of the plain layer."""
    parser = argparse.ArgumentParser("python -m benchmarks.kernels_plot", description=main.__doc__)
    parser.add_argument("source", type=Path, nargs="?", default=RESULTS, metavar="CSV")
    parser.add_argument("image", type=Path, nargs="?", default=IMAGE, metavar="IMAGE")
    parser.add_argument("dtype", nargs="?", default="bfloat16", choices=DTYPES, metavar="DTYPE")
    args = parser.parse_args(argv)
    import matplotlib

    matplotlib.use("Agg")
    # The same file from the same rows, on every machine.
    matplotlib.rcParams.update({"svg.hashsalt": "pbfx", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    with args.source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    measured = {mode: latest(rows, args.dtype, mode) for mode in MODES[:2]}
    # A layer has one line in both.
    layers = dict.fromkeys(layer for times in measured.values() for layer in times)
    places = {layer: place for place, layer in enumerate(layers)}
    size = 11, _INCHES_AROUND + _INCHES_A_LINE * len(layers)
    figure, panels = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for panel, (mode, times) in zip(panels, measured.items(), strict=True):
        for provider in _PROVIDERS:
            points = [
                (values[provider] / values[PLAIN], places[layer])
                for layer, values in times.items()
                if provider in values
            ]
            if points:
                marker = "|" if provider == _ROOFLINE else "o"
                panel.plot(*zip(*points, strict=True), marker, label=provider, alpha=0.8)
        panel.set_yticks(range(len(places)), list(places))
        panel.set_xscale("log")
        panel.set_xlabel(f"{mode}, D = {_DENDRITES}: times the plain layer")
        panel.grid(axis="x", which="both", alpha=0.3)
    panels[0].set_ylim(len(places) - 0.5, -0.5)
    # A provider may have no points in one of them.
    named = {t: h for p in panels for h, t in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside lower center", ncols=len(named))
    figure.suptitle(f"{rows[-1]['device']}, {args.dtype}, torch {rows[-1]['torch']}")
    figure.savefig(args.image, metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
