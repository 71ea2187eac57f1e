"""pbfx gives any PyTorch model artificial dendrites, and compiles them.

model = pbfx.transform(Net())
tracker = pbfx.Tracker(model, optimizer, scheduler)
while not tracker.complete:
    train(model, optimizer)
    tracker.step(validate(model))
"""

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
from pbfx.history import Epoch, Step
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
from pbfx.restructure import grow
from pbfx.tracker import Tracker
from pbfx.transform import transform

__version__ = "0.1.0"

__all__ = [
    "Action",
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
    "Never",
    "PassError",
    "PbfxError",
    "PerforatedModule",
    "Phase",
    "Plateau",
    "Policy",
    "RestructureError",
    "ScoreError",
    "Situation",
    "Step",
    "Tracker",
    "TrackerError",
    "explain",
    "grow",
    "load",
    "save",
    "transform",
]
