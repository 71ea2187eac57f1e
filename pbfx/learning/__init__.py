"""How dendrites are trained: moments of activation and error, a site's learner, the choice."""

from pbfx.learning.epoch import Chosen, chosen
from pbfx.learning.learner import SiteLearner, figures_of, measure_all, new_cohort, reached
from pbfx.learning.moments import Statistics, statistics
from pbfx.learning.newest import hold_older
from pbfx.learning.selection import (
    Choice,
    Prospect,
    predicted_gains,
    prospect_of,
    samples_per_batch,
    select,
)

__all__ = [
    "Choice",
    "Chosen",
    "Prospect",
    "SiteLearner",
    "Statistics",
    "chosen",
    "figures_of",
    "hold_older",
    "measure_all",
    "new_cohort",
    "predicted_gains",
    "prospect_of",
    "reached",
    "samples_per_batch",
    "select",
    "statistics",
]
