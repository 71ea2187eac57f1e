"""The module that owns the candidates of a site while they train, and feeds nothing.

    weight        (C, *soma.weight.shape)   V of each candidate, as a dendrite's
    bias          (C, N)                    c
    to_dendrite   (C, D, N)                 U: what it reads of the accepted dendrites
    moments       (6 * C, N)                no value: its "gradient" brings the sums of a batch

The rest are buffers: the learner's memory, and the best candidates so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pbfx_kernels
from pbfx.config import Config
from pbfx.copies import Filling
from pbfx.reserve import padded
from pbfx.sited import Sited, fit_form, in_torch_func, pad, per_dendrite
from pbfx.sites import Site
from pbfx.spread import Spread
from pbfx_kernels import Moment

# What candidates hold for each older dendrite.
_LINKS = ("to_dendrite", "best_to_dendrite")
# The candidates' buffers that are kept as their weights are.
_LIKE_WEIGHT = frozenset(("best_weight", "best_bias", "best_to_dendrite"))
# Where |f''| is largest: artanh(1/√3), and twice that. The other activations bend most at zero.
_BENDS = {"tanh": 0.6584789484624085, "sigmoid": 1.316957896924817}


def bend_of(config: Config) -> float:
    """Return the preactivation around which candidates start, 0 unless `config` asks for more."""
    return _BENDS.get(config.activation, 0.0) if config.candidate_bias == "bend" else 0.0


class Candidates(Sited):
    """C candidates per neuron: they read what the soma reads, and feed nothing.

    The forward returns the neuron's output unchanged. The backward leaves each candidate's learning
    gradient in its parameters, and the batch's moments of activation and error in the `.grad` of
    `moments`, a parameter whose value is never read. `pbfx.learning` consumes both as they arrive.

    The buffers are the learner's memory; they live here so that they move, save and load with the
    model: `running` the decayed sums of learning batches, `heldout` the sums of measuring batches
    of this epoch, `best_*` the best candidates seen on measuring batches, and what was measured of
    them. `spread` measures the preactivations of candidates that join after a norm.
    """

    alive: int | None
    activation: str
    spread: Spread | None
    bias: nn.Parameter | None
    to_dendrite: nn.Parameter
    moments: nn.Parameter
    direction: Tensor
    error_mean: Tensor
    regression: Tensor | None
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
        self,
        site: Site,
        config: Config,
        weight: Tensor,
        bias: Tensor | None,
        dendrites: int,
        reserved: int = 0,
        filling: Filling | None = None,
    ) -> None:
        super().__init__(site, weight.device)
        # As attributes all of these would cost a restructure several times as much.
        vars(self).update(
            # Which of the dendrites that they read exist; None without a reserve.
            alive=dendrites if reserved else None,
            activation=config.activation,
        )
        count, neurons = weight.shape[0], site.neurons
        own, buffers = self._parameters, self._buffers
        own["weight"] = nn.Parameter(weight)
        own["bias"] = None if bias is None else nn.Parameter(bias)
        memory = Filling() if filling is None else filling
        links = memory.zeros(weight, (count, reserved or dendrites, neurons))
        own["to_dendrite"] = nn.Parameter(links)
        sums = len(Moment), count, neurons
        # Sums over many batches of small numbers: float32 at least, whatever the model's dtype.
        precise = torch.promote_types(weight.dtype, torch.float32)
        # 2-D, because an optimizer may take matrices only (Muon), and the user's optimizer holds
        # this parameter.
        own["moments"] = nn.Parameter(memory.zeros(weight, (sums[0] * count, neurons), precise))
        buffers["direction"] = memory.zeros(weight, (count, neurons), precise)
        buffers["error_mean"] = memory.zeros(weight, (neurons,), precise)
        for name, shape in {
            "running": sums,
            "running_batches": (),
            "heldout": sums,
            "heldout_batches": (),
            "best_score": (count, neurons),
            "best_moments": sums,
            "best_batches": (count, neurons),
        }.items():
            memory.place(buffers, name, weight, shape, precise)
        climbs = config.objective == "correlation"
        line = memory.zeros(weight, (2, count, neurons), precise) if climbs else None
        buffers["regression"] = line
        # A norm scales what its neuron computes; dendrites join after it and have to come scaled.
        spread = Spread(count, neurons, weight, precise, memory) if site.norm else None
        self._modules["spread"] = spread
        memory.place_copy(buffers, "best_weight", weight)
        buffers["best_bias"] = None
        if bias is not None:
            memory.place_copy(buffers, "best_bias", bias)
        memory.place(buffers, "best_to_dendrite", links, links.shape)
        if filling is None:
            memory.fill()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Candidates:
        # Sums over many batches keep their float32 under `half` and `bfloat16`.
        sums = [self.moments, *(t for name, t in self.named_buffers() if name not in _LIKE_WEIGHT)]
        wide = {id(t) for s in sums for t in (s, s.grad) if t is not None}
        apart = per_dendrite(fn, self.weight, self.best_weight)

        def change(tensor: Tensor) -> Tensor:
            new = apart(tensor)
            narrowed = id(tensor) in wide and new.dtype.itemsize < torch.float32.itemsize
            return tensor.to(new.device) if narrowed else new

        super()._apply(change, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.alive is not None:
            for name in _LINKS:
                destination[prefix + name] = destination[prefix + name][:, : self.alive]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        if self.alive is not None and f"{prefix}weight" in state_dict:
            links = ((name, getattr(self, name).detach(), (1,)) for name in _LINKS)
            state_dict = padded(state_dict, prefix, links)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    @property
    def count(self) -> int:
        """C, the size of the pool."""
        return self.weight.shape[0]

    @property
    def dendrites(self) -> int:
        """D, how many accepted dendrites the neurons had when the pool was drawn."""
        return self.to_dendrite.shape[1]

    def learnt(self) -> list[nn.Parameter]:
        """Return the parameters that candidate learning steps, and no one else."""
        return [
            p for p in (self.weight, self.bias, self.to_dendrite) if p is not None and p.numel()
        ]

    def forward(self, neuron: Tensor, x: Tensor, activations: Tensor) -> Tensor:
        """Return `neuron` unchanged; on the way back, measure the error that arrives there."""
        # Nothing comes back from a forward without gradients, such as a validation pass, and of one
        # that torch.func differentiates nothing stays behind.
        if not torch.is_grad_enabled() or in_torch_func():
            return neuron
        part, x = self.take(neuron, x)
        out, z = pbfx_kernels.candidates(
            part,
            pad(x, self.site),
            activations,
            self.site.op_weight(self.weight),
            self.bias,
            self.to_dendrite,
            self.moments,
            self.direction,
            self.error_mean,
            self.activation,
            fit_form(self.site, part, x),
            self.regression,
        )
        if self.spread is not None and self.spread.open:
            self.spread.add(z, self.site.geometry.channel_axis)
        return self.put(neuron, out)
