"""3.x's settings and tracker: `GPA.pc.set_max_dendrites(3)`, `GPA.pai_tracker`.

Versions before 2 had the settings as attributes of this module, which still works.
"""

from __future__ import annotations

import sys

from pbfx.compat.accepted import PAISequential
from pbfx.compat.owners import latest
from pbfx.compat.perforate import pc, snake_settings
from pbfx.compat.store import PAIConfig, SettingsModule

_settings = snake_settings
_live = {"pai_tracker": latest}

__all__ = ["PAIConfig", "PAISequential", "pc"]

sys.modules[__name__].__class__ = SettingsModule
