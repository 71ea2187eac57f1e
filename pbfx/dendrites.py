"""The module that owns the accepted dendrites of a site.

All D dendrites of a site are stacked in one tensor per role, so that one op evaluates them and a
checkpoint holds four tensors per site whatever D is:

    weight        (D, *soma.weight.shape)   V in the equations
    bias          (D, N)                    c, where the site's dendrites have one
    to_soma       (D, N)                    T: zero at birth, so growing never changes the output
    to_dendrite   (D, D, N)                 U, strictly lower-triangular: the cascade
    channels      (N,)                      whose they are; absent where all the op's neurons have
                                            dendrites. Else N counts those that do

A change of D replaces these parameters by new ones. It never resizes a tensor in place: autograd
remembers the shape of a leaf for as long as anyone holds an old loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pbfx_kernels
from pbfx.candidates import Candidates
from pbfx.config import Config, Learning, Tuning
from pbfx.copies import Filling
from pbfx.reserve import padded
from pbfx.sited import (
    Sited,
    fit_form,
    in_torch_func,
    keep_out_of_fast_paths,
    pad,
    per_dendrite,
)
from pbfx.sites import Site
from pbfx.structure import Counts


class Dendrites(Sited):
    """The D accepted dendrites of a site, and in the dendrite phase its candidates.

    Args:
        site: where they grow, and on which channels.
        config: activation and mode of learning.
        weight: the soma's weight, for dtype and device.
    """

    lists_channels = True
    activation: str
    learning: Learning
    tuning: Tuning
    bias: nn.Parameter | None
    to_soma: nn.Parameter
    to_dendrite: nn.Parameter
    candidates: Candidates | None
    mask: Tensor | None
    alive: int | None
    # Whether the last neuron phase has begun, in which perforated dendrites train by
    # backpropagation.
    finishing: bool = False

    def __init__(self, site: Site, config: Config, weight: Tensor) -> None:
        super().__init__(site, weight.device)
        neurons = site.neurons
        like = weight.detach()
        slots = config.reserve
        # As attributes all of these would cost a restructure several times as much.
        vars(self).update(
            activation=config.activation,
            learning=config.learning,
            tuning=config.tuning,
            # How many slots are dendrites, and in `mask` ones for those: a number in the graph
            # would be a new graph with every dendrite. None without a reserve.
            alive=0 if slots else None,
        )
        own = self._parameters
        own["weight"] = nn.Parameter(like.new_zeros(slots, *site.shape))
        own["bias"] = nn.Parameter(like.new_zeros(slots, neurons)) if site.biased else None
        own["to_soma"] = nn.Parameter(like.new_zeros(slots, neurons))
        own["to_dendrite"] = nn.Parameter(like.new_zeros(slots, slots, neurons))
        self.register_buffer("mask", like.new_zeros(slots, 1) if slots else None, persistent=False)
        # Among the modules from the start: there Dynamo's guards look for them as they come and go.
        self._modules["candidates"] = None
        self.set_trainable()
        keep_out_of_fast_paths(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Dendrites:
        super()._apply(per_dendrite(fn, self.weight), recurse)
        return self

    @property
    def count(self) -> int:
        """D, the number of accepted dendrites per neuron."""
        return self.slots if self.alive is None else self.alive

    @property
    def slots(self) -> int:
        """How many rows the tensors have: D, and with a reserve at least that."""
        return self.weight.shape[0]

    @property
    def parameter_count(self) -> int:
        """How many numbers D dendrites are; of `to_dendrite` what is below the diagonal."""
        own: Any = self._parameters
        d, neurons = self.count, own["to_soma"].shape[1]
        weight, bias = own["weight"].shape[1:].numel(), 0 if own["bias"] is None else neurons
        return d * (weight + bias + neurons) + d * (d - 1) // 2 * neurons

    @property
    def counts(self) -> Counts:
        """D, C of the candidates if there are any, and the channels if there is a choice."""
        candidates = 0 if self.candidates is None else self.candidates.count
        return Counts(self.count, candidates, self.site.channels)

    def extra_repr(self) -> str:
        """Show D and the activation in the model's printout."""
        some = "" if self.site.channels is None else f", channels={list(self.site.channels)}"
        return (
            f"dendrites={self.count}, activation={self.activation!r}, learning={self.learning!r}"
            f"{some}"
        )

    @property
    def backpropagates(self) -> bool:
        """Whether the error goes on through the dendrites to what they read."""
        full = self.finishing or self.tuning == "full"
        return self.learning == "gradient" or (full and self.learning == "perforated")

    @property
    def tunes(self) -> bool:
        """Whether a neuron phase trains the dendrites' weights, and not only their links."""
        tuned = self.learning == "perforated" and self.tuning != "links"
        return tuned or self.backpropagates

    @property
    def holds_older(self) -> bool:
        """Whether of those weights only the newest dendrite's train, and there are others."""
        newest = self.tuning == "newest" and self.tunes and not self.backpropagates
        return newest and self.count > 1 and self.weight.requires_grad

    def tuned(self) -> list[nn.Parameter]:
        """Return what a dendrite is made of, its link to the neuron aside."""
        roles = self.weight, self.bias, self.to_dendrite
        return [role for role in roles if role is not None]

    def set_trainable(self) -> None:
        """Let those parameters require gradients that the neuron phase trains in this mode."""
        for role in self.tuned():
            role.requires_grad_(self.tunes)
        self.to_soma.requires_grad_(self.learning != "sham")

    def set_finishing(self, finishing: bool) -> None:
        """Begin or end the last neuron phase; what then learns no more forgets its gradient."""
        self.finishing = finishing
        self.set_trainable()
        for parameter in self.parameters(recurse=False):
            if not parameter.requires_grad:
                # A zero left behind would still move it under momentum or weight decay.
                parameter.grad = None

    def append(
        self,
        weight: Tensor,
        bias: Tensor | None,
        to_dendrite: Tensor,
        to_soma: Tensor | None = None,
        filling: Filling | None = None,
    ) -> None:
        """Accept one dendrite per neuron.

        Args:
            weight: (*soma.weight.shape). The first dendrite's memory is what is given here, so that
                it must be nobody else's; those of later ones are copied. So it is for the others.
            bias: (N,), or None where the site's dendrites have none.
            to_dendrite: (D, N), how strongly each older dendrite feeds the new one.
            to_soma: (N,), its link to the neuron; zero if None, as it always is for a sham.
            filling: writes the new tensors, with those of others; here if None.
        """
        old, memory = self.count, Filling() if filling is None else filling
        if self.learning == "sham":
            to_soma = None
        if self._has_room(old + 1):
            self.resize(old + 1)
            with torch.no_grad():
                self.weight[old] = weight
                if self.bias is not None and bias is not None:
                    self.bias[old] = bias
                self.to_dendrite[old, :old] = to_dendrite[:old]
                self.to_soma[old] = 0 if to_soma is None else to_soma
            return

        def stacked(rows: Tensor, row: Tensor | None) -> nn.Parameter:
            rows, shape = rows.detach(), (old + 1, *rows.shape[1:])
            if row is None:
                made = memory.zeros(rows, shape)
            elif old:
                made = rows.new_empty(shape)
                memory.into(made[old], row)
            else:
                made = row.detach().to(rows)[None]
            if old:
                memory.into(made[:old], rows[:old])
            return nn.Parameter(made)

        own, links = self._parameters, self.to_dendrite.detach()
        made = memory.zeros(links, (old + 1, old + 1, links.shape[2]))
        if old:
            memory.into(made[:old, :old], links[:old, :old])
            memory.into(made[old, :old], to_dendrite[:old])
        own["to_soma"] = stacked(self.to_soma, to_soma)
        own["to_dendrite"] = nn.Parameter(made)
        if self.bias is not None and bias is not None:
            own["bias"] = stacked(self.bias, bias)
        own["weight"] = stacked(self.weight, weight)
        if filling is None:
            memory.fill()
        self._resized(old + 1)

    def resize(self, count: int) -> None:
        """Keep the first `count` dendrites; new ones, if any, are all zeros.

        With a reserve that is large enough the parameters stay the objects that they are.
        """
        if self.alive is not None and self.mask is not None and self._has_room(count):
            with torch.no_grad():
                for row in (self.weight, self.bias, self.to_soma, self.to_dendrite):
                    if row is not None:
                        row[count:] = 0
                self.to_dendrite[:, count:] = 0
                self.mask[:count], self.mask[count:] = 1, 0
            self.alive = count
            return

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
        self._resized(count)

    def _has_room(self, count: int) -> bool:
        """Return whether there are slots for so many, reserved ones."""
        return self.alive is not None and count <= self.slots

    def _resized(self, count: int) -> None:
        """Take note that the tensors have been replaced by those of so many dendrites."""
        if self.mask is not None:
            self.alive, self.mask = count, self.mask.new_ones(count, 1)
        self.set_trainable()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.alive is None:
            return
        for name in self._rows():
            if self.counts == Counts():
                # A site that has grown nothing has the plain model's keys.
                del destination[prefix + name]
            else:
                destination[prefix + name] = destination[prefix + name][: self.alive]
        if self.counts != Counts():
            key = f"{prefix}to_dendrite"
            destination[key] = destination[key][:, : self.alive]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        if self.alive is not None:
            rows = (
                (name, getattr(self, name).detach(), (0, 1) if name == "to_dendrite" else (0,))
                for name in self._rows()
            )
            # Rows of zeros for a site without any keys; else torch says which are missing.
            if self.counts == Counts() or f"{prefix}weight" in state_dict:
                state_dict = padded(state_dict, prefix, rows)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def _rows(self) -> list[str]:
        """Return the names of the tensors with a row for each dendrite."""
        return [name for name, _ in self.named_parameters(recurse=False)]

    def forward(self, soma: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the neuron's output, and the dendrites' activations for the candidates.

        Args:
            soma: what the soma gave, (..., N) for linear, (B, N, *space) for conv.
            x: what the soma read.
        """
        whole, (soma, x) = soma, self.take(soma, x)
        if not self.slots:
            return whole, soma.new_empty((0, *soma.shape))
        # Only candidates read the activations, and only where gradients are wanted.
        keep = self.candidates is not None and torch.is_grad_enabled()
        x, evaluate = pad(x, self.site), functools.partial(pbfx_kernels.dendrites, keep=keep)
        weight, bias, to_dendrite = self.site.op_weight(self.weight), self.bias, self.to_dendrite
        if self.backpropagates:
            evaluate = functools.partial(pbfx_kernels.full_dendrites, keep=keep)
        elif self.weight.requires_grad and torch.is_grad_enabled() and not in_torch_func():
            # The weights learn from their neuron's error, and what they read does not. In the
            # dendrite phase nothing of this requires gradients.
            frozen = self.count - 1 if self.holds_older else 0
            evaluate = functools.partial(pbfx_kernels.full_dendrites, keep=keep, frozen=frozen)
            x = x.detach()
        elif in_torch_func():
            # Its transforms do not go through the op; the reference blocks the same errors if what
            # they must not reach is detached.
            evaluate = pbfx_kernels.reference.dendrites
            x, weight, to_dendrite = x.detach(), weight.detach(), to_dendrite.detach()
            bias = None if bias is None else bias.detach()
        out, activations = evaluate(
            soma,
            x,
            weight,
            bias,
            self.to_soma if self.mask is None else self.to_soma * self.mask,
            to_dendrite,
            self.activation,
            fit_form(self.site, soma, x),
        )
        if keep and self.mask is not None and self.activation == "sigmoid":
            # The others are zero where their preactivation is.
            rows = self.mask.view(-1, *(1,) * soma.dim()).to(activations.dtype)
            activations = activations.detach() * rows
        return self.put(whole, out), activations
