"""One layer whose dendrites learn by plain backpropagation: pbfx, and who else computes that.

The gradient-mode step of `benchmarks.kernels`: output, then gradients of the input and of every
parameter. Its floor is 3 (D + 1) products, D + 1 times the plain layer's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import pbfx_kernels
from benchmarks import neurons
from benchmarks.neurons import Layer, Neuron, Tensors
from pbfx_kernels.full_gradient import has_kernels
from pbfx_kernels.strategy import Strategy


def chosen(layer: Layer) -> Neuron:
    """Return pbfx as a model in gradient mode calls it."""

    def neuron(x: Tensor, weight: Tensor, bias: Tensor, *dendrites: Tensor) -> Tensor:
        soma = layer.soma(x, weight, bias)
        full = pbfx_kernels.full_dendrites
        return full(soma, x, *dendrites, "tanh", layer.geometry, keep=False)[0]

    return neuron


def strategy(tensors: Tensors) -> str:
    """Return what runs between the products."""
    known = has_kernels(tensors.grad, tensors.dendrites[0], tensors.layer.geometry)
    return (Strategy.PACKED if known else Strategy.REFERENCE).value


def providers(layer: Layer, compiled: bool) -> dict[str, Neuron]:
    """Return who computes the layer, by the names of `benchmarks.kernels`."""
    loop, packed = neurons.loop(layer, frozen=False), neurons.packed(layer, frozen=False)
    found = {
        "plain": neurons.plain(layer),
        "pbfx": chosen(layer),
        "eager loop": loop,
        "eager packed": packed,
    }
    if compiled:
        compile_ = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        found["inductor"] = compile_(loop)
        found["packed + inductor"] = compile_(packed)
        found["pbfx compiled"] = compile_(chosen(layer))
    return found
