"""The arms of a study: one way each to train a net, by the name that a user types.

plain               the net as it is, one long schedule over as many epochs as the others have
sham                the phases and restarts of perforated, with dendrites that output zero
gradient            dendrites that train with everything else
perforated          the published way
perforated-last     of these modes, with dendrites at some sites only (a study names its choices)
wider2              a plain net with as many parameters as perforated has with 2 dendrites
deeper2             the same for a deeper plain net
perforated[tuning=full,finish=True]
                    an arm with dendrites under settings of its own; for those that begin with
                    `trial.` see `benchmarks.learning.trials`
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal

import pbfx
from benchmarks.errors import UsageError
from benchmarks.learning import trials
from pbfx.errors import nearest

MODES = ("perforated", "sham", "gradient")
_MODE = re.compile(rf"({'|'.join(MODES)})(?:-(\w+))?(?:\[(.+)\])?")
# Commas within brackets stand between an arm's settings.
_COMMA = re.compile(r",(?![^\[]*\])")
_RIVAL = re.compile(r"(wider|deeper)([1-9])")
_POLICIES: dict[str, type] = {
    name.lower(): value
    for name, value in vars(pbfx).items()
    if dataclasses.is_dataclass(value) and isinstance(value, type) and hasattr(value, "decide")
}
_CONFIG = {field.name for field in dataclasses.fields(pbfx.Config)}
# What a sham shares with the arm that it is the control of.
_SHAM = {"finish", "spare", "max_dendrites", "policy", "reset_learning_rate"}
_SHAM |= {"reset_optimizer_state", "learning_rates"}
# Of the study's own loop.
_LOOP = {"spare"}
_TRACKER = set(inspect.signature(pbfx.Tracker).parameters) - {"model", "optimizer", "scheduler"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as in tables: what was typed, and any settings in brackets.
        mode: of pbfx's learning, or None for a plain net.
        selection: a study's name for the sites that grow, or None for all.
        rival: which other net a plain arm trains, or None for the study's own.
        match: the number of dendrites whose parameter count the rival has.
        settings: for `pbfx.Config`, `pbfx.Tracker` and `policy.*`; `spare`, see `folds`; and
            `trial.*`, see `trial`.
    """

    name: str
    mode: Literal["perforated", "sham", "gradient"] | None = None
    selection: str | None = None
    rival: Literal["wider", "deeper"] | None = None
    match: int = 0
    settings: tuple[tuple[str, Any], ...] = ()

    def config(self, include: tuple[str, ...], base: Mapping[str, Any], seed: int) -> pbfx.Config:
        """Return the configuration of an arm with dendrites, from the study's `base`."""
        own = {key: value for key, value in self.settings if key in _CONFIG}
        common: dict[str, Any] = {"include": include, "learning": self.mode, "seed": seed}
        if self.trial.links:
            common["initial_link"] = 1.0
        return pbfx.Config(**(common | dict(base) | own))

    @property
    def trial(self) -> trials.Trial:
        """Return what this arm tries beyond the settings of pbfx.

        Raises:
            UsageError: if it cannot be tried.
        """
        return trials.trial_of(self.mode, dict(self.settings))

    @property
    def folds(self) -> int:
        """Return into how many parts the training rows are split, 1 for none.

        With `spare=0.2` candidates learn from a fifth of the rows, another one in each dendrite
        phase, and the neuron phase before has not seen it; the last one sees all.

        Raises:
            UsageError: if `spare` is no share of the rows.
        """
        spare = dict(self.settings).get("spare", 1)
        if not isinstance(spare, (int, float)) or not 0 < spare <= 1:
            raise UsageError(f"spare must be a number above 0 and at most 1, got {spare!r}")
        return round(1 / spare)

    def tracker_settings(self, neuron_epochs: int, dendrite_epochs: int) -> dict[str, Any]:
        """Return the keywords for `pbfx.Tracker`, the policy among them."""
        own = {key: value for key, value in self.settings if key in _TRACKER}
        name = own.pop("policy", "interval")
        policy = {
            key.removeprefix("policy."): value
            for key, value in self.settings
            if key.startswith("policy.")
        }
        if name == "interval":
            policy = {"neuron_epochs": neuron_epochs, "dendrite_epochs": dendrite_epochs} | policy
        if name in _POLICIES:
            own["policy"] = _POLICIES[name](**policy)
        elif callable(getattr(name, "decide", None)):
            own["policy"] = name
        else:
            raise UsageError(f"--set policy={name}: {nearest(str(name), _POLICIES)}")
        return own


def arm_named(
    name: str, selections: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> Arm:
    """Return the arm that a user names.

    Args:
        name: see the top of this file.
        selections: the study's names for sites.
        settings: from `--set`; they become part of the name of an arm with dendrites, after the
            settings that it has there already, and a plain one has none.

    Raises:
        UsageError: if there is no such arm.
    """
    if name == "plain":
        return Arm(name)
    if rival := _RIVAL.fullmatch(name):
        kind: Any = rival[1]
        return Arm(name, rival=kind, match=int(rival[2]))
    mode = _MODE.fullmatch(name)
    if mode is None:
        known = ["plain", *MODES, *(f"perforated-{s}" for s in selections), "wider1", "deeper1"]
        raise UsageError(f"--arms: no arm {name!r}; {nearest(name, known)}")
    if mode[2] is not None and mode[2] not in selections:
        raise UsageError(
            f"--arms {name}: this study has no selection {mode[2]!r} of sites; "
            f"{nearest(mode[2], selections) if selections else 'it names none'}"
        )
    learning: Any = mode[1]
    own = dict(setting(text) for text in mode[3].split(",")) if mode[3] else {}
    chosen = tuple(sorted((own | dict(settings or {})).items()))
    name = name.partition("[")[0]
    brackets = ",".join(f"{key}={_shown(value)}" for key, value in chosen)
    return Arm(f"{name}[{brackets}]" if brackets else name, learning, mode[2], settings=chosen)


def arm_names(text: str) -> list[str]:
    """Return the names of arms in a list with commas between them."""
    return [name.strip() for name in _COMMA.split(text)]


def sham_of(arm: Arm) -> str:
    """Return the name of the sham of an arm: the same phases, rates and rows."""
    kept = {k: v for k, v in arm.settings if k in _SHAM or k.startswith("policy.")}
    if arm.trial.soma:
        kept["trial.line_search"] = "soma"
    return arm_named("sham", {}, kept).name


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value).replace(" ", "")


def setting(text: str) -> tuple[str, Any]:
    """Parse `key=value`; the value is a Python literal, or else the string that it is.

    Raises:
        UsageError: if there is no `=`, or pbfx knows no such setting.
    """
    key, equals, written = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text}: must be KEY=VALUE")
    known = sorted(_CONFIG | _TRACKER | _LOOP | {*trials.NAMES})
    if key not in known and not key.startswith("policy."):
        raise UsageError(
            f"--set {text}: no setting {key!r} of pbfx.Config, pbfx.Tracker or the study; "
            f"{nearest(key, known)}"
        )
    try:
        return key, ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return key, written
