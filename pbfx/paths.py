"""Module paths: dotted names, the empty one for the root."""

from __future__ import annotations


def join(prefix: str, name: str) -> str:
    """Return the path of `name` inside the module at `prefix`; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name
