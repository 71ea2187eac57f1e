"""What candidates may be connected to: all inputs of their neuron, a block of them, or a few sums.

With `N` neurons that read `K` inputs each (of a convolution, a patch), a pool of `C` candidates:

    dense       V                   stored as N K weights a dendrite
    grouped     V ⊙ M               M lets the d-th dendrite of neuron n see block (n + d) mod g
                                    of the inputs only; N K / g weights
    low rank    V = A B             A (C N, r), B (r, K); r (N + K) weights
                dA = dV Bᵀ          dB = Aᵀ dV

Kernels and accepted dendrites go on as they are: V is dense memory with zeros in it, or a product
that has been written out. So this says what such a dendrite learns, and what it would be to store,
but not how fast it could be.

B is one for the whole pool, and rows of the last epoch only are remembered, so whichever candidate
each neuron chooses, the dendrite that comes of it has rank r.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pbfx.candidates import Candidates
from pbfx.learning import SiteLearner
from pbfx.perforated import perforated_parts
from pbfx.sites import Site


class Connections:
    """All inputs: the candidates are left alone."""

    def __init__(self) -> None:
        self._renewals: list[Callable[[], None]] = []

    def begin(self, learners: Mapping[str, SiteLearner]) -> None:
        """Restrict candidates that have just been drawn.

        Args:
            learners: of the dendrite phase that begins, by site; none in a neuron phase.
        """
        self._renewals = []

    def renew(self) -> None:
        """Restrict candidates again after a backward pass, in which they have learnt.

        It only launches, so a CUDA graph of a training step can hold it.
        """
        for renewal in self._renewals:
            renewal()

    def close(self) -> None:
        """Prepare for the end of an epoch, at which the best candidates are remembered."""

    def stored(self, site: Site, dendrite: int) -> int:
        """Return the weights of a site's dendrite, biases and links aside.

        Args:
            site: where it is.
            dendrite: how many each neuron there had before it.
        """
        return math.prod(site.shape)

    def saved(self, model: nn.Module) -> int:
        """Return how many weights of accepted dendrites would not have to be stored."""
        return sum(
            math.prod(dendrites.site.shape) - self.stored(dendrites.site, number)
            for part in perforated_parts(model).values()
            for dendrites in part.grown().values()
            for number in range(dendrites.count)
        )


class Grouped(Connections):
    """A block of the inputs, another one for each dendrite of a neuron.

    Blocks are what lies together: rows of channels, or taps where there are few channels. g
    dendrites of a neuron cover its inputs; so does the first dendrite of g neighbours.

    Args:
        groups: the number of blocks; of fewer inputs each is one.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def begin(self, learners: Mapping[str, SiteLearner]) -> None:
        """Mask the candidates, and scale them as if drawn for so few inputs."""
        super().begin(learners)
        for learner in learners.values():
            pool = learner.candidates
            mask = self.mask(pool.site, pool.dendrites).to(pool.weight)
            rows = mask.flatten(1)
            scale = (rows.shape[1] / rows.sum(1)).sqrt()
            with torch.no_grad():
                pool.weight.mul_(mask * pool.site.along_weight(scale))
            pool.best_weight.copy_(pool.weight.detach())
            self._renewals.append(functools.partial(_multiply, pool.weight, mask))

    def mask(self, site: Site, dendrite: int) -> Tensor:
        """Return what the neurons' next dendrites see, bool in the shape of the soma's weight."""
        seen, block = self._blocks(site, dendrite)
        return (seen[:, None] == block).view(site.shape)

    def stored(self, site: Site, dendrite: int) -> int:
        """Return how many weights the mask leaves."""
        seen, block = self._blocks(site, dendrite)
        return int(torch.bincount(block)[seen].sum())

    def _blocks(self, site: Site, dendrite: int) -> tuple[Tensor, Tensor]:
        """Return which block each neuron sees `(N,)`, and in which each input lies `(K,)`."""
        neurons, inputs = _matrix(site)
        groups = min(self.groups, inputs)
        seen = (torch.arange(neurons) + dendrite) % groups
        return seen, torch.arange(inputs) * groups // inputs


