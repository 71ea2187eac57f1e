"""pbfx gives any PyTorch model artificial dendrites, and compiles them.

model = pbfx.transform(Net())
tracker = pbfx.Tracker(model, optimizer, scheduler)
while not tracker.complete:
    train(model, optimizer)
    tracker.step(validate(model))
"""

from pbfx.by_hand import grow
from pbfx.capacity import Capacity
from pbfx.checkpoint import load, save
from pbfx.config import Config
from pbfx.errors import (
    CaptureError,
    CheckpointError,
    ConfigError,
    DependencyError,
    PassError,
    PbfxError,
    RestructureError,
    ScoreError,
    TrackerError,
)
from pbfx.explain import Explanation, explain
from pbfx.figures import SiteFigures
from pbfx.history import Epoch, Step
from pbfx.lower import lower
from pbfx.lowered import LoweredModule
from pbfx.perforated import PerforatedModule
from pbfx.phase import Phase
from pbfx.policy import (
    Action,
    Decision,
    EveryTime,
    Interval,
    Never,
    Plateau,
    Policy,
    Situation,
)
from pbfx.rates import RateSearch
from pbfx.tracker import Tracker
from pbfx.transform import transform

__version__ = "0.1.0"

__all__ = [
    "Action",
    "Capacity",
    "CaptureError",
    "CheckpointError",
    "Config",
    "ConfigError",
    "Decision",
    "DependencyError",
    "Epoch",
    "EveryTime",
    "Explanation",
    "Interval",
    "LoweredModule",
    "Never",
    "PassError",
    "PbfxError",
    "PerforatedModule",
    "Phase",
    "Plateau",
    "Policy",
    "RateSearch",
    "RestructureError",
    "ScoreError",
    "SiteFigures",
    "Situation",
    "Step",
    "Tracker",
    "TrackerError",
    "explain",
    "grow",
    "load",
    "lower",
    "save",
    "transform",
]
