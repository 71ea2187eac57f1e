"""The rows of a candidate's batch moments."""

from enum import IntEnum


class Moment(IntEnum):
    """Index the first axis of `moments.view(6, C, N)`: sums over the positions of one batch.

    `A` stands for the candidate's activation `a`, `G` for the error `g` at the site's
    preactivation. They are what the running covariance `Cov = Σag/P - Σa Σg/P²` and the variances
    are made from.
    Source: Fahlman and Lebiere, *The Cascade-Correlation Learning Architecture*, 1990.
    """

    COUNT = 0
    A = 1
    AA = 2
    G = 3
    GG = 4
    AG = 5
