"""A layer with dendrites in the dendrite phase: one candidate learns, the rest is frozen.

    z = V x + c + Σ_{e<D} U_e ⊙ a_e        dz = -s ⊙ (g - ḡ) ⊙ f'(z) / P

The error g passes on to the layer's input; the candidate gets its weight, bias and cascade
gradients, and five sums over positions. What anyone can write is an `autograd.Function` that passes
g on and sends dz into an ordinary layer; a compiler can look into all of it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.neurons import Layer, Neuron, Tensors
from pbfx_kernels import candidates, dendrites

NAMES = ("candidate", "candidate_bias", "candidate_links", "moments", "direction", "error_mean")


@dataclasses.dataclass(frozen=True)
class Pool:
    """One candidate per neuron: weight, bias, links, moments, direction, mean error.

    Attributes:
        tensors: `(1, *W)`, `(1, N)`, `(1, D, N)`, `(6, N)`, `(1, N)`, `(N,)`, the last three
            float32.
    """

    tensors: tuple[Tensor, ...]


def draw(tensors: Tensors, seed: int) -> Pool:
    """Draw a candidate for each neuron of a layer, of the dtype and device of its weight."""
    weight, device = tensors.weight, tensors.weight.device
    generator = torch.Generator(device).manual_seed(seed + 1)
    count, n = tensors.dendrites[2].shape
    fan = math.prod(weight.shape[1:]) ** -0.5

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    own = normal(1, *weight.shape, scale=fan).to(weight.dtype)
    learning = (
        own[0].to(memory_format=torch.channels_last)[None] if _last(tensors) else own,
        normal(1, n).to(weight.dtype),
        normal(1, count, n, scale=0.3).to(weight.dtype),
        torch.zeros(6, n, device=device),
    )
    direction = normal(1, n).sign()
    return Pool((*(t.requires_grad_() for t in learning), direction, normal(n, scale=0.1)))


def _last(tensors: Tensors) -> bool:
    return tensors.layer.channels_last and tensors.weight.dim() == 4


class _Passing(torch.autograd.Function):
    """Pass the error on, and teach the candidate whose preactivation it is from it."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, z: Tensor, _moments: Tensor, direction: Tensor, mean: Tensor
    ) -> Tensor:
        ctx.save_for_backward(z, direction, mean)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        z, direction, mean = ctx.saved_tensors
        # A linear layer's neurons are its last axis, a convolution's its second.
        axis = 1 if z.dim() == 4 else -1
        tail = (1,) * (z.dim() - 2) if z.dim() == 4 else ()
        over = [i for i in range(z.dim()) if i != axis % z.dim()]
        a, error = torch.tanh(z.float()), g.float()
        positions = z.numel() // z.shape[axis]
        centred = error - mean.reshape(-1, *tail)
        dz = -direction.reshape(-1, *tail) * centred * (1 - a * a) / positions
        count = torch.full_like(mean, positions)
        sums = [t.sum(over) for t in (a, a * a, error, error * error, a * error)]
        return g, dz.to(z.dtype), torch.stack([count, *sums]), None, None


def loop(layer: Layer) -> Neuron:
    """Return the layer with its dendrites and a candidate, an op per dendrite."""
    tail = (1,) * layer.geometry.spatial

    def neuron(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        (v, c, to_soma, to_dendrite), pool = rest[:4], rest[4:]
        own, offset, links, moments, direction, mean = pool
        out, seen = layer.soma(x, weight, bias), x.detach()
        activations: list[Tensor] = []
        for d in range(v.shape[0]):
            z = layer.soma(seen, v[d], c[d])
            for e, earlier in enumerate(activations):
                z = z + to_dendrite[d, e].reshape(-1, *tail) * earlier
            activations.append(torch.tanh(z))
            out = out + to_soma[d].reshape(-1, *tail) * activations[d]
        z = layer.soma(seen, own[0], offset[0])
        for e, earlier in enumerate(activations):
            z = z + links[0, e].reshape(-1, *tail) * earlier.detach()
        return _Passing.apply(out, z, moments, direction, mean)

    return neuron


def chosen(layer: Layer) -> Neuron:
    """Return pbfx, as its graphs hold a site in the dendrite phase."""
    geometry = layer.geometry

    def neuron(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        accepted, pool = rest[:4], rest[4:]
        out = layer.soma(x, weight, bias)
        activations = out.new_empty((0, *out.shape))
        if accepted[0].shape[0]:
            out, activations = dendrites(out, x, *accepted, "tanh", geometry)
        own, offset, links, moments, direction, mean = pool
        given = x, activations, own, offset, links, moments, direction, mean
        return candidates(out, *given, "tanh", geometry)[0]

    return neuron
