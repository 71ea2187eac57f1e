"""How a dendrite is trained: the moments of activation and error, and the learner of one site."""

from pbfx.learning.learner import SiteLearner, new_cohort
from pbfx.learning.moments import Statistics, statistics
from pbfx.learning.newest import hold_older

__all__ = ["SiteLearner", "Statistics", "hold_older", "new_cohort", "statistics"]
