"""What is summed over a batch for a pool of candidates: its moments, and its small gradients.

sums = [moments (6 * C, N), ∂c (C, N), ∂U (C * D, N)]
"""

from enum import IntEnum

from torch import Tensor


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


# Rows of sums for each candidate, without one for every dendrite before it.
ROWS = len(Moment) + 1


def parted(sums: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of the sums of a pool, views.

    Args:
        sums: `((7 + D) * C, N)`.
        count: C, not 0.

    Returns:
        bias: ∂c, `(C, N)`.
        to_dendrite: ∂U, `(C, D, N)`.
        moments: `(6 * C, N)`, rows in the order of `Moment`.
    """
    rows, neurons = sums.shape
    dendrites = rows // count - ROWS
    moments, bias, links = sums.split([(ROWS - 1) * count, count, dendrites * count])
    return bias, links.view(count, dendrites, neurons), moments
