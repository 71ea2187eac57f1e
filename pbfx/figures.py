"""What a dendrite phase has measured of a site: will dendrites pay there?"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class SiteFigures:
    """What the candidates of one site promise, after an epoch of their phase.

    Attributes:
        site: its full path.
        neurons: N.
        parameters: what one more dendrite per neuron costs.
        correlation: |correlation| of the best candidate with the error on this epoch's measuring
            batches, mean over neurons; None where there was none. Being the best of C measured
            numbers, it is above zero by chance too.
        gain: Σ r²/2 over neurons, r being the correlation of the candidate that would be promoted.
            It is Cov²/(2 h Var a) with the error's variance in the place of the curvature h: the
            predicted drop of a negative log-likelihood, per position, if neurons did not overlap.
        slope: Σ (∂L/∂T)² over neurons for the same candidates, L being the mean batch loss and T
            the dendrites' links to their neurons, at T = 0.
        heldout: correlation on the measuring batches of the phase so far, each candidate signed by
            what learning batches had shown before, mean over candidates and neurons. Nothing is
            chosen by what it is measured on, so its expectation at chance is 0; from the second
            epoch of a phase on the batches hold examples that candidates have learnt from. None
            without a measuring batch.
        heldout_batches: how many those were.
        p_value: of `heldout` being no more than chance, one-sided, batches being the unit; None
            with fewer than two.
    """

    site: str
    neurons: int
    parameters: int
    correlation: float | None
    gain: float
    slope: float
    heldout: float | None
    heldout_batches: int
    p_value: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)
