"""What dendrites learn by backpropagation, by an oracle that shares no code with the package."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from kernel_cases import ACTIVATION_MODULES, Site, Tensors
from torch import Tensor

from pbfx_kernels import Geometry

NAMES = ("soma", "x", "weight", "bias", "to_soma", "to_dendrite")


def oracle_full(site: Site, tensors: Tensors, activation: str, frozen: int = 0) -> Tensor:
    """Evaluate dendrites one by one, every step differentiable but for what is frozen."""
    x, out = tensors["x"], tensors["soma"]
    activations: list[Tensor] = []
    for d in range(len(tensors["weight"])):
        weight, links = tensors["weight"][d], tensors["to_dendrite"][d]
        bias = None if tensors["bias"] is None else tensors["bias"][d]
        if d < frozen:
            weight, links = weight.detach(), links.detach()
            bias = None if bias is None else bias.detach()
        z = site.soma(x, weight, bias)
        for e, a in enumerate(activations):
            z = z + site.per_channel(links[e]) * a
        activations.append(ACTIVATION_MODULES[activation](z))
        out = out + site.per_channel(tensors["to_soma"][d]) * activations[-1]
    return out


def oracle_gradients(
    site: Site, tensors: Tensors, grad: Tensor, activation: str, frozen: int = 0
) -> Tensors:
    """Differentiate the oracle, in float64 on the CPU, by what requires a gradient."""
    leaves = {
        name: None if t is None else t.detach().cpu().double().requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }
    learning = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
    out = oracle_full(site, leaves, activation, frozen)
    found = torch.autograd.grad(out, learning.values(), grad.cpu().double(), allow_unused=True)
    return {
        name: torch.zeros_like(learning[name]) if gradient is None else gradient
        for name, gradient in zip(learning, found, strict=True)
    }


@st.composite
def small_sites(draw: st.DrawFn, transposed: bool = False) -> Site:
    """Draw a linear op or a convolution over one or two dimensions, of any form."""
    spatial = draw(st.integers(int(transposed), 2))
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    if spatial == 0:
        more = draw(st.sampled_from([(), (5,)]))
        inputs = draw(st.integers(1, 9))
        return Site("drawn", (*batch, *more, inputs), (draw(st.integers(1, 70)), inputs))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    groups, taps, dilation, padding = draw(st.integers(1, 3)), each(1, 3), each(1, 2), each(0, 1)
    channels, neurons = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    # Enough that a transposed convolution's padding leaves something over.
    extents = tuple(
        d * (k - 1) + 1 + more for d, k, more in zip(dilation, taps, each(2, 5), strict=True)
    )
    zero = (0,) * spatial if transposed else ()
    geometry = Geometry(each(1, 2), padding, dilation, groups, transposed, zero)
    wide, x = groups * channels, (*batch, groups * channels, *extents)
    weight = (wide, neurons) if transposed else (groups * neurons, channels)
    return Site("drawn", x, (*weight, *taps), geometry)
