"""The modules that own a site's dendrites: the accepted ones, and the candidates in training.

All D dendrites of a site are stacked in one tensor per role, so that one op evaluates them and a
checkpoint holds four tensors per site whatever D is:

    weight        (D, *soma.weight.shape)   V in the equations
    bias          (D, N)                    c, where the soma has a bias
    to_soma       (D, N)                    T: zero at birth, so growing never changes the output
    to_dendrite   (D, D, N)                 U, strictly lower-triangular: the cascade

A change of D replaces these parameters by new ones. It never resizes a tensor in place: autograd
remembers the shape of a leaf for as long as anyone holds an old loss.
"""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx_kernels
from pbfx.config import Config
from pbfx.sites import Site
from pbfx_kernels import Moment


def draw_weights(
    like: Tensor, has_bias: bool, count: int, seed: str
) -> tuple[Tensor, Tensor | None]:
    """Draw `count` sets of weights as torch initialises a fresh linear or conv layer,
    U(±1/sqrt(fan_in)).

    Args:
        like: the soma's weight (N, ...), for shape, dtype and device.
        has_bias: whether to draw biases too.
        count: D or C.
        seed: names the draw; the same words give the same numbers on every machine.

    Returns:
        Weights (count, *like.shape), and biases (count, N) or None. torch's global streams are not
        touched.
    """
    fan_in = max(like[0].numel(), 1)
    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(seed.encode()))

    def uniform(*shape: int) -> Tensor:
        if like.is_meta:
            return torch.empty(shape, dtype=like.dtype, device="meta")
        drawn = (
            torch.rand(shape, generator=generator, device="cpu").mul_(2).sub_(1).div_(fan_in**0.5)
        )
        return drawn.to(device=like.device, dtype=like.dtype)

    weight = uniform(count, *like.shape)
    return weight, uniform(count, like.shape[0]) if has_bias else None


class Candidates(nn.Module):
    """C candidates per neuron: they read what the soma reads, and feed nothing.

    The forward returns the neuron's output unchanged. The backward leaves each candidate's learning
    gradient in its parameters, and the batch's moments of activation and error in the `.grad` of
    `moments`, a parameter whose value is never read. `pbfx.learning` consumes both as they arrive.

    The buffers are the learner's memory; they live here so that they move, save and load with the
    model: `running` the decayed sums of learning batches, `heldout` the sums of measuring batches
    of this epoch, `best_*` the best candidates seen on measuring batches, and what was measured of
    them.
    """

    direction: Tensor
    error_mean: Tensor
    running: Tensor
    running_batches: Tensor
    heldout: Tensor
    heldout_batches: Tensor
    best_score: Tensor
    best_moments: Tensor
    best_batches: Tensor
    best_weight: Tensor
    best_to_dendrite: Tensor

    def __init__(
        self, site: Site, config: Config, weight: Tensor, bias: Tensor | None, dendrites: int
    ) -> None:
        super().__init__()
        self.site, self.activation = site, config.activation
        count, neurons = weight.shape[:2]
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.to_dendrite = nn.Parameter(weight.new_zeros(count, dendrites, neurons))
        sums = len(Moment), count, neurons
        # Sums over many batches of small numbers: float32 at least, whatever the model's dtype.
        precise = torch.promote_types(weight.dtype, torch.float32)
        # 2-D, because an optimizer may take matrices only (Muon), and the user's optimizer holds
        # this parameter.
        self.moments = nn.Parameter(weight.new_zeros(sums[0] * count, neurons, dtype=precise))
        for name, shape in {
            "direction": (count, neurons),
            "error_mean": (neurons,),
            "running": sums,
            "running_batches": (),
            "heldout": sums,
            "heldout_batches": (),
            "best_score": (count, neurons),
            "best_moments": sums,
            "best_batches": (count, neurons),
        }.items():
            self.register_buffer(name, weight.new_zeros(shape, dtype=precise))
        self.register_buffer("best_weight", weight.detach().clone())
        self.register_buffer("best_bias", None if bias is None else bias.detach().clone())
        self.register_buffer("best_to_dendrite", self.to_dendrite.detach().clone())

    @property
    def count(self) -> int:
        """C, the size of the pool."""
        return self.weight.shape[0]

    def learnt(self) -> list[nn.Parameter]:
        """Return the parameters that candidate learning steps, and no one else."""
        return [
            p for p in (self.weight, self.bias, self.to_dendrite) if p is not None and p.numel()
        ]

    def forward(self, neuron: Tensor, x: Tensor, activations: Tensor) -> Tensor:
        """Return `neuron` unchanged; on the way back, measure the error that arrives there."""
        # Nothing comes back from a forward without gradients, such as a validation pass.
        if not torch.is_grad_enabled():
            return neuron
        out, _ = pbfx_kernels.candidates(
            neuron,
            pad(x, self.site),
            activations,
            self.weight,
            self.bias,
            self.to_dendrite,
            self.moments,
            self.direction,
            self.error_mean,
            self.activation,
            self.site.geometry,
        )
        return out


