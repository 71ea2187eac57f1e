"""After a growth, search along a line through the network for the least training loss.

One site after another, in the order of the graph, and of each first

    T_new = s T      s of `LINKS`, T the full step that `initial_link=1` gives the new dendrites
    W     = s W      s of `SOMA`, W the soma's weights

The loss is that of rows which the network trains on, in eval, so without dropout. Every line holds
the network as it is (s = 0, s = 1) and the least is taken, so that the loss never rises.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.learning.problem import Split
from benchmarks.learning.trainer import Ready, evaluate, ready
from benchmarks.learning.trials import Trial
from pbfx.parts import parts_of
from pbfx.paths import join

# Of equals the first is taken: what changes nothing.
LINKS = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
SOMA = (1.0, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25)

# Enough to tell losses apart that differ by a percent.
_ROWS = 5_000


def line_search(
    model: nn.Module, trial: Trial, split: Split, rows: Tensor | None
) -> Generator[Ready, None, dict[str, float]]:
    """Move the network; yield whenever the device has something to do.

    Args:
        model: in a neuron phase, its newest dendrites just promoted with `initial_link=1`.
        trial: says along what to search.
        split: to train on.
        rows: indices of those that the network sees, None for all.

    Returns:
        The factors taken, by the path of each parameter.
    """
    # Spread out: neighbours may overlap, as windows of a text do.
    number = len(split) if rows is None else len(rows)
    apart = slice(None, None, max(1, number // _ROWS))
    chosen = apart if rows is None else rows[apart]
    seen = Split(split.inputs[chosen], split.targets[chosen])
    taken: dict[str, Tensor] = {}
    for path, part in parts_of(model).items():
        grown = part.grown()
        for site in part.perforation.sites:
            dendrites = grown.get(site.name)
            if trial.links and dendrites is not None and dendrites.learning != "sham":
                newest = dendrites.to_soma.detach()[dendrites.count - 1]
                name = f"{join(path, site.dendrites)}.to_soma"
                taken[name] = _least(model, seen, newest, LINKS)
            if trial.soma:
                name = join(path, site.home)
                soma = model.get_parameter(name).detach()
                taken[name] = _least(model, seen, soma, SOMA)
            yield ready(split.targets.device)
    return {name: float(factor) for name, factor in taken.items()}


@torch.no_grad()
def _least(model: nn.Module, seen: Split, moved: Tensor, factors: Sequence[float]) -> Tensor:
    """Multiply `moved`, memory of the model, by that factor at which the loss is least."""
    start, losses = moved.clone(), []
    for factor in factors:
        torch.mul(start, factor, out=moved)
        losses.append(evaluate(model, seen)[1])
    least = torch.stack(losses).nan_to_num(nan=torch.inf).argmin()
    factor = start.new_tensor(factors)[least]
    torch.mul(start, factor, out=moved)
    return factor
