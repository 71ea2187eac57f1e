"""Change a model's topology: grow, enter and leave the dendrite phase, prune. All or nothing.

Every verb here edits the perforated parts of a model in place. `restructuring` wraps them with the
promise that users rely on: if anything fails, the model, the optimizer and the scheduler are as
they were, down to the last tensor.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pbfx.dendrites import Candidates, Dendrites
from pbfx.errors import ConfigError, RestructureError, nearest
from pbfx.learning import SiteLearner
from pbfx.optimizers import Schedule, sync_optimizer
from pbfx.perforated import PerforatedModule, perforated_parts
from pbfx.phase import Phase
from pbfx.structure import Counts, Structure

logger = logging.getLogger(__name__)


def parts_of(model: nn.Module) -> dict[str, PerforatedModule]:
    """Return the perforated parts of `model` by path.

    Raises:
        RestructureError: if there are none.
    """
    parts = perforated_parts(model)
    if not parts:
        raise RestructureError(
            f"{type(model).__name__} has no perforated parts; pass it through pbfx.transform first"
        )
    return parts


def join(prefix: str, name: str) -> str:
    """Return the path of `name` inside the module at `prefix`."""
    return f"{prefix}.{name}" if prefix else name


def candidate_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of all candidates in `model` by name."""
    return {
        join(path, name): parameter
        for path, module in model.named_modules()
        if isinstance(module, Candidates)
        for name, parameter in module.named_parameters()
    }


def parameter_count(model: nn.Module) -> int:
    """Return how many parameters the network of `model` has, candidates not counted.

    Of `to_dendrite` (D, D, N) the strictly lower triangle counts; the rest is never read.
    """
    pools = {id(p) for p in candidate_parameters(model).values()}
    total = sum(p.numel() for p in model.parameters() if id(p) not in pools)
    for module in model.modules():
        if isinstance(module, Dendrites):
            count, neurons = module.to_soma.shape
            total -= count * (count + 1) // 2 * neurons
    return total


