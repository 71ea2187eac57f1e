"""Write what the tests read of `perforatedai` 3.2.9: files of its own, and its decisions.

    PYTHONPATH=.:kernels:tests python -m compat.make_rival_files

with perforatedai==3.2.9 installed. It overwrites tests/compat/files. Everything there was written
by the package when it was run, but for `expected.safetensors`: an input, and what its model
computed from it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from compat.rival_driver import run
from compat.rival_rules import curve, events, walk

FILES = Path(__file__).with_name("files")
# One, two and three dendrites; all activations but gelu and relu; all forms of layers.
NETWORKS = {
    "mixed-3": {"net": "mixed", "dendrites": 3, "activation": "sigmoid"},
    "normed-2": {"net": "normed", "dendrites": 2, "activation": "tanh"},
    "tokens-1": {"net": "tokens", "dendrites": 1, "activation": "silu"},
}
HISTORY = {"switch_mode": "DOING_HISTORY"}
FIXED = {"switch_mode": "DOING_FIXED_SWITCH"}
# Settings, how many dendrites at most, whether a larger score is better.
SCRIPTS: list[tuple[dict[str, Any], int, bool]] = [
    (HISTORY | {"n_epochs_to_switch": 3}, 100, True),
    (HISTORY | {"n_epochs_to_switch": 2}, 2, True),
    (HISTORY | {"n_epochs_to_switch": 2}, 100, False),
    (HISTORY | {"n_epochs_to_switch": 2, "max_dendrite_tries": 100}, 100, True),
    (HISTORY | {"n_epochs_to_switch": 2, "max_dendrite_tries": 1}, 0, True),
    (HISTORY | {"n_epochs_to_switch": 2, "improvement_threshold": [0.05, 0.0]}, 100, True),
    (HISTORY | {"n_epochs_to_switch": 2, "improvement_threshold_raw": 0.06}, 100, True),
    (HISTORY | {"n_epochs_to_switch": 3, "history_lookback": 2}, 100, True),
    (HISTORY | {"n_epochs_to_switch": 3, "history_lookback": 3}, 100, False),
    (HISTORY | {"n_epochs_to_switch": 2, "initial_history_after_switches": 3}, 100, True),
    (HISTORY | {"n_epochs_to_switch": 2, "initial_history_after_switches": 1}, 1, False),
    (FIXED | {"fixed_switch_num": 3}, 3, True),
    (FIXED | {"fixed_switch_num": 2}, 100, False),
    (FIXED | {"fixed_switch_num": 3, "first_fixed_switch_num": 5}, 100, True),
    (FIXED | {"fixed_switch_num": 4, "first_fixed_switch_num": 4}, 100, True),
    ({"switch_mode": "DOING_SWITCH_EVERY_TIME"}, 4, True),
    ({"switch_mode": "DOING_NO_SWITCH"}, 100, True),
]
# Three random walks, and a curve.
SEEDS = (0, 1, 2, None)


def network_jobs(folder: Path) -> list[dict[str, Any]]:
    return [
        {"kind": "files", "seed": seed, "folder": str(folder / name), **job}
        for seed, (name, job) in enumerate(NETWORKS.items())
    ]


def decision_jobs() -> list[dict[str, Any]]:
    return [
        {
            "kind": "decisions",
            "settings": settings | {"max_dendrites": limit},
            "maximize": maximize,
            "scores": curve(maximize) if seed is None else walk(100 * number + seed, maximize),
        }
        for number, (settings, limit, maximize) in enumerate(SCRIPTS)
        for seed in SEEDS
    ]


def results(jobs: list[dict[str, Any]]) -> list[Any]:
    answers = run(jobs)
    for job, answer in zip(jobs, answers, strict=True):
        if "error" in answer:
            sys.exit(f"{job}: {answer['error']}")
    return [answer["result"] for answer in answers]


def main() -> None:
    results(network_jobs(FILES))
    decided = [events(decisions) for decisions in results(decision_jobs())]
    lines = ",\n".join(json.dumps(found, separators=(",", ":")) for found in decided)
    (FILES / "decisions.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
