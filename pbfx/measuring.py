"""Close an epoch of a dendrite phase: what has each site's pool of candidates come to?"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping

from pbfx.figures import SiteFigures
from pbfx.learning import SiteLearner, figures_of, measure_all, reached
from pbfx.perforated import PerforatedModule


def measure(
    parts: Mapping[str, PerforatedModule], learners: Mapping[str, SiteLearner]
) -> tuple[float | None, tuple[SiteFigures, ...]]:
    """Let every learner close its epoch, and let the parts of a model show what came of it.

    Args:
        parts: in either phase.
        learners: of their candidates, by the full path of the site; none in a neuron phase.

    Returns:
        The mean over sites of the candidates' score, None where no batch measured; and the figures
        of the sites that an error has reached.
    """
    if not learners:
        return None, ()
    heard = reached(learners)
    if not heard:
        warnings.warn(
            "pbfx: no error has reached any candidate since the dendrite phase began; the "
            "training loop must call loss.backward() on the model's output in this phase too",
            stacklevel=3,
        )
    measured = measure_all(learners)
    known = [score for score in measured.values() if score is not None]
    figures = figures_of(heard, measured)
    if any("_orig_mod." in found.site for found in figures):
        # As `torch.compile` leaves them in peace, paths do not show that it was there.
        figures = tuple(
            dataclasses.replace(found, site=found.site.replace("_orig_mod.", ""))
            for found in figures
        )
    show_figures(parts, figures)
    return sum(known) / len(known) if known else None, figures


def show_figures(parts: Mapping[str, PerforatedModule], figures: tuple[SiteFigures, ...]) -> None:
    """Let the parts of a model show these figures, as `pbfx.explain` does."""
    for part in parts.values():
        part.perforation.figures = figures