class LowRank(Connections):
    """A few weighted sums of the inputs, which all candidates of a site share.

    Sites where two factors would be more to store than their product stay dense.

    Args:
        rank: the number of sums.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self._pools: list[Candidates] = []

    def begin(self, learners: Mapping[str, SiteLearner]) -> None:
        """Draw factors in place of the weights, and let those learn."""
        super().begin(learners)
        self._pools = []
        for learner in learners.values():
            pool = learner.candidates
            if self.factors(pool.site):
                self._renewals.append(_Factored(learner, self.rank))
                self._pools.append(pool)

    @torch.no_grad()
    def close(self) -> None:
        """Forget the rows of earlier epochs: they are products of another B."""
        for pool in self._pools:
            for figures in (pool.best_score, pool.best_moments, pool.best_batches):
                figures.zero_()
            for name in ("weight", "bias", "to_dendrite"):
                live = getattr(pool, name)
                if live is not None:
                    getattr(pool, f"best_{name}").copy_(live)

    def factors(self, site: Site) -> bool:
        """Return whether a site's weights are factored."""
        return self.stored(site, 0) < math.prod(site.shape)

    def stored(self, site: Site, dendrite: int) -> int:
        """Return the elements of A's rows of one dendrite, and of B; or of V if they are fewer."""
        neurons, inputs = _matrix(site)
        return min(self.rank * (neurons + inputs), neurons * inputs)


class _Factored:
    """A and B of a pool, in one parameter that learns in place of V."""

    def __init__(self, learner: SiteLearner, rank: int) -> None:
        self._pool = pool = learner.candidates
        if pool.spread is not None:
            raise NotImplementedError("candidates after a norm are scaled row by row, factors not")
        drawn = pool.weight.detach().reshape(-1, _matrix(pool.site)[1])
        # What was drawn for V has numbers enough; scaled so that V = A B varies as it did.
        left = drawn[:, :rank] * (3 * drawn.shape[1] / rank) ** 0.5
        right = drawn[-rank:]
        self._shapes = left.shape, right.shape
        self.factors = nn.Parameter(torch.cat([left.flatten(), right.flatten()]))
        learner.learn_as(self.factors)
        pool.weight.register_post_accumulate_grad_hook(self._chain)
        self()
        pool.best_weight.copy_(pool.weight.detach())

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return A `(C N, r)` and B `(r, K)`, views of what learns."""
        parts = self.factors.detach().split([shape.numel() for shape in self._shapes])
        left, right = (part.view(s) for part, s in zip(parts, self._shapes, strict=True))
        return left, right

    @torch.no_grad()
    def __call__(self) -> None:
        left, right = self.parts()
        self._pool.weight.copy_((left @ right).view_as(self._pool.weight))

    @torch.no_grad()
    def _chain(self, weight: Tensor) -> None:
        """Hand the gradient of V on to A and B, within the backward pass."""
        assert weight.grad is not None
        left, right = self.parts()
        gradient = weight.grad.reshape(len(left), -1)
        of_left, of_right = gradient @ right.mT, left.mT @ gradient
        self.factors.grad = torch.cat([of_left.flatten(), of_right.flatten()])
        weight.grad = None


@torch.no_grad()
def _multiply(weight: Tensor, mask: Tensor) -> None:
    weight.mul_(mask)


def _matrix(site: Site) -> tuple[int, int]:
    """Return the neurons of a site and the inputs of each.

    Its weight must have a row for each neuron, as those of the studies' nets do.
    """
    if site.input_first or site.geometry.transposed:
        raise NotImplementedError(f"the weight of {site.name} has no row for each neuron")
    return site.neurons, math.prod(site.shape[1:])
