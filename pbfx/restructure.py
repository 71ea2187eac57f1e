"""Change a model's topology: enter and leave the dendrite phase, promote. All or nothing.

Every verb here edits the perforated parts of a model in place. `restructuring` wraps them with the
promise that users rely on: if anything fails, the model, the optimizer and the scheduler are as
they were, down to the last tensor.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pbfx.absorbed import Absorbed
from pbfx.config import Config
from pbfx.copies import Filling
from pbfx.dendrites import Dendrites
from pbfx.learning import (
    Chosen,
    SiteLearner,
    chosen,
    new_cohort,
    prospect_of,
    reached,
    select,
)
from pbfx.optimizers import Schedule, sync_optimizer
from pbfx.parts import (
    Walk,
    Walked,
    candidate_parameters,
    managed_parameters,
    parts_of,
    soma_weight_of,
    walk,
)
from pbfx.passes.hold_eval import has_no_mode, held_by_graph
from pbfx.paths import join
from pbfx.perforated import PerforatedModule
from pbfx.perforation import Perforation
from pbfx.phase import Phase
from pbfx.sites import Site, rows_of
from pbfx.undo import undoing

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What freezing changed, by name: which parameters learnt, which modules trained."""

    learning: tuple[str, ...]
    training: tuple[str, ...]


@contextmanager
def restructuring(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    *,
    values: bool = True,
) -> Iterator[None]:
    """Apply the restructuring in the body wholly or not at all, and bring `optimizer` up to date.

    Args:
        model: and what follows: see `undoing`.
        optimizer: likewise.
        schedule: likewise.
        values: likewise.

    Raises:
        RestructureError: from whatever failed; everything is then as it was before.
    """
    found = walk(model)
    with undoing(found, optimizer, schedule, values=values):
        before = found.parameters()
        yield
        if optimizer is not None:
            synchronise(optimizer, before, walk(model))


def synchronise(
    optimizer: Optimizer, before: dict[str, nn.Parameter], found: Walk
) -> dict[str, nn.Parameter]:
    """Bring `optimizer` up to date with the parameters that a walk finds now, and return them.

    Args:
        optimizer: edited in place.
        before: the parameters that it was last in line with, by name.
        found: after all changes.
    """
    after = found.parameters()
    sync_optimizer(optimizer, before, after, managed_parameters(found), soma_weight_of(found))
    return after


def take_over(
    model: nn.Module, optimizer: Optimizer, schedule: Schedule, network: frozenset[str]
) -> None:
    """Bring a new optimizer in line with `model`.

    Args:
        model: as it is now, in either phase.
        optimizer: holds some of its parameters; edited in place, wholly or not at all.
        schedule: of that optimizer.
        network: names of parameters that it must hold as well. A dendrite phase has frozen them,
            so an optimizer that was made of what requires gradients would never step them again.

    Raises:
        RestructureError: from whatever failed.
    """
    found = walk(model)
    now = found.parameters()
    of_dendrites = soma_weight_of(found)
    with undoing(found, optimizer, schedule):
        sync_optimizer(
            optimizer,
            now,
            now,
            [*managed_parameters(found), *network],
            lambda name: now[name] if name in network else of_dendrites(name),
        )


def start_dendrite_phase(model: Walked) -> tuple[Frozen, dict[str, SiteLearner]]:
    """Freeze the network and give every site a fresh pool of candidates, with a learner each."""
    found = walk(model)
    frozen = Frozen(
        tuple(name for name, p in found.parameters().items() if p.requires_grad),
        tuple(name for name, m in found.modules.items() if m.training),
    )
    for part in parts_of(found).values():
        config, grown = part.perforation.config, part.structure().sites
        has = {name: counts.dendrites for name, counts in grown.items()}
        sites = part.perforation.sites
        part.new_candidates([(s, config.phase(has.get(s.name, 0)).candidates) for s in sites])
        part.perforation.phase = Phase.DENDRITE
        part.rebuild()
    freeze(found.model)
    return frozen, learners_of(found)


def learners_of(model: Walked) -> dict[str, SiteLearner]:
    """Return a new learner, not yet attached, for every pool of candidates in `model`."""
    cohort, filling = new_cohort(), Filling()
    learners = {
        join(path, name): SiteLearner(
            dendrites.candidates, part.perforation.config, cohort, filling
        )
        for path, part in parts_of(model).items()
        for name, dendrites in part.grown().items()
        if dendrites.candidates is not None
    }
    filling.fill()
    return learners


def freeze(model: Walked) -> None:
    """Let only candidates require gradients, drop every gradient, hold the parts in eval."""
    found = walk(model)
    learning = {id(p) for p in candidate_parameters(found).values()}
    held = (p for module in found.modules.values() for p in module._parameters.values())
    for parameter in held:
        if parameter is None:
            continue
        if parameter.requires_grad != (id(parameter) in learning):
            parameter.requires_grad_(not parameter.requires_grad)
        # A zero left behind would still move a parameter under momentum or weight decay.
        parameter.grad = None
    for part in parts_of(found).values():
        part.train(part.training)


def hold_outside(model: Walked) -> list[RemovableHandle]:
    """Hold what no graph holds in eval too, until the handles are removed.

    A module that keeps its own forward, or that no pass knows (attention, recurrent nets), reads
    its own flag, and the training loop switches modes at will: each is switched back as it is
    called.
    """
    found = walk(model)
    parts = parts_of(found).values()
    held = {id(module) for part in parts for module in held_by_graph(part, part.perforation.source)}
    # The parts change phase together.
    hold = _Hold(next(iter(parts)).perforation)
    return [
        module.register_forward_pre_hook(hold)
        for module in found.modules.values()
        # What a graph has absorbed is never called.
        if id(module) not in held and not (isinstance(module, Absorbed) or has_no_mode(module))
    ]


