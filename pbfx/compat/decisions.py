"""The settings that decide when `perforatedai` grows and stops, as a policy of pbfx.

The one place for this mapping; `docs/equivalence.md` lists where the two still decide differently,
and why. Settings go by their 3.x names without `set_`, and any may be a list indexed by the number
of dendrites, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pbfx.errors import ConfigError, nearest
from pbfx.policy import Never, Plateau, Policy
from pbfx.settings import at

# By the numbers that its constants have.
SWITCH_MODES = (
    "DOING_SWITCH_EVERY_TIME",
    "DOING_HISTORY",
    "DOING_FIXED_SWITCH",
    "DOING_NO_SWITCH",
)
DEFAULTS: dict[str, Any] = {
    "switch_mode": "DOING_HISTORY",
    "n_epochs_to_switch": 10,
    "history_lookback": 1,
    "initial_history_after_switches": 0,
    "fixed_switch_num": 250,
    "first_fixed_switch_num": -1,
    "improvement_threshold": [1e-3, 1e-4, 0.0],
    "improvement_threshold_raw": 1e-5,
    "max_dendrite_tries": 2,
}
# A patience that never ends a phase before its time does.
_ENDLESS = 10**9


def policy_of(settings: Mapping[str, Any]) -> Policy:
    """Return the policy that decides as `settings` say.

    `max_dendrites` and `maximizing_score` are the tracker's.

    Args:
        settings: some of `DEFAULTS`; `switch_mode` is a name of `SWITCH_MODES` or its number.

    Raises:
        ConfigError: for a setting or mode that does not exist, or a value out of range.
    """
    for name in settings:
        if name not in DEFAULTS:
            raise ConfigError(f"policy_of: there is no setting {name!r}; {nearest(name, DEFAULTS)}")
    values = {**DEFAULTS, **settings}
    mode = _mode(values["switch_mode"])
    if mode == "DOING_NO_SWITCH":
        return Never()
    if mode == "DOING_HISTORY":
        own = {"patience": values["n_epochs_to_switch"], "grace": _grace(values)}
    elif mode == "DOING_FIXED_SWITCH":
        own = {"patience": _ENDLESS, "max_epochs": _lengths(values)}
    else:
        # Each set of dendrites is judged here too, after one epoch: so it is no `EveryTime`.
        own = {"patience": _ENDLESS, "max_epochs": 1}
    return Plateau(
        smoothing=values["history_lookback"],
        relative_threshold=values["improvement_threshold"],
        absolute_threshold=values["improvement_threshold_raw"],
        tries=values["max_dendrite_tries"],
        **own,
    )


def _mode(value: Any) -> str:
    if isinstance(value, str) and value in SWITCH_MODES:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(SWITCH_MODES):
        return SWITCH_MODES[value]
    raise ConfigError(
        f"policy_of: switch_mode is unknown, got {value!r}: {nearest(str(value), SWITCH_MODES)}, "
        f"or a number from 0 to {len(SWITCH_MODES) - 1}"
    )


def _grace(values: Mapping[str, Any]) -> Any:
    """Return the epochs that a phase lasts at least: there, patience starts after the history."""
    history, patience = values["initial_history_after_switches"], values["n_epochs_to_switch"]
    if not isinstance(history, (list, tuple)) and not isinstance(patience, (list, tuple)):
        return history + patience if history else 0
    longest = max(len(v) for v in (history, patience) if isinstance(v, (list, tuple)))
    pairs = [(at(history, d), at(patience, d)) for d in range(longest)]
    return [first + second if first else 0 for first, second in pairs]


def _lengths(values: Mapping[str, Any]) -> Any:
    """Return how many epochs neuron phases last.

    The first ends with the first multiple of the usual length that reaches its own number.
    """
    every, first = values["fixed_switch_num"], at(values["first_fixed_switch_num"], 0)
    usual = at(every, 0)
    if first <= usual:
        return every
    later = list(every[1:] or every) if isinstance(every, (list, tuple)) else [every]
    return [-(-first // usual) * usual, *later]
