"""The decisions of `perforatedai` and of `pbfx.compat.decisions` as one function, with switches.

Each `Difference` is one rule in which the two part. With all of them the function predicts what the
other package was seen to decide, with none of them what pbfx decides: so the list is complete for
the sequences that the tests compare.
"""

from __future__ import annotations

import enum
import random
from typing import Any

from pbfx.compat.decisions import DEFAULTS

SCORES = 30
# Steps of a random walk: none, large, within the relative thresholds, within the absolute one.
STEPS = (0.0, 0.0, 0.0, 0.05, -0.05, 0.02, 0.0004, 0.00003, 0.000008)
HISTORY, FIXED, EVERY = "DOING_HISTORY", "DOING_FIXED_SWITCH", "DOING_SWITCH_EVERY_TIME"


class Difference(enum.Enum):
    """What it does, and pbfx does not."""

    # In history and fixed mode the very first score counts for nothing.
    FIRST_SCORE = "first score"
    # So do the first `initial_history_after_switches` scores of a phase.
    HISTORY = "initial history"
    # The smoothed score is r <- r (1 - 1/n) + s/n from r = 0, not the mean of the last n.
    AVERAGE = "average"
    # Networks are compared by the last score that passed the threshold, not by the best score.
    PASSED = "passed scores"
    # Tries are counted over the whole run, not set by set.
    RUN_TRIES = "tries of the run"


ALL = frozenset(Difference)


def walk(seed: int, maximize: bool) -> list[float]:
    """Return a random walk of scores, the same on every machine."""
    draw, score, scores = random.Random(seed), 0.5, []
    for _ in range(SCORES):
        step = STEPS[int(draw.random() * len(STEPS))]
        score = max(score + (step if maximize else -step), 0.01)
        scores.append(round(score, 6))
    return scores


def curve(maximize: bool) -> list[float]:
    """Return scores as training gives them: fast at first, then level to two digits."""
    rising = [0.9 - 0.5 * 0.8**epoch for epoch in range(SCORES)]
    return [round(score if maximize else 1 - score, 2) for score in rising]


def value(settings: dict[str, Any], name: str, dendrites: int = 0) -> Any:
    """Return a setting, or its default, at so many dendrites."""
    found = settings.get(name, DEFAULTS[name])
    return found[min(dendrites, len(found) - 1)] if isinstance(found, list) else found


def decide(
    settings: dict[str, Any],
    scores: list[float],
    maximize: bool,
    differences: frozenset[Difference] = ALL,
    max_dendrites: int = 100,
) -> list[list[int]]:
    """Return [restructured, complete, dendrites] after each score, until it is complete."""
    mode = value(settings, "switch_mode")

    def beats(new: float, old: float | None, dendrites: int) -> bool:
        if old is None:
            return True
        relative = value(settings, "improvement_threshold", dendrites) * abs(old)
        margin = max(relative, value(settings, "improvement_threshold_raw", dendrites))
        return new > old + margin if maximize else new < old - margin

    decisions: list[list[int]] = []
    dendrites = failures = 0
    accepted: float | None = None
    first, phase, average, best, at, helped = True, [], 0.0, None, 0, False
    for score in scores:
        phase.append(score)
        epoch = len(phase) - 1
        lookback = value(settings, "history_lookback", dendrites)
        history = value(settings, "initial_history_after_switches", dendrites)
        patience = value(settings, "n_epochs_to_switch", dendrites)
        if Difference.AVERAGE in differences:
            average = average * (1 - 1 / lookback) + score / lookback
        else:
            window = phase[-lookback:]
            average = sum(window) / len(window)
        skipped = history if Difference.HISTORY in differences else 0
        if first and mode != EVERY and Difference.FIRST_SCORE in differences:
            skipped += 1
        if epoch < skipped:
            at = epoch
        elif beats(average, best, dendrites):
            best, at = average, epoch
            if Difference.PASSED in differences and beats(average, accepted, dendrites):
                accepted, helped = average, True
        if mode == HISTORY:
            waited = epoch - at >= patience and epoch >= skipped
            early = history and Difference.HISTORY not in differences
            switches = waited and not (early and epoch < history + patience)
        elif mode == FIXED:
            length = usual = value(settings, "fixed_switch_num", dendrites)
            wanted = value(settings, "first_fixed_switch_num")
            if first and wanted > usual:
                length = -(-wanted // usual) * usual
            switches = len(phase) >= length
        else:
            switches = mode == EVERY
        if not switches:
            decisions.append([0, 0, dendrites])
            continue
        top = max(phase) if maximize else min(phase)
        if Difference.PASSED not in differences:
            helped = beats(top, accepted, dendrites)
            accepted = top if helped else accepted
        if not first and not helped:
            failures += 1
            if failures >= value(settings, "max_dendrite_tries", dendrites):
                return [*decisions, [1, 1, dendrites - 1]]
        elif dendrites >= max_dendrites:
            return [*decisions, [1, 1, dendrites]]
        else:
            dendrites += 1
            failures = failures if Difference.RUN_TRIES in differences else 0
        decisions.append([1, 0, dendrites])
        first, phase, average, best, at, helped = False, [], 0.0, None, 0, False
    return decisions


def events(decisions: list[list[int]]) -> list[list[int]]:
    """Return [epoch, complete, dendrites] of the restructurings alone."""
    return [[epoch, c, d] for epoch, (restructured, c, d) in enumerate(decisions) if restructured]