class Dendrites(nn.Module):
    """The D accepted dendrites of a site, and in the dendrite phase its candidates.

    Args:
        site: where they grow.
        config: activation and mode of learning.
        weight: the soma's weight, for shape, dtype and device.
    """

    candidates: Candidates | None

    def __init__(self, site: Site, config: Config, weight: Tensor) -> None:
        super().__init__()
        self.site, self.activation, self.learning = site, config.activation, config.learning
        neurons = weight.shape[0]
        like = weight.detach()
        self.weight = nn.Parameter(like.new_zeros(0, *weight.shape))
        self.bias = nn.Parameter(like.new_zeros(0, neurons)) if site.bias else None
        self.to_soma = nn.Parameter(like.new_zeros(0, neurons))
        self.to_dendrite = nn.Parameter(like.new_zeros(0, 0, neurons))
        self.candidates = None
        self.set_trainable()

    @property
    def count(self) -> int:
        """D, the number of accepted dendrites per neuron."""
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        """Show D and the activation in the model's printout."""
        return f"dendrites={self.count}, activation={self.activation!r}, learning={self.learning!r}"

    def set_trainable(self) -> None:
        """Let those parameters require gradients that the neuron phase trains in this mode."""
        for role in (self.weight, self.bias, self.to_dendrite):
            if role is not None:
                role.requires_grad_(self.learning == "gradient")
        self.to_soma.requires_grad_(self.learning != "sham")

    def append(self, weight: Tensor, bias: Tensor | None, to_dendrite: Tensor) -> None:
        """Accept one dendrite per neuron, with zero soma weight.

        Args:
            weight: (*soma.weight.shape).
            bias: (N,), or None where the soma has none.
            to_dendrite: (D, N), how strongly each older dendrite feeds the new one.
        """
        old = self.count
        self.resize(old + 1)
        with torch.no_grad():
            self.weight[old] = weight
            if self.bias is not None and bias is not None:
                self.bias[old] = bias
            self.to_dendrite[old, :old] = to_dendrite

    def resize(self, count: int) -> None:
        """Keep the first `count` dendrites; new ones, if any, are all zeros."""

        def resized(old: nn.Parameter, *shape: int) -> nn.Parameter:
            new = torch.zeros(shape, dtype=old.dtype, device=old.device)
            kept = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, shape, strict=True))
            new[kept] = old.detach()[kept]
            return nn.Parameter(new)

        if count == self.count:
            return
        neurons = self.to_soma.shape[1]
        self.to_soma = resized(self.to_soma, count, neurons)
        self.to_dendrite = resized(self.to_dendrite, count, count, neurons)
        if self.bias is not None:
            self.bias = resized(self.bias, count, neurons)
        self.weight = resized(self.weight, count, *self.weight.shape[1:])
        self.set_trainable()

    def forward(self, soma: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the neuron's output, and the dendrites' activations for the candidates.

        Args:
            soma: what the soma gave, (..., N) for linear, (B, N, *space) for conv.
            x: what the soma read.
        """
        if not self.count:
            return soma, soma.new_empty((0, *soma.shape))
        arguments = (
            soma,
            pad(x, self.site),
            self.weight,
            self.bias,
            self.to_soma,
            self.to_dendrite,
            self.activation,
            self.site.geometry,
        )
        if self.learning == "gradient":
            return pbfx_kernels.reference.dendrites(*arguments)
        # Only candidates read the activations, and only where gradients are wanted.
        keep = self.candidates is not None and torch.is_grad_enabled()
        return pbfx_kernels.dendrites(*arguments, keep=keep)


def pad(x: Tensor, site: Site) -> Tensor:
    """Apply the padding that the op itself cannot, as the soma's own module does."""
    return x if site.padding is None else F.pad(x, site.padding.widths, mode=site.padding.mode)
