"""Draw what `python -m benchmarks kernels` measured, from its CSV file and nothing else.

python -m benchmarks.kernels_plot [CSV] [IMAGE]
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "kernels.csv"
IMAGE = ROOT / "docs" / "kernels.svg"
_PROVIDERS = ("pbfx", "inductor", "packed + inductor", "eager loop")


def latest(
    rows: Sequence[dict[str, str]], dendrites: str, mode: str
) -> dict[str, dict[str, float]]:
    """Return microseconds by layer and provider: of each layer, the rows of its latest run."""
    found: dict[str, dict[str, float]] = {}
    newest: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["utc"]):
        if (row["dendrites"], row["mode"]) != (dendrites, mode):
            continue
        layer, run = row["layer"], row["utc"] + row["revision"]
        if newest.get(layer) != run:
            newest[layer], found[layer] = run, {}
        found[layer][row["provider"]] = float(row["us_p50"])
        if row["provider"] == "pbfx" and row["roofline_us"]:
            found[layer]["roofline"] = float(row["roofline_us"])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the forward and the step at D = 3, as multiples of the best rival."""
    import matplotlib

    matplotlib.use("Agg")
    # The same file from the same rows, on every machine.
    matplotlib.rcParams.update({"svg.hashsalt": "pbfx", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    arguments = list(sys.argv[1:] if argv is None else argv)
    source = Path(arguments[0]) if arguments else RESULTS
    image = Path(arguments[1]) if len(arguments) > 1 else IMAGE
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure, panels = plt.subplots(1, 2, figsize=(11, 6), sharey=True, layout="constrained")
    for panel, mode in zip(panels, ("forward", "step"), strict=True):
        times = latest(rows, "3", mode)
        for provider in (*_PROVIDERS, "roofline"):
            points = [
                (values[provider] / values["plain"], place)
                for place, values in enumerate(times.values())
                if provider in values
            ]
            if points:
                marker = "|" if provider == "roofline" else "o"
                panel.plot(*zip(*points, strict=True), marker, label=provider, alpha=0.8)
        panel.set_yticks(range(len(times)), list(times))
        panel.set_xscale("log")
        panel.set_xlabel(f"{mode}, D = 3: times the plain layer")
        panel.grid(axis="x", which="both", alpha=0.3)
    panels[0].invert_yaxis()
    panels[0].legend()
    figure.suptitle(f"{rows[-1]['device']}, {rows[-1]['dtype']}, torch {rows[-1]['torch']}")
    figure.savefig(image, metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
