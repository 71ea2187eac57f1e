"""Will dendrites pay? What to conclude from the figures of a dendrite phase."""

from __future__ import annotations

from collections.abc import Sequence

from pbfx.figures import SiteFigures

# With fewer measuring batches a correlation that is worth growing for would often be missed.
LEAST_BATCHES = 20


def why_not(sites: Sequence[SiteFigures], significance: float) -> str | None:
    """Return a sentence if no site's candidates correlate with the error beyond chance.

    None where some do, and where too few batches were measured to tell. Each site is tested at
    `significance` divided by their number, so that the chance of growing on noise is at most
    `significance` for the model (Bonferroni).

    Args:
        sites: figures of those that an error has reached.
        significance: in (0, 1).
    """
    heard = [site for site in sites if site.p_value is not None]
    if not heard or any(site.heldout_batches < LEAST_BATCHES for site in heard):
        return None
    best = min(heard, key=lambda site: (site.p_value, site.site))
    assert best.p_value is not None
    if best.p_value < significance / len(heard):
        return None
    return (
        "no site's candidates correlate with the error on unseen batches "
        f"({best.site or 'the model'} most: r = {best.heldout:.4f} on {best.heldout_batches} "
        f"batches, p = {best.p_value:.2g}, {len(heard)} tested): dendrites would not pay"
    )