def network_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without candidates: what the network computes with."""
    pools = tuple(f"{path}." for path, m in model.named_modules() if isinstance(m, Candidates))
    return {name: t for name, t in model.state_dict().items() if not name.startswith(pools)}


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A network as it was: its score, how many dendrites each part had, and a copy of its
    tensors."""

    score: float
    structures: dict[str, Structure]
    tensors: dict[str, Tensor]

    @classmethod
    def take(cls, model: nn.Module, score: float) -> Snapshot:
        """Copy the network of `model`."""
        return cls(
            score,
            {path: part.structure().without_candidates() for path, part in parts_of(model).items()},
            {name: tensor.detach().clone() for name, tensor in network_state(model).items()},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshot as plain data and tensors."""
        structures = {
            path: {name: counts.dendrites for name, counts in structure.sites.items()}
            for path, structure in self.structures.items()
        }
        return {"score": self.score, "structures": structures, "tensors": self.tensors}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Snapshot:
        """Return the snapshot that `state_dict` described."""
        structures = {
            path: Structure({name: Counts(count) for name, count in sites.items()})
            for path, sites in state["structures"].items()
        }
        return cls(state["score"], structures, dict(state["tensors"]))

    def restore(self, model: nn.Module) -> None:
        """Prune or grow `model` to this structure and copy the tensors back."""
        for path, part in parts_of(model).items():
            if part.structure() != self.structures[path]:
                part.adopt(self.structures[path])
        model.load_state_dict(self.tensors)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What freezing changed, by name, to be given back: which parameters learnt, which modules
    trained."""

    learning: tuple[str, ...]
    training: tuple[str, ...]


def start_dendrite_phase(model: nn.Module) -> tuple[Frozen, dict[str, SiteLearner]]:
    """Freeze the network and give every site a fresh pool of candidates, with a learner each."""
    frozen = Frozen(
        tuple(name for name, p in model.named_parameters() if p.requires_grad),
        tuple(name for name, m in model.named_modules() if m.training),
    )
    for part in parts_of(model).values():
        for site in part.perforation.sites:
            part.new_candidates(site, part.perforation.config.candidates)
        part.perforation.phase = Phase.DENDRITE
        part.rebuild()
    freeze(model)
    learners = learners_of(model)
    return frozen, learners


def learners_of(model: nn.Module) -> dict[str, SiteLearner]:
    """Return a new learner, not yet attached, for every pool of candidates in `model`."""
    return {
        join(path, name): SiteLearner(dendrites.candidates, part.perforation.config)
        for path, part in parts_of(model).items()
        for name, dendrites in part.dendrites().items()
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
    """Hold what lies outside the perforated parts in eval too, until the handles are removed.

    No graph of ours runs there, and the training loop switches modes at will, so each module is
    switched back as it is called.
    """
    inside = {id(module) for part in parts_of(model).values() for module in part.modules()}

    def hold(module: nn.Module, _: Any) -> None:
        module.training = False

    return [
        module.register_forward_pre_hook(hold)
        for module in model.modules()
        if id(module) not in inside
    ]


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
    """Turn the best candidate of each neuron into a dendrite; drop the rest of the pools."""
    for path, part in parts_of(model).items():
        for name, dendrites in part.dendrites().items():
            learner = learners.get(join(path, name))
            if learner is not None:
                dendrites.candidates = None
                dendrites.append(*learner.chosen())
        part.perforation.phase = Phase.NEURON
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
                f"pbfx.grow: the model{where} is in its dendrite phase; let the tracker finish "
                f"it first"
            )
        if part.perforation.tracker is not None:
            raise RestructureError(
                f"pbfx.grow: a tracker manages the model{where}, and its optimizer would miss "
                f"the new "
                "parameters; grow before making the optimizer and the tracker"
            )
    with restructuring(model):
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
                links = weight.new_zeros(dendrites.count, weight.shape[1])
                dendrites.append(weight[0], None if bias is None else bias[0], links)
    part.rebuild()


@contextmanager
def restructuring(
    model: nn.Module, optimizer: Optimizer | None = None, schedule: Schedule | None = None
) -> Iterator[None]:
    """Apply the restructuring in the body wholly or not at all, and bring `optimizer` up to date.

    Raises:
        RestructureError: from whatever failed; everything is then as it was before.
    """
    with undoing(model, optimizer, schedule):
        before = dict(model.named_parameters())
        yield
        if optimizer is not None:
            after = dict(model.named_parameters())
            sync_optimizer(
                optimizer, before, after, managed_parameters(model), soma_weight_of(model)
            )


@contextmanager
def undoing(
    model: nn.Module, optimizer: Optimizer | None = None, schedule: Schedule | None = None
) -> Iterator[None]:
    """Run the body; if it fails, put model, optimizer and schedule back as they were.

    Raises:
        RestructureError: from whatever failed.
    """
    undo = _Undo(model, optimizer, schedule)
    try:
        yield
    # Whatever went wrong, user's code or ours or Ctrl-C, must not leave half a model behind.
    except BaseException as error:
        undo()
        if isinstance(error, RestructureError) or not isinstance(error, Exception):
            raise
        raise RestructureError(
            f"restructuring failed and was undone: {type(error).__name__}: {error}"
        ) from error
    finally:
        _drop_compiled_code()


def _drop_compiled_code() -> None:
    """Let `torch.compile` look at the model anew.

    Dynamo notices the new code of a perforated module that was compiled itself, but not of one
    inside a larger compiled module: there it would go on with the old graph, without a word.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def managed_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters that pbfx adds to the user's optimizer.

    Those are the dendrites' parameters that learn now. Of candidates only `moments`: it never
    moves, but a loss scaler wants to find a gradient in the optimizer that it steps.
    """
    names = []
    for path, module in model.named_modules():
        if isinstance(module, Candidates):
            names.append(join(path, "moments"))
        elif isinstance(module, Dendrites):
            own = module.named_parameters(recurse=False)
            names += [join(path, name) for name, p in own if p.requires_grad and p.numel()]
    return names


def soma_weight_of(model: nn.Module) -> Callable[[str], nn.Parameter]:
    """Return a function from the name of a dendrites' parameter to its soma's weight."""
    weights = {
        join(path, site.dendrites): join(path, site.weight)
        for path, part in parts_of(model).items()
        for site in part.perforation.sites
    }

    def home(name: str) -> nn.Parameter:
        owner = name.removesuffix(".candidates.moments")
        weight = weights[owner if owner != name else name.rpartition(".")[0]]
        # By path: among the model's named parameters a tied weight has one of its names only.
        return model.get_parameter(weight)

    return home


class _Undo:
    """Everything that a restructuring may change, and how to put it back.

    Putting back runs no code of the user's, such as a scheduler's `load_state_dict`: that may be
    what failed.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, schedule: Schedule | None
    ) -> None:
        modules = list(model.modules())
        kept: list[dict[Any, Any]] = []
        for module in modules:
            kept += [module._modules, module._parameters, module._buffers]
        self.training = [(module, module.training) for module in modules]
        self.parts = [
            (part, part.perforation, dataclasses.replace(part.perforation), part._graph)
            for part in perforated_parts(model).values()
        ]
        tensors = {*model.parameters(), *model.buffers()}
        lists: list[list[Any]] = []
        if optimizer is not None:
            kept += [vars(optimizer), optimizer.state, *optimizer.state.values()]
            kept += optimizer.param_groups
            lists.append(optimizer.param_groups)
            # A rate can be a tensor, which schedulers write in place.
            rates = [value for group in optimizer.param_groups for value in group.values()]
            tensors |= {value for value in rates if isinstance(value, Tensor)}
        if schedule is not None:
            kept += [vars(part) for part in schedule.parts()]
        self.dicts = [(d, dict(d)) for d in kept]
        lists += [v for _, items in self.dicts for v in items.values() if isinstance(v, list)]
        self.lists = [(values, list(values)) for values in lists]
        self.tensors = [(t, t.detach().clone(), t.requires_grad, t.grad) for t in tensors]

    @torch.no_grad()
    def __call__(self) -> None:
        for mapping, items in self.dicts:
            mapping.clear()
            mapping.update(items)
        for values, members in self.lists:
            values[:] = members
        for module, training in self.training:
            module.training = training
        for tensor, value, requires_grad, grad in self.tensors:
            tensor.requires_grad_(requires_grad).copy_(value)
            tensor.grad = grad
        for part, perforation, fields, graph in self.parts:
            perforation.__dict__.update(fields.__dict__)
            part._graph = graph
            part.recompile()
