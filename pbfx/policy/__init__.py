"""When to grow: pure functions from a history of scores to a decision with its reason.

A policy sees numbers and returns a word. It touches no model, keeps no state and draws no chance,
so a decision can be replayed, tested and explained from the history alone.
"""

from pbfx.policy.decision import Action, Decision, Policy, Situation, finished, possible
from pbfx.policy.fixed import EveryTime, Interval, Never
from pbfx.policy.function import PolicyLike, asked, fault_of
from pbfx.policy.plateau import Plateau

__all__ = [
    "Action",
    "Decision",
    "EveryTime",
    "Interval",
    "Never",
    "Plateau",
    "Policy",
    "PolicyLike",
    "Situation",
    "asked",
    "fault_of",
    "finished",
    "possible",
]
