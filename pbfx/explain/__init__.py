"""Say where a model can grow dendrites, where it cannot, and what each site costs.

`explain` reads a model and returns an `Explanation`: plain data, a table, JSON, a picture.
"""

from pbfx.explain.explanation import Explanation
from pbfx.explain.read import explain
from pbfx.explain.records import (
    ApartReport,
    KeptReport,
    LoweredReport,
    PartReport,
    SiteReport,
    SkippedReport,
)

__all__ = [
    "ApartReport",
    "Explanation",
    "KeptReport",
    "LoweredReport",
    "PartReport",
    "SiteReport",
    "SkippedReport",
    "explain",
]
