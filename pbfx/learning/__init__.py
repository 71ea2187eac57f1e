"""How a dendrite is trained: the moments of activation and error, and the learner of one site."""

from pbfx.learning.learner import SiteLearner, new_cohort
from pbfx.learning.moments import Statistics, statistics

__all__ = ["SiteLearner", "Statistics", "new_cohort", "statistics"]
