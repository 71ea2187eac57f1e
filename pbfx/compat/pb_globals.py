"""The tutorial's settings: `PBG.testingDendriteCapacity = False`, `PBG.pbTracker`, and so on.

`PBG` is this module itself; every name of its table of settings is one of its attributes.
"""

from __future__ import annotations

import sys

from pbfx.compat.accepted import PBSequential
from pbfx.compat.owners import latest
from pbfx.compat.perforate import camel_settings
from pbfx.compat.store import SettingsModule

_settings = camel_settings
_live = {"pbTracker": latest}

__all__ = ["PBSequential"]

sys.modules[__name__].__class__ = SettingsModule