@dataclasses.dataclass(frozen=True)
class _Hold:
    """Switch a module to eval as it is called, for as long as the dendrite phase lasts.

    A copy of the model takes this along, and no tracker that would remove it; it then follows the
    phase of the copy.
    """

    perforation: Perforation

    def __call__(self, module: nn.Module, _: Any) -> None:
        if self.perforation.phase is Phase.DENDRITE:
            module.training = False


def thaw(model: Walked, frozen: Frozen) -> None:
    """Undo `freeze`: what learnt before learns again; dendrites follow their mode of learning."""
    found, learning, training = walk(model), set(frozen.learning), set(frozen.training)
    for name, parameter in found.parameters().items():
        if parameter.requires_grad != (name in learning):
            parameter.requires_grad_(name in learning)
        parameter.grad = None
    for name, module in found.modules.items():
        if module.training != (name in training):
            module.training = name in training
        if isinstance(module, Dendrites):
            # It may be younger than `frozen`; its owner is not.
            module.train(name.rpartition(".")[0] in training)
            module.set_trainable()


def promote(model: Walked, learners: dict[str, SiteLearner]) -> None:
    """Turn the best candidates into dendrites, one per neuron; drop the rest of the pools.

    A site that no error has reached while others learnt grows nothing: no forward calls its op, as
    where one reads a layer's weight around the layer. With `sites="auto"` only those neurons grow
    whose candidates are predicted to pay.
    """
    heard, parts = _heard(learners), parts_of(model)
    growing, reasons = _growing(parts, heard)
    for reason in reasons:
        logger.info("%s", reason)
    filling = Filling()
    names = [name for name, channels in growing.items() if channels]
    best = dict(zip(names, chosen([learners[name].candidates for name in names]), strict=True))
    for path, part in parts.items():
        grown = part.grown()
        for site in part.perforation.sites:
            full = join(path, site.name)
            if full not in learners:
                continue
            grown[site.name].candidates = None
            if full in best:
                _accept(part, site, growing[full], learners[full], best[full], filling)
                continue
            if full not in heard:
                logger.info("no dendrite at %s: no error has reached it in this phase", full)
            if not grown[site.name].count:
                part.drop_dendrites(site)
        part.perforation.phase = Phase.NEURON
        part.rebuild()
    filling.fill()


def why_nothing_grows(model: Walked, learners: dict[str, SiteLearner]) -> str | None:
    """Return why `promote` would grow no dendrite at all, or None if it would grow one."""
    growing, reasons = _growing(walk(model).parts, _heard(learners))
    if any(growing.values()):
        return None
    for reason in reasons:
        logger.info("%s", reason)
    where = "the only site" if len(growing) == 1 else f"any of {len(growing)} sites"
    return f"no dendrite is predicted to pay at {where}"


def _heard(learners: dict[str, SiteLearner]) -> dict[str, SiteLearner]:
    """Return the learners that an error has reached; all, if none has."""
    return reached(learners) or learners


def _growing(
    parts: dict[str, PerforatedModule], learners: dict[str, SiteLearner]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return for each site which of its pool's neurons get a dendrite, and reasons for people."""
    # Parts that were transformed together compete for the same budget.
    groups: list[tuple[Config, dict[str, SiteLearner]]] = []
    for path, part in parts.items():
        config = part.perforation.config
        known = [together for other, together in groups if other == config]
        if not known:
            groups.append((config, {}))
        together = known[0] if known else groups[-1][1]
        names = (join(path, site.name) for site in part.perforation.sites)
        together.update({name: learners[name] for name in names if name in learners})
    growing: dict[str, tuple[int, ...]] = {}
    reasons: list[str] = []
    for config, together in groups:
        if config.sites == "all":
            growing |= {n: tuple(range(x.candidates.site.neurons)) for n, x in together.items()}
            continue
        prospects = [prospect_of(name, learner) for name, learner in together.items()]
        for choice in select(prospects, config.top_k, config.growth_parameters):
            growing[choice.site] = choice.channels
            reasons.append(choice.reason)
    return growing, reasons


def _accept(
    part: PerforatedModule,
    site: Site,
    channels: tuple[int, ...],
    learner: SiteLearner,
    best: Chosen,
    filling: Filling,
) -> None:
    """Append the best candidate of each of these neurons of the pool."""
    pool, (weight, bias, links) = learner.candidates.site, best
    share = part.perforation.config.initial_link
    to_soma = learner.first_link(share) if share else None
    dendrites = part.ensure_dendrites(site)
    if len(channels) < pool.neurons:
        # The first dendrites of a site settle on which neurons it has them.
        assert not dendrites.count, "a site that has dendrites grows on all of its channels"
        part.drop_dendrites(site)
        dendrites = part.ensure_dendrites(site, channels)
        kept = torch.tensor(channels, device=weight.device)
        weight, links = rows_of(site, weight, dendrites.site), links[:, kept]
        bias = None if bias is None else bias[kept]
        to_soma = None if to_soma is None else to_soma[kept]
    dendrites.append(weight, bias, links, to_soma, filling)


def set_finishing(model: Walked, finishing: bool) -> None:
    """Begin or end the last neuron phase, in which dendrites train with everything else."""
    for part in parts_of(model).values():
        for dendrites in part.grown().values():
            dendrites.set_finishing(finishing)
        part.rebuild()
