"""A site on some of its channels only: what its dendrites store, read and feed.

    y[channels] + Σ_d T_d ⊙ f(V_d x + ...)          V_d: the rows of W that belong to `channels`

Dendrites of different neurons have nothing to do with one another, so a site on n of its N channels
is an op with n neurons. Of a convolution in groups a subset is made of whole groups: what is left
is again a convolution in groups, which reads the input channels of these groups and no others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pbfx.sites.site import Site, Subset


def on_channels(site: Site, channels: Sequence[int] | None) -> Site:
    """Return the site that has the neurons `channels` of `site` only.

    Args:
        site: on all of its channels.
        channels: increasing, whole groups (`why_no_subset` says what is wrong); None for all.
    """
    if channels is None or len(channels) == site.neurons:
        return site
    assert site.subset is None, "a subset is taken of a whole site"
    form, shape, inputs = site.geometry, list(site.shape), None
    if form.groups == 1:
        shape[_neuron_axis(site)] = len(channels)
    else:
        groups = _groups(site, channels)
        width = form.channels(site.op_shape) // form.groups
        inputs = tuple(group * width + i for group in groups for i in range(width))
        shape[0] = len(inputs) if form.transposed else len(channels)
        form = dataclasses.replace(form, groups=len(groups))
    subset = Subset(tuple(channels), inputs)
    return dataclasses.replace(site, shape=tuple(shape), geometry=form, subset=subset)


def channels_together(site: Site) -> int:
    """Return how many neighbouring channels of `site` can only be chosen together."""
    return 1 if site.geometry.groups == 1 else site.neurons // site.geometry.groups


def why_no_subset(site: Site, channels: Sequence[int]) -> str | None:
    """Return why dendrites cannot be on these channels of `site`, or None."""
    strange = [c for c in channels if isinstance(c, bool) or not isinstance(c, int)]
    if strange or not channels:
        return f"channels must be whole numbers, at least one, got {list(channels)!r}"
    outside = sorted({c for c in channels if not 0 <= c < site.neurons})
    if outside:
        return f"it has channels 0 to {site.neurons - 1}, got {outside}"
    if len(set(channels)) != len(channels):
        return f"each channel may be named once, got {list(channels)!r}"
    size = channels_together(site)
    if len(channels) != size * len(_groups(site, channels)):
        return (
            f"its convolution has {site.geometry.groups} groups, whose {size} channels each "
            f"(0 to {size - 1}, ...) can only be taken together, got {sorted(channels)}"
        )
    return None


def rows_of(site: Site, weight: Tensor, subset: Site) -> Tensor:
    """Return the part (*subset.shape) of a weight (*site.shape) that `subset` stores."""
    taken = subset.subset
    if taken is None:
        return weight
    grouped = taken.inputs is not None and site.geometry.transposed
    kept = taken.inputs if grouped else taken.channels
    assert kept is not None
    axis = 0 if grouped else _neuron_axis(site)
    return weight.index_select(axis, torch.tensor(kept, device=weight.device))


def _neuron_axis(site: Site) -> int:
    return 1 if site.input_first else site.geometry.neuron_axis


def _groups(site: Site, channels: Sequence[int]) -> list[int]:
    return sorted({channel // channels_together(site) for channel in channels})
