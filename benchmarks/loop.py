"""The rival that anyone can write in an afternoon: a Python loop over plain modules.

    z_d = V_d x + c_d + Σ_{e<d} U_{d,e} ⊙ a_e      a_d = tanh(z_d)      y = W x + b + Σ_d T_d ⊙ a_d

One module per dendrite, no stacking, no custom op. It is also what the gate compares with, because
it is written from the equation and shares no code with pbfx.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

SITES = (nn.Linear, nn.Conv2d)


class LoopNeuron(nn.Module):
    """A soma and its dendrites.

    Args:
        soma: the plain module.
        dendrites: D.
        frozen: perforated: dendrites do not learn, and pass no error on to what they read.
    """

    def __init__(self, soma: nn.Linear | nn.Conv2d, dendrites: int, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen
        neurons = soma.weight.shape[0]
        # A trailing 1 per spatial axis lines the links up with the channels.
        self.tail = (1,) * (soma.weight.dim() - 2)
        self.soma = soma
        self.dendrites = nn.ModuleList(copy.deepcopy(soma) for _ in range(dendrites))
        self.to_soma = nn.Parameter(soma.weight.new_zeros(dendrites, neurons))
        self.to_dendrite = nn.Parameter(soma.weight.new_zeros(dendrites, dendrites, neurons))
        self.dendrites.requires_grad_(not frozen)
        self.to_dendrite.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        out = self.soma(x)
        seen = x.detach() if self.frozen else x
        activations: list[Tensor] = []
        for d, dendrite in enumerate(self.dendrites):
            z = dendrite(seen)
            for e, earlier in enumerate(activations):
                z = z + self.to_dendrite[d, e].reshape(-1, *self.tail) * earlier
            a = torch.tanh(z)
            out = out + self.to_soma[d].reshape(-1, *self.tail) * a
            activations.append(a)
        return out


def loop_of(model: nn.Module, dendrites: int, frozen: bool) -> nn.Module:
    """Replace every linear and conv module of `model` by a `LoopNeuron`, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, SITES):
            owner, _, name = path.rpartition(".")
            neuron = LoopNeuron(module, dendrites, frozen)
            setattr(model.get_submodule(owner), name, neuron)
    return model


@torch.no_grad()
def copy_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the loops of `model` the dendrites of a pbfx state dict."""
    for path, neuron in _neurons(model):
        key = f"{path}.dendrites"
        if f"{key}.weight" not in state:
            continue
        for d, dendrite in enumerate(neuron.dendrites):
            for role, parameter in dendrite.named_parameters():
                parameter.copy_(state[f"{key}.{role}"][d])
        neuron.to_soma.copy_(state[f"{key}.to_soma"])
        neuron.to_dendrite.copy_(state[f"{key}.to_dendrite"])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a loop model under the names and shapes that pbfx gives them."""
    found: dict[str, Tensor] = {}
    for path, neuron in _neurons(model):
        for role, parameter in neuron.soma.named_parameters():
            if parameter.grad is not None:
                found[f"{path}.{role}"] = parameter.grad
            grads = [d.get_parameter(role).grad for d in neuron.dendrites]
            stacked = [grad for grad in grads if grad is not None]
            if stacked:
                found[f"{path}.dendrites.{role}"] = torch.stack(stacked)
        for role in ("to_soma", "to_dendrite"):
            grad = neuron.get_parameter(role).grad
            if grad is not None:
                found[f"{path}.dendrites.{role}"] = grad
    return found


def _neurons(model: nn.Module) -> Iterator[tuple[str, LoopNeuron]]:
    for path, module in model.named_modules():
        if isinstance(module, LoopNeuron):
            yield path, module
