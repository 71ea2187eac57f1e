"""The table of settings as `docs/migrating.md` prints it.

A test compares the page with what is made here, so that the page cannot fall behind.
"""

from __future__ import annotations

from collections.abc import Iterable

from pbfx.compat.table import SETTINGS, Setting


def settings_table() -> str:
    """Return every setting and where it went, as two tables in Markdown."""
    honoured = [setting for setting in SETTINGS if setting.honoured]
    ignored: dict[str, list[Setting]] = {}
    for setting in SETTINGS:
        if not setting.honoured:
            ignored.setdefault(setting.went, []).append(setting)
    lines = ["| 3.x | 2025 | in pbfx |", "|---|---|---|"]
    lines += [
        f"| {_code([setting.name, *setting.older])} | {_code(setting.camel)} | {setting.went} |"
        for setting in honoured
    ]
    lines += [
        "",
        "These are accepted, and say once that they change nothing:",
        "",
        "| 3.x | 2025 | why |",
        "|---|---|---|",
    ]
    lines += [
        f"| {_code(s.name for s in settings)} | {_code(c for s in settings for c in s.camel)} "
        f"| {reason} |"
        for reason, settings in ignored.items()
    ]
    return "\n".join(lines)


def _code(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names)
