"""Where the next dendrites pay: rank sites and channels by predicted gain per parameter.

    gain = Σ_p Cov² / (2 h Var a) = S r² / 2         h = Var g         S positions per sample

of one neuron's best candidate, over the positions p of one sample. At a link T of zero ∂L/∂T is
Σ_p Cov, so the best step of T lowers the loss by the square of that over twice its curvature, Σ_p h
Var a. No phase measures h, the curvature of the loss at a neuron. Where the loss is a negative
log-likelihood h is the variance of the error (the Fisher information); the gain is then in nats per
sample, and does not depend on the scale of the loss. The correlation r is that on batches which the
candidates did not learn from.

No site has fewer positions in a batch than there are samples, so the least over all sites is taken
for their number. The positions of one sample are counted as if each told something new: with S left
out, first convolutions are underrated 50 to 120 times (docs/selection.md has the measurements).

Two things a channel has to exceed:

- chance: the best of m candidates correlates with anything. Of pure noise over P positions the
  largest r² is about 2 ln(m) / P;
- its cost: one nat per parameter over the samples of one epoch, as in Akaike's criterion, by which
  a parameter has to raise the log-likelihood by one.

Source: Fahlman and Lebiere, *The Cascade-Correlation Learning Architecture*, 1990 (objective);
Akaike, *A New Look at the Statistical Model Identification*, 1974; Kunstner, Balles and Hennig,
*Limitations of the Empirical Fisher Approximation*, 2019 (what h = Var g can and cannot say).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch

from pbfx.learning.learner import SiteLearner
from pbfx.sites import channels_together
from pbfx.wording import counted
from pbfx_kernels import Moment

# What a parameter has to bring over the samples of an epoch, in nats.
WORTH = 1.0


@dataclasses.dataclass(frozen=True)
class Prospect:
    """What was measured of the candidates that one site would grow.

    Attributes:
        site: its full path.
        correlations: r of each channel's best candidate, (n,), on batches that only measured.
        positions: how many positions these batches had together.
        batches: how many batches that were, in one epoch.
        epoch_batches: how many batches an epoch has.
        tries: how many measurements each best is the best of: candidates times epochs.
        cost: parameters that the dendrite of one channel adds, its links included.
        together: how many neighbouring channels can only be chosen together.
    """

    site: str
    correlations: tuple[float, ...]
    positions: float
    batches: float
    epoch_batches: float
    tries: int
    cost: int
    together: int = 1

    @property
    def positions_per_batch(self) -> float:
        """How many positions a batch has here: samples times space, times calls."""
        return self.positions / max(self.batches, 1.0)

    @property
    def chance(self) -> float:
        """The largest |r| that pure noise would show."""
        measurements = max(self.tries * len(self.correlations), 2)
        return min(math.sqrt(2 * math.log(measurements) / max(self.positions, 1.0)), 1.0)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one site grows.

    Attributes:
        site: its full path.
        channels: those of its pool's neurons that get a dendrite, in increasing order.
        gain: their predicted gain, in nats per sample.
        parameters: what they cost.
        reason: one sentence for people.
    """

    site: str
    channels: tuple[int, ...]
    gain: float
    parameters: int
    reason: str


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Channels of one site that are chosen together."""

    site: str
    channels: range
    gain: float
    cost: int

    @property
    def rate(self) -> float:
        return self.gain / self.cost


@torch.no_grad()
def prospect_of(site: str, learner: SiteLearner) -> Prospect:
    """Return what `learner` has measured of the candidates that it would have chosen.

    It waits for the device: call it at the end of a phase.

    Args:
        site: the full path.
        learner: with an epoch or more closed by `measure`; before that all correlations are 0.
    """
    pool = learner.candidates
    found, _ = learner.prospects()
    winner = pool.best_score.argmax(0, keepdim=True)
    counts = pool.best_moments[Moment.COUNT].gather(0, winner).max()
    positions, batches = torch.stack([counts, pool.best_batches.gather(0, winner).max()]).tolist()
    epoch_batches = batches * learner.rules.measure_every
    form, older = pool.site, pool.dendrites
    return Prospect(
        site=site,
        correlations=tuple(found.correlation.tolist()),
        positions=positions,
        batches=batches,
        epoch_batches=epoch_batches,
        tries=pool.count * max(round(learner.batches / max(epoch_batches, 1.0)), 1),
        cost=math.prod(form.shape) // form.neurons + form.biased + 1 + older,
        # The first dendrites of a site settle on which neurons it has them.
        together=form.neurons if older else channels_together(form),
    )


def predicted_gains(prospect: Prospect, samples: float) -> list[float]:
    """Return the predicted gain of each channel, in nats per sample, 0 for those at chance.

    Args:
        prospect: of one site.
        samples: how many samples a batch has.
    """
    space = prospect.positions_per_batch / samples
    chance = prospect.chance
    return [space * r**2 / 2 if abs(r) > chance else 0.0 for r in prospect.correlations]


def samples_per_batch(prospects: Sequence[Prospect]) -> float:
    """Return how many samples a batch has, as far as the sites of one model can tell."""
    return min((p.positions_per_batch for p in prospects if p.positions), default=1.0)


def select(
    prospects: Sequence[Prospect], top_k: int | None = None, parameters: int | None = None
) -> list[Choice]:
    """Choose what grows: what pays, by gain per parameter, the best first.

    Args:
        prospects: of all sites of a model.
        top_k: how many sites grow at most; None for any number.
        parameters: how many parameters may be added; None for any number. What no longer fits is
            passed over, and what costs less may still follow.

    Returns:
        A choice for each prospect, in their order; without channels where nothing pays.
    """
    samples = samples_per_batch(prospects)
    paying = {p.site: list(_paying(p, samples)) for p in prospects}
    rates = {
        site: sum(u.gain for u in units) / sum(u.cost for u in units)
        for site, units in paying.items()
        if units
    }
    best = sorted(rates, key=lambda site: -rates[site])[:top_k]
    grown: dict[str, list[_Unit]] = {p.site: [] for p in prospects}
    left = math.inf if parameters is None else parameters
    for unit in sorted((u for site in best for u in paying[site]), key=lambda u: -u.rate):
        if unit.cost <= left:
            left -= unit.cost
            grown[unit.site].append(unit)
    return [
        _choice(p, grown[p.site], _why_none(p, samples, bool(paying[p.site]), p.site in best))
        for p in prospects
    ]


def _paying(prospect: Prospect, samples: float) -> Iterator[_Unit]:
    gains = predicted_gains(prospect, samples)
    size = prospect.together
    for first in range(0, len(gains), size):
        unit = _Unit(
            prospect.site,
            range(first, first + size),
            sum(gains[first : first + size]),
            prospect.cost * size,
        )
        if unit.rate * prospect.epoch_batches * samples > WORTH:
            yield unit


def _choice(prospect: Prospect, units: Sequence[_Unit], why_none: str) -> Choice:
    channels = tuple(sorted(channel for unit in units for channel in unit.channels))
    gain, cost = sum(unit.gain for unit in units), sum(unit.cost for unit in units)
    reason = (
        f"dendrites at {prospect.site} on {len(channels)} of "
        f"{counted(len(prospect.correlations), 'channel')}: a predicted gain of {gain:.3g} nats "
        f"per sample for {cost:,} parameters"
        if channels
        else f"no dendrite at {prospect.site}: {why_none}"
    )
    return Choice(prospect.site, channels, gain, cost, reason)


def _why_none(prospect: Prospect, samples: float, pays: bool, is_among_best: bool) -> str:
    """Return why a site grows nothing, if it does not."""
    if not prospect.positions:
        return "nothing was measured of its candidates, or no error reaches it"
    largest = max(map(abs, prospect.correlations))
    if largest <= prospect.chance:
        return (
            f"its candidates' correlation with the error on unseen batches, {largest:.3g} at most, "
            f"is at chance ({prospect.chance:.3g})"
        )
    if not pays:
        gain = sum(predicted_gains(prospect, samples))
        cost = prospect.cost * len(prospect.correlations)
        return (
            f"a predicted gain of {gain:.3g} nats per sample does not pay for {cost:,} parameters"
        )
    if not is_among_best:
        return "other sites gain more per parameter, and top_k sites grow"
    return "what it would gain does not fit into growth_parameters"
