"""The values of all settings of one dialect, and the objects through which scripts reach them."""

from __future__ import annotations

import json
import math
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pbfx import ConfigError
from pbfx.compat.activations import activation_name
from pbfx.compat.hints import UnknownNameError, nearest, warn_once
from pbfx.compat.table import CAMEL_CONSTANTS, CONSTANTS, LISTS, SETTINGS, Kind, Setting


class Settings:
    """The values of all settings, under the names of one dialect.

    Args:
        camel: whether it is the tutorial's dialect.
        dendrites: returns how many dendrites the current model has, for settings that are lists.
    """

    def __init__(self, camel: bool, dendrites: Callable[[], int] = lambda: 0) -> None:
        self.camel, self.dendrites = camel, dendrites
        self.constants = CAMEL_CONSTANTS if camel else CONSTANTS
        self._named: dict[str, Setting] = {}
        for setting in SETTINGS:
            own = (setting.name, *setting.older)
            for name in setting.camel if camel else own:
                self._named[name] = setting
        self.reset()

    def reset(self) -> None:
        """Return every setting to the dialect's default."""
        self._values = {s.name: s.default_in(self.camel) for s in SETTINGS}
        self._given: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the dialect, constants not included."""
        return tuple(self._named)

    def setting(self, name: str) -> Setting:
        """Return what `name` stands for.

        Raises:
            UnknownNameError: if there is no such setting, with the nearest names.
        """
        if name not in self._named:
            hint = nearest(name, self._named)
            raise UnknownNameError(f"pbfx.compat: there is no setting {name!r}; {hint}")
        return self._named[name]

    def set(self, name: str, value: Any) -> None:
        """Set one setting.

        Raises:
            ConfigError: if there is no such setting, or it cannot have this value.
        """
        if name in self.constants:
            raise ConfigError(f"pbfx.compat: {name} is a constant, and cannot be set")
        setting = self.setting(name)
        self._values[setting.name] = _checked(name, value, setting.kind)
        self._given.add(setting.name)
        if not setting.honoured:
            warn_once(name, setting.went)

    def append(self, name: str, values: Any) -> None:
        """Add to a setting that is a list.

        Raises:
            ConfigError: if there is no such setting, it is no list, or cannot have these values.
        """
        before = self._values[self.setting(name).name]
        if not isinstance(before, list):
            raise ConfigError(
                f"pbfx.compat: {name} is no list but {before!r}; set it instead of appending"
            )
        self.set(
            name, [*before, *values] if isinstance(values, (list, tuple)) else [*before, values]
        )

    def get(self, name: str) -> Any:
        """Return the value of a setting, at the present number of dendrites if it is a list."""
        setting = self.setting(name)
        value = self._values[setting.name]
        whole = setting.kind in LISTS or setting.kind is Kind.ANYTHING
        return value if whole else self._at(value)

    def value(self, canonical: str) -> Any:
        """Return the value of the setting of that 3.x name, a list as it is."""
        return self._values[canonical]

    def now(self, canonical: str) -> Any:
        """Return the value of the setting of that 3.x name at the present number of dendrites."""
        return self._at(self._values[canonical])

    def given(self, canonical: str) -> bool:
        """Return whether the script has set it."""
        return canonical in self._given

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take the settings of a JSON file as 3.x writes it.

        Raises:
            ConfigError: if the file cannot be read, or holds what there is no setting for.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"pbfx.compat: cannot read settings from {os.fspath(path)}: {error}"
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(
                f"pbfx.compat: {os.fspath(path)} is no JSON object of settings by name"
            )
        for name, value in values.items():
            # Constants, and what the file says about itself.
            if name in self.constants or name == "module_settings" or name.startswith("_"):
                continue
            setting = self.setting(name)
            if setting.honoured and value != self._values[setting.name]:
                self.set(name, value)

    def _at(self, value: Any) -> Any:
        if isinstance(value, list):
            return value[min(self.dendrites(), len(value) - 1)] if value else None
        return value


def _checked(name: str, value: Any, kind: Kind) -> Any:
    """Return `value`, normalised, if a setting of that kind can have it."""
    if kind in LISTS:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        wanted = str if kind is Kind.NAMES else object
        fine = all(isinstance(v, wanted) and (kind is Kind.NAMES or callable(v)) for v in values)
        if not fine:
            raise ConfigError(f"pbfx.compat: {name} must be {kind.value}, got {value!r}")
        return values
    if kind is Kind.ACTIVATION:
        activation_name(value, name)
        return value
    single = kind in (Kind.ANYTHING, Kind.TEXT, Kind.LEARNING)
    values = list(value) if isinstance(value, (list, tuple)) and not single else [value]
    if not values or not all(_fits(v, kind) for v in values):
        raise ConfigError(
            f"pbfx.compat: {name} must be {kind.value}"
            f"{'' if single else ', or a list of these by number of dendrites'}, got {value!r}"
        )
    return values if isinstance(value, (list, tuple)) and not single else value


def _fits(value: Any, kind: Kind) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    real = whole or isinstance(value, float)
    return {
        Kind.FLAG: isinstance(value, bool) or value in (0, 1),
        Kind.WHOLE: whole and value >= 1,
        Kind.COUNT: whole and value >= 0,
        Kind.INTEGER: whole,
        Kind.NUMBER: real and math.isfinite(value) and value >= 0,
        Kind.MODE: whole and 0 <= value <= 3,
        Kind.LEARNING: value in (None, "perforated", "gradient", "sham"),
        Kind.TEXT: isinstance(value, str),
        Kind.ANYTHING: True,
    }[kind]


class PAIConfig:
    """What 3.x scripts know as `GPA.pc`: `set_x(v)`, `get_x()`, `append_x([v])`, and `pc.x`."""

    def __init__(self, settings: Settings) -> None:
        object.__setattr__(self, "_settings", settings)

    def __getattr__(self, name: str) -> Any:
        settings: Settings = object.__getattribute__(self, "_settings")
        if name in settings.constants:
            return settings.constants[name]
        verb, _, rest = name.partition("_")
        if verb in ("set", "get", "append") and rest:
            method = getattr(settings, verb)
            settings.setting(rest)
            return lambda *value: method(rest, *value)
        if name.startswith("__"):
            raise AttributeError(name)
        return settings.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__getattribute__(self, "_settings").set(name, value)

    def __dir__(self) -> list[str]:
        settings: Settings = object.__getattribute__(self, "_settings")
        verbs = [f"{verb}_{name}" for name in settings.names for verb in ("append", "get", "set")]
        return sorted([*settings.constants, *settings.names, *verbs])


class SettingsModule(types.ModuleType):
    """A module whose attributes are settings: `PBG.switchMode = PBG.doingHistory`.

    Its file defines `_settings`, and `_live`: functions by the name of what they return, which is
    asked for anew every time, as the tracker is.
    """

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        # An import asks for its own names before the file has run.
        if name.startswith("__") or "_settings" not in own:
            raise AttributeError(name)
        settings: Settings = own["_settings"]
        if name in own["_live"]:
            return own["_live"][name]()
        if name in settings.constants:
            return settings.constants[name]
        if name in settings.names:
            return settings.get(name)
        raise UnknownNameError(
            f"module {self.__name__!r} has no attribute {name!r}; "
            + nearest(name, [*settings.names, *settings.constants, *own["_live"]])
        )

    def __setattr__(self, name: str, value: Any) -> None:
        # What an import sets, and what the module defines itself.
        if name.startswith("__") or name in self.__dict__:
            super().__setattr__(name, value)
        else:
            self.__dict__["_settings"].set(name, value)

    def __dir__(self) -> list[str]:
        own = self.__dict__
        settings: Settings = own["_settings"]
        public = [name for name in own if not name.startswith("_")]
        return sorted([*public, *settings.names, *settings.constants, *own["_live"]])
