"""For people who come from `perforatedai`: their scripts, in both dialects, and their files.

    from pbfx.compat import pb_globals as PBG, pb_models as PBM, pb_utils as PBU
    from pbfx.compat import globals_perforatedai as GPA, utils_perforatedai as UPA

in place of `from perforatedai import ...` is all that changes; `python -m pbfx.compat script.py`
runs a script with nothing changed. `docs/migrating.md` tells how to go on from there.
"""

from pbfx.compat.rival_files import load_perforatedai

__all__ = ["load_perforatedai"]
