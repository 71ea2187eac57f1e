"""Grow by hand: accepted dendrites that read random directions, without a tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pbfx.copies import Filling
from pbfx.dendrites import Dendrites
from pbfx.errors import ConfigError, RestructureError, nearest
from pbfx.parts import parts_of
from pbfx.paths import join
from pbfx.perforated import PerforatedModule
from pbfx.phase import Phase
from pbfx.restructure import restructuring
from pbfx.sites import Site, why_no_subset


def grow(
    model: nn.Module,
    n: int = 1,
    sites: str | Sequence[str] | None = None,
    channels: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
) -> nn.Module:
    """Add accepted dendrites by hand.

    They read random directions and start with zero soma weight, so the output does not change.

    Args:
        model: a model with perforated parts; edited in place.
        n: how many dendrites per neuron to add, at least 1.
        sites: paths of the sites to grow, as `pbfx.explain` shows them; None for all.
        channels: the neurons to grow on, as channels of the op's output; for each of the sites, or
            by the path of the site, which are then the sites to grow if `sites` is None. None for
            all neurons, or for those on which the site has dendrites already: the first dendrites
            of a site settle on which neurons it has them. Of a convolution in groups whole groups.

    Returns:
        `model` itself. Make the optimizer after growing: its parameters are new objects.

    Raises:
        ConfigError: if `n` is not a positive whole number, a site is unknown, or channels are not
            those of the site or of its dendrites.
        RestructureError: if the model has no perforated parts, is in the dendrite phase, or has a
            tracker, which would not know.
    """
    parts = parts_of(model)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError(f"pbfx.grow: n must be a whole number of at least 1, got {n!r}")
    known = {join(path, s.name) for path, part in parts.items() for s in part.perforation.sites}
    by_site = channels if isinstance(channels, Mapping) else {}
    if sites is None:
        wanted = set(by_site) if by_site else known
    else:
        wanted = set([sites] if isinstance(sites, str) else sites)
    for name in sorted((wanted | set(by_site)) - known):
        raise ConfigError(f"pbfx.grow: there is no site {name!r}; {nearest(name, known)}")
    for name in sorted(set(by_site) - wanted):
        raise ConfigError(f"pbfx.grow: channels names the site {name!r}, and sites leaves it out")
    for path, part in parts.items():
        where = f" in {path!r}" if path else ""
        if part.perforation.phase is Phase.DENDRITE:
            raise RestructureError(
                f"pbfx.grow: the model{where} is in its dendrite phase; let the tracker finish it "
                "first"
            )
        if part.perforation.tracker is not None:
            raise RestructureError(
                f"pbfx.grow: a tracker manages the model{where}, and its optimizer would miss the "
                "new parameters; grow before making the optimizer and the tracker"
            )
    settled: dict[str, tuple[int, ...] | None] = {}
    faults = []
    for path, part in parts.items():
        grown = part.grown()
        for site in part.perforation.sites:
            full = join(path, site.name)
            if full in wanted:
                asked = by_site.get(full) if isinstance(channels, Mapping) else channels
                if asked is not None and part.perforation.config.reserve:
                    faults.append(
                        f"the site {full!r}: Config(reserve=...) has made slots on all of its "
                        "channels; leave out channels"
                    )
                    continue
                try:
                    settled[full] = _settle(site, grown.get(site.name), asked)
                except ConfigError as error:
                    faults.append(f"the site {full!r}: {error}")
    if faults:
        raise ConfigError("pbfx.grow: " + "; ".join(faults))
    # What is new is written into new tensors.
    with restructuring(model, values=False):
        for path, part in parts.items():
            names = {site.name: join(path, site.name) for site in part.perforation.sites}
            grow_part(part, n, {s: settled[full] for s, full in names.items() if full in wanted})
    return model


def _settle(
    site: Site, dendrites: Dendrites | None, asked: Sequence[int] | None
) -> tuple[int, ...] | None:
    """Return on which channels of `site` a growth by hand happens, None for all.

    Raises:
        ConfigError: if that cannot be on those that were asked for.
    """
    has = None if dendrites is None else dendrites.site.channels
    if asked is None:
        return has
    given = list(asked)
    fault = why_no_subset(site, given)
    channels = None if len(given) == site.neurons else tuple(sorted(given))
    if fault is None and dendrites is not None and dendrites.count and channels != has:
        settled = "all channels" if has is None else f"the channels {list(has)}"
        fault = (
            f"it has dendrites on {settled}, and more can only grow on the same, got "
            f"{sorted(given)}; leave out channels"
        )
    if fault is not None:
        raise ConfigError(fault)
    return channels


def grow_part(
    part: PerforatedModule, n: int, channels: Mapping[str, tuple[int, ...] | None]
) -> None:
    """Append `n` random dendrites to sites of one part, and rebuild its graph.

    Args:
        part: edited in place.
        n: how many.
        channels: for the name of each site to grow its channels, None for all. They matter where
            the site has no dendrites yet.
    """
    grown, growing = part.grown(), []
    for site in part.perforation.sites:
        if site.name in channels:
            known = grown.get(site.name)
            # The channels of a site are settled by its first dendrites.
            settled = known is None or known.count or known.site.channels == channels[site.name]
            if not settled:
                part.drop_dendrites(site)
            growing.append(part.ensure_dendrites(site, channels[site.name]))
    drawn = part.draw([(d.site, 1) for d in growing for _ in range(n)])
    filling = Filling()
    for number in range(n):
        for dendrites, (weight, bias) in zip(growing, drawn[number::n], strict=True):
            links = weight.new_zeros(dendrites.count, dendrites.site.neurons)
            bias = None if bias is None else bias[0]
            dendrites.append(weight[0], bias, links, filling=filling)
        # The next ones copy these.
        filling.fill()
    part.rebuild()
