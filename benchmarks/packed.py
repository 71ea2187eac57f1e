"""The better rival: the dendrites of a layer as one library call and plain torch after it.

    z = x [V_1; ...; V_D]ᵀ        out = W x + b + Σ_d T_d ⊙ tanh(z_d + c_d + Σ_{e<d} U_{d,e} ⊙ a_e)

It is what an engineer writes who knows that many small products are slow, and under Inductor its
epilogue is one kernel. Dendrites are frozen, and pass no error on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks import neurons
from benchmarks.loop import SITES
from benchmarks.neurons import Layer
from pbfx_kernels import Geometry


class PackedNeuron(nn.Module):
    """A soma, and its dendrites stacked.

    Args:
        soma: the plain module.
        dendrites: D.
    """

    def __init__(self, soma: nn.Linear | nn.Conv2d, dendrites: int) -> None:
        super().__init__()
        weight, geometry = soma.weight, Geometry()
        if isinstance(soma, nn.Conv2d):
            assert not isinstance(soma.padding, str), "numbers are all that benchmarks use"
            geometry = Geometry.convolution(
                2, soma.stride, soma.padding, soma.dilation, soma.groups
            )
        self.soma = soma
        self.compute = neurons.packed(Layer("", (), tuple(weight.shape), geometry))
        n = weight.shape[0]
        self.register_buffer("weight", weight.new_zeros(dendrites, *weight.shape))
        self.register_buffer("bias", weight.new_zeros(dendrites, n))
        self.register_buffer("to_dendrite", weight.new_zeros(dendrites, dendrites, n))
        self.to_soma = nn.Parameter(weight.new_zeros(dendrites, n))

    def forward(self, x: Tensor) -> Tensor:
        dendrites = self.weight, self.bias, self.to_soma, self.to_dendrite
        return self.compute(x, self.soma.weight, self.soma.bias, *dendrites)


def packed_of(model: nn.Module, dendrites: int) -> nn.Module:
    """Replace every linear and conv module of `model` by a `PackedNeuron`, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, SITES):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, PackedNeuron(module, dendrites))
    return model


@torch.no_grad()
def copy_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the neurons of `model` the dendrites of a pbfx state dict."""
    for path, neuron in model.named_modules():
        if isinstance(neuron, PackedNeuron):
            for role in ("weight", "bias", "to_soma", "to_dendrite"):
                if (tensor := state.get(f"{path}.dendrites.{role}")) is not None:
                    getattr(neuron, role).copy_(tensor)
