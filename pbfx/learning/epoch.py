"""The end of an epoch of the dendrite phase: rank and remember, at all sites together.

Neurons are independent, so those of all sites lie side by side in one tensor: an operation is
launched once and not for every site, and the device is waited for once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pbfx.candidates import Candidates
from pbfx.copies import copy_into
from pbfx.learning.moments import statistics
from pbfx_kernels import Moment


class Promise(NamedTuple):
    """Sums over a site's neurons.

    Attributes:
        gain: of half the squared correlation of the chosen candidates.
        slope: of the square of their predicted ∂L/∂T.
        spread: of σ_a on measuring batches, over all candidates.
    """

    gain: float
    slope: float
    spread: float


def numbers(tensors: Sequence[Tensor]) -> list[Any]:
    """Return each of small tensors of one shape as plain numbers. Waits once for each device."""
    found: dict[int, Any] = {}
    for kind in {(tensor.device, tensor.dtype) for tensor in tensors}:
        here = [i for i, tensor in enumerate(tensors) if (tensor.device, tensor.dtype) == kind]
        found |= zip(here, torch.stack([tensors[i].detach() for i in here]).tolist(), strict=True)
    return [found[index] for index in range(len(tensors))]


@torch.no_grad()
def measure(pools: Sequence[Candidates]) -> list[float | None]:
    """Close an epoch: remember the best candidates, and start a new measurement.

    Returns:
        For each pool the mean over neurons of the best candidate's |correlation| with the error on
        the batches of this epoch that only measured, or None if there was none.
    """
    scores: list[float | None] = [None] * len(pools)
    batches = numbers([pool.heldout_batches for pool in pools])
    for indices in _alike(pools, [index for index, number in enumerate(batches) if number]):
        together = [pools[index] for index in indices]
        widths = [pool.best_score.shape[1] for pool in together]
        heldout = _joined(together, "heldout")
        score = statistics(heldout).correlation.abs()
        known = _joined(together, "best_score")
        better = score > known
        number = torch.cat([p.heldout_batches.expand_as(p.best_batches) for p in together], -1)
        for name, now, before in (
            ("best_score", score, known),
            ("best_moments", heldout, _joined(together, "best_moments")),
            ("best_batches", number, _joined(together, "best_batches")),
        ):
            best = torch.where(better, now, before).split(widths, -1)
            copy_into([pool._buffers[name] for pool in together], best)  # pyright: ignore[reportArgumentType]
        for pool, rows in zip(together, better.split(widths, -1), strict=True):
            _remember(pool, rows)
        _foreach_zero_([t for pool in together for t in (pool.heldout, pool.heldout_batches)])
        (sums,) = _sums(score.amax(0, keepdim=True), widths)
        for index, total, width in zip(indices, sums, widths, strict=True):
            scores[index] = total / width
    return scores


def _remember(pool: Candidates, better: Tensor) -> None:
    """Let candidates that have scored better (C, N) take the places of the best so far."""
    for name, rows in (
        ("weight", pool.site.along_weight(better)),
        ("bias", better),
        ("to_dendrite", better[:, None, :]),
    ):
        live, best = getattr(pool, name), getattr(pool, f"best_{name}")
        if live is not None and live.numel():
            torch.where(rows, live.detach(), best, out=best)


class Chosen(NamedTuple):
    """The best candidate of each neuron of a site, in memory of its own.

    Attributes:
        weight: (*W).
        bias: (N,), or None where candidates have none.
        to_dendrite: (D, N).
    """

    weight: Tensor
    bias: Tensor | None
    to_dendrite: Tensor


@torch.no_grad()
def chosen(pools: Sequence[Candidates]) -> list[Chosen]:
    """Return the best candidates of each pool.

    Where no batch ever measured, or every candidate of a neuron is constant, the first stands in.
    """
    found: dict[int, Chosen] = {}
    for indices in _alike(pools, range(len(pools))):
        together = [pools[index] for index in indices]
        widths = [pool.best_score.shape[1] for pool in together]
        winners = _joined(together, "best_score").argmax(0, keepdim=True).split(widths, -1)
        for index, pool, winner in zip(indices, together, winners, strict=True):
            best: Any = pool._buffers
            rows = pool.site.along_weight(winner).expand(1, *pool.site.shape)
            weight, bias = best["best_weight"].gather(0, rows)[0], best["best_bias"]
            if bias is not None:
                bias = bias.gather(0, winner)[0]
            links = best["best_to_dendrite"]
            # Of no links nothing has to be gathered.
            if links.shape[1]:
                links = links.gather(0, winner[:, None].expand(1, *links.shape[1:]))
            found[index] = Chosen(weight, bias, links[0])
    return [found[index] for index in range(len(pools))]


@torch.no_grad()
def picked(pools: Sequence[Candidates]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield which of `pools` go together, and of their chosen candidates side by side the moments
    (6, 1, ΣN), and of how many batches these are (ΣN,)."""
    for indices in _alike(pools, range(len(pools))):
        together = [pools[index] for index in indices]
        winner = _joined(together, "best_score").argmax(0, keepdim=True)
        moments = _joined(together, "best_moments")
        found = moments.gather(1, winner.expand(len(Moment), 1, -1))
        batches = _joined(together, "best_batches").gather(0, winner)[0].clamp_min(1)
        yield indices, found, batches


@torch.no_grad()
def promises(pools: Sequence[Candidates]) -> list[Promise]:
    """Return what each pool promises. Waits for the device."""
    found: dict[int, Promise] = {}
    for indices, moments, batches in picked(pools):
        together = [pools[index] for index in indices]
        chosen = statistics(moments)
        slope = chosen.total / batches
        spread = statistics(_joined(together, "best_moments")).activation_variance.sqrt()
        widths = [pool.best_score.shape[1] for pool in together]
        squares, slopes, *spreads = _sums(
            torch.cat([chosen.correlation**2, slope**2, spread]), widths
        )
        for place, index in enumerate(indices):
            wide = sum(spread[place] for spread in spreads)
            found[index] = Promise(squares[place] / 2, slopes[place], wide)
    return [found[index] for index in range(len(pools))]


def _sums(rows: Tensor, widths: Sequence[int]) -> list[list[float]]:
    """Return the sums over each site's neurons, of each row. Waits for the device."""
    starts = np.cumsum([0, *widths[:-1]])
    # Numpy's conversion, because torch's would start its threads for so few numbers.
    return np.add.reduceat(rows.cpu().numpy().astype(np.float64), starts, axis=1).tolist()


def _alike(pools: Sequence[Candidates], indices: Sequence[int]) -> list[list[int]]:
    """Group pools whose buffers can lie side by side."""
    groups: dict[Hashable, list[int]] = {}
    for index in indices:
        score = pools[index].best_score
        groups.setdefault((score.shape[0], score.device, score.dtype), []).append(index)
    return list(groups.values())


# It has no public name.
_foreach_zero_: Any = torch._foreach_zero_  # pyright: ignore[reportPrivateImportUsage]


def _joined(pools: Sequence[Candidates], name: str) -> Tensor:
    return torch.cat([pool._buffers[name] for pool in pools], -1)  # pyright: ignore[reportArgumentType]
