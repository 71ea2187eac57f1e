"""Policies that are plain functions: `policy=lambda situation: Decision(...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from pbfx.policy.decision import Decision, Policy, Situation

# Whatever may stand where a policy is wanted.
PolicyLike: TypeAlias = Policy | Callable[[Situation], Decision]


def fault_of(policy: object) -> str | None:
    """Return why `policy` cannot decide, or None."""
    if isinstance(policy, type):
        return f"policy must be an instance, got the class {policy.__name__}; call it first"
    if callable(getattr(policy, "decide", None)) or callable(policy):
        return None
    return (
        "policy must have a method decide(situation) or be a function of the situation, got "
        f"{policy!r}"
    )


def asked(policy: PolicyLike, situation: Situation) -> object:
    """Return what `policy`, of either kind, says to `situation`; it may be anything."""
    decide = getattr(policy, "decide", None)
    return decide(situation) if callable(decide) else policy(situation)  # pyright: ignore[reportCallIssue]
