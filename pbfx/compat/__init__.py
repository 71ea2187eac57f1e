"""For people who come from `perforatedai`: their files."""

from pbfx.compat.rival_files import load_perforatedai

__all__ = ["load_perforatedai"]
