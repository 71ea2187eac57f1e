"""Models whose dendrites are on some of the channels of each site."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pbfx
from pbfx.dendrites import Dendrites
from pbfx.parts import parts_of
from pbfx.paths import join
from pbfx.sites import Site, channels_together, on_channels, rows_of


def some_channels(site: Site) -> list[int]:
    """Return every second unit of `site`, from the first on; all of a site that has but one."""
    size = channels_together(site)
    return [c for c in range(site.neurons) if c // size % 2 == 0]


def sites_of(model: nn.Module) -> dict[str, Site]:
    return {
        join(path, site.name): site
        for path, part in parts_of(model).items()
        for site in part.perforation.sites
    }


def dendrites_of(model: nn.Module) -> dict[str, Dendrites]:
    return {
        join(path, name): module
        for path, part in parts_of(model).items()
        for name, module in part.grown().items()
    }


def grow_some(model: nn.Module, n: int = 1) -> nn.Module:
    """Grow `n` dendrites on some channels of every site."""
    return pbfx.grow(model, n, channels={k: some_channels(s) for k, s in sites_of(model).items()})


@torch.no_grad()
def restrict(whole: nn.Module, part: nn.Module) -> None:
    """Give the dendrites of `part` the values of those of `whole`, and silence all others there."""
    sites, some = sites_of(whole), dendrites_of(part)
    for name, full in dendrites_of(whole).items():
        subset = on_channels(sites[name], some[name].site.channels)
        kept = torch.arange(sites[name].neurons)
        if subset.channels is not None:
            kept = torch.tensor(subset.channels)
        for d in range(full.count):
            some[name].weight[d] = rows_of(sites[name], full.weight[d], subset)
        for role in ("bias", "to_soma", "to_dendrite"):
            if getattr(full, role) is not None:
                getattr(some[name], role).copy_(getattr(full, role)[..., kept])
        mask = torch.zeros(sites[name].neurons, dtype=full.to_soma.dtype).index_fill(0, kept, 1.0)
        full.to_soma.mul_(mask)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()
