"""Modules named `perforatedai`, in this process and for as long as it lives."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types

logger = logging.getLogger(__name__)

NAME = "perforatedai"
# Every module of either dialect that scripts import.
MODULES = (
    "pb_globals",
    "pb_utils",
    "pb_models",
    "globals_perforatedai",
    "utils_perforatedai",
    "modules_perforatedai",
    "library_perforatedai",
)


def provide() -> types.ModuleType:
    """Let `import perforatedai` find pbfx, in place of a package of that name if there is one.

    Returns:
        The module that scripts then import. A second call returns the first one's.
    """
    known = sys.modules.get(NAME)
    if known is not None and getattr(known, "__pbfx__", False):
        return known
    if importlib.util.find_spec(NAME) is not None:
        logger.warning(
            "perforatedai is installed here; this process gets pbfx's modules of that name instead"
        )
    package = types.ModuleType(NAME, "Provided by pbfx.compat.")
    # No folders: what is not in the list above is not there.
    package.__path__ = []
    package.__dict__["__pbfx__"] = True
    sys.modules[NAME] = package
    for name in MODULES:
        module = importlib.import_module(f"pbfx.compat.{name}")
        sys.modules[f"{NAME}.{name}"] = module
        setattr(package, name, module)
    return package
