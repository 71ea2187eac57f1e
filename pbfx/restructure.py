"""Change a model's topology: grow, enter and leave the dendrite phase. All or nothing.

Every verb here edits the perforated parts of a model in place. `restructuring` wraps them with the
promise that users rely on: if anything fails, the model, the optimizer and the scheduler are as
they were, down to the last tensor.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pbfx.absorbed import Absorbed
from pbfx.dendrites import Dendrites
from pbfx.errors import ConfigError, RestructureError, nearest
from pbfx.learning import SiteLearner, new_cohort
from pbfx.optimizers import Schedule, sync_optimizer
from pbfx.parts import candidate_parameters, managed_parameters, parts_of, soma_weight_of
from pbfx.passes.hold_eval import held_by_graph
from pbfx.paths import join
from pbfx.perforated import PerforatedModule
from pbfx.perforation import Perforation
from pbfx.phase import Phase
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
    with undoing(model, optimizer, schedule, values=values):
        before = dict(model.named_parameters())
        yield
        if optimizer is not None:
            after = dict(model.named_parameters())
            sync_optimizer(
                optimizer, before, after, managed_parameters(model), soma_weight_of(model)
            )


def start_dendrite_phase(model: nn.Module) -> tuple[Frozen, dict[str, SiteLearner]]:
    """Freeze the network and give every site a fresh pool of candidates, with a learner each."""
    frozen = Frozen(
        tuple(name for name, p in model.named_parameters() if p.requires_grad),
        tuple(name for name, m in model.named_modules() if m.training),
    )
    for part in parts_of(model).values():
        config, grown = part.perforation.config, part.structure().sites
        for site in part.perforation.sites:
            has = grown[site.name].dendrites if site.name in grown else 0
            part.new_candidates(site, config.phase(has).candidates)
        part.perforation.phase = Phase.DENDRITE
        part.rebuild()
    freeze(model)
    return frozen, learners_of(model)


def learners_of(model: nn.Module) -> dict[str, SiteLearner]:
    """Return a new learner, not yet attached, for every pool of candidates in `model`."""
    cohort = new_cohort()
    return {
        join(path, name): SiteLearner(dendrites.candidates, part.perforation.config, cohort)
        for path, part in parts_of(model).items()
        for name, dendrites in part.grown().items()
        if dendrites.candidates is not None
    }


def freeze(model: nn.Module) -> None:
    """Let only candidates require gradients, drop every gradient, hold the parts in eval."""
    learning = {id(p) for p in candidate_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learning)
        # A zero left behind would still move a parameter under momentum or weight decay.
        parameter.grad = None
    for part in parts_of(model).values():
        part.train(part.training)


def hold_outside(model: nn.Module) -> list[RemovableHandle]:
    """Hold what no graph holds in eval too, until the handles are removed.

    A module that keeps its own forward, or that no pass knows (attention, recurrent nets), reads
    its own flag, and the training loop switches modes at will: each is switched back as it is
    called.
    """
    held = {
        id(module)
        for part in parts_of(model).values()
        for module in held_by_graph(part, part.perforation.source)
    }

    # The parts change phase together.
    hold = _Hold(next(iter(parts_of(model).values())).perforation)
    return [
        module.register_forward_pre_hook(hold)
        for module in model.modules()
        # What a graph has absorbed is never called.
        if id(module) not in held and not isinstance(module, Absorbed)
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


def thaw(model: nn.Module, frozen: Frozen) -> None:
    """Undo `freeze`: what learnt before learns again; dendrites follow their mode of learning."""
    learning, training = set(frozen.learning), set(frozen.training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
        parameter.grad = None
    for name, module in model.named_modules():
        module.training = name in training
        if isinstance(module, Dendrites):
            # It may be younger than `frozen`; its owner is not.
            module.train(name.rpartition(".")[0] in training)
            module.set_trainable()


def promote(model: nn.Module, learners: dict[str, SiteLearner]) -> None:
    """Turn the best candidate of each neuron into a dendrite; drop the rest of the pools.

    A site that no error has reached while others learnt grows nothing: no forward calls its op, as
    where one reads a layer's weight around the layer.
    """
    heard = {name for name, learner in learners.items() if learner.batches}
    for path, part in parts_of(model).items():
        grown = part.grown()
        for site in part.perforation.sites:
            full = join(path, site.name)
            if full not in learners:
                continue
            dendrites = grown[site.name]
            dendrites.candidates = None
            if full in heard or not heard:
                learner = learners[full]
                share = part.perforation.config.initial_link
                dendrites.append(*learner.chosen(), learner.first_link(share) if share else None)
                continue
            logger.info("no dendrite at %s: no error has reached it in this phase", full)
            if not dendrites.count:
                part.drop_dendrites(site)
        part.perforation.phase = Phase.NEURON
        part.rebuild()


def set_finishing(model: nn.Module, finishing: bool) -> None:
    """Begin or end the last neuron phase, in which dendrites train with everything else."""
    for part in parts_of(model).values():
        for dendrites in part.grown().values():
            dendrites.set_finishing(finishing)
        part.rebuild()


def grow(model: nn.Module, n: int = 1, sites: Sequence[str] | None = None) -> nn.Module:
    """Add accepted dendrites by hand.

    They read random directions and start with zero soma weight, so the output does not change.

    Args:
        model: a model with perforated parts; edited in place.
        n: how many dendrites per neuron to add, at least 1.
        sites: paths of the sites to grow, as `pbfx.explain` shows them; None for all.

    Returns:
        `model` itself. Make the optimizer after growing: its parameters are new objects.

    Raises:
        ConfigError: if `n` is not a positive whole number or a site is unknown.
        RestructureError: if the model has no perforated parts, is in the dendrite phase, or has a
            tracker, which would not know.
    """
    parts = parts_of(model)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError(f"pbfx.grow: n must be a whole number of at least 1, got {n!r}")
    known = {join(path, s.name) for path, part in parts.items() for s in part.perforation.sites}
    wanted = known if sites is None else set([sites] if isinstance(sites, str) else sites)
    for name in sorted(wanted - known):
        raise ConfigError(f"pbfx.grow: there is no site {name!r}; {nearest(name, known)}")
    for path, part in parts.items():
        where = f" in {path!r}" if path else ""
        if part.perforation.phase is Phase.DENDRITE:
            raise RestructureError(
                f"pbfx.grow: the model{where} is in its dendrite phase; let the tracker finish it "
                "first"
            )
        if part.perforation.tracker is not None:
            raise RestructureError(
                f"pbfx.grow: a tracker manages the model{where}, and its optimizer would miss the "
                "new parameters; grow before making the optimizer and the tracker"
            )
    # What is new is written into new tensors.
    with restructuring(model, values=False):
        for path, part in parts.items():
            grow_part(
                part, n, {s.name for s in part.perforation.sites if join(path, s.name) in wanted}
            )
    return model


def grow_part(part: PerforatedModule, n: int, names: set[str]) -> None:
    """Append `n` random dendrites to each of the named sites of one part, and rebuild its graph."""
    for site in part.perforation.sites:
        if site.name in names:
            for _ in range(n):
                weight, bias = part.draw(site, 1)
                dendrites = part.ensure_dendrites(site)
                links = weight.new_zeros(dendrites.count, site.neurons)
                dendrites.append(weight[0], None if bias is None else bias[0], links)
    part.rebuild()
