"""Questions about the perforated parts of a model, the whole of which may be larger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from pbfx.candidates import Candidates
from pbfx.dendrites import Dendrites
from pbfx.errors import RestructureError
from pbfx.paths import join, module_at, modules_in, parameters_of
from pbfx.perforated import PerforatedModule
from pbfx.sites import on_channels
from pbfx.structure import Counts, Structure


class Walk(NamedTuple):
    """What one walk over a model finds. It is right until modules come or go.

    A restructure walks before it changes anything and when it has, and hands on what was found.

    Attributes:
        model: that was walked over.
        modules: all of its modules by path, as in `modules_in`.
        parts: the perforated ones among them.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    parts: dict[str, PerforatedModule]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the modules have now, by name."""
        return parameters_of(self.modules)


# A model, or the walk over it that has just been made.
Walked = nn.Module | Walk


def walk(model: Walked) -> Walk:
    """Walk over `model`, unless it is a walk already."""
    if isinstance(model, Walk):
        return model
    modules = modules_in(model)
    parts = {p: module for p, module in modules.items() if isinstance(module, PerforatedModule)}
    return Walk(model, modules, parts)


def parts_of(model: Walked) -> dict[str, PerforatedModule]:
    """Return the perforated parts of `model` by path.

    Raises:
        RestructureError: if there are none.
    """
    found = walk(model)
    if not found.parts:
        raise RestructureError(
            f"{type(found.model).__name__} has no perforated parts; pass it through "
            "pbfx.transform first"
        )
    return found.parts


class Survey(NamedTuple):
    """What a walk over a model finds, and counts.

    Attributes:
        walk: the modules by path.
        dendrites: per neuron, of the most grown site.
        parameters: of the network, candidates not counted. Of `to_dendrite` (D, D, N) the strictly
            lower triangle counts; the rest is never read.
    """

    walk: Walk
    dendrites: int
    parameters: int

    @property
    def parts(self) -> dict[str, PerforatedModule]:
        """The perforated parts by path."""
        return self.walk.parts


def survey(model: Walked) -> Survey:
    """Walk over `model` once, for the answers that the tracker needs at every step.

    Raises:
        RestructureError: if it has no perforated parts.
    """
    found = walk(model)
    parts_of(found)
    return _counted(found)


def parameter_count(model: nn.Module) -> int:
    """Return how many parameters the network of `model` has, as `Survey` counts them."""
    return _counted(walk(model)).parameters


def growth_parameters(parts: Mapping[str, PerforatedModule], dendrites: int = 1) -> int:
    """Return how many parameters so many more dendrites at every site add."""
    total = 0
    for part in parts.values():
        counts = part.structure().sites
        for site in part.perforation.sites:
            has = counts.get(site.name, Counts())
            # A site that has settled on some of its channels grows on those.
            grown = on_channels(site, has.channels)
            total += sum(
                grown.dendrite_parameters(has.dendrites + more) for more in range(dendrites)
            )
    return total


def _counted(found: Walk) -> Survey:
    seen: set[int] = set()
    dendrites = parameters = 0
    for module in found.modules.values():
        if isinstance(module, Dendrites):
            dendrites = max(dendrites, module.count)
            # Neither slots without a dendrite count, nor links that are never read.
            parameters += module.parameter_count
            continue
        if isinstance(module, Candidates):
            continue
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters += parameter.numel()
    return Survey(found, dendrites, parameters)


def structure_of(model: Walked) -> Structure:
    """Return the structure of all parts of `model` together, by the full paths of their sites."""
    return Structure(
        {
            join(path, name): counts
            for path, part in parts_of(model).items()
            for name, counts in part.structure().sites.items()
        }
    )


def adopt(model: Walked, structure: Structure) -> bool:
    """Let each part of `model` take on what `structure`, with full paths, says of its sites.

    Returns:
        Whether any had another structure, so that a walk is out of date.
    """
    changed = False
    for path, part in parts_of(model).items():
        names = {site.name: join(path, site.name) for site in part.perforation.sites}
        wanted = {
            name: structure.sites[full] for name, full in names.items() if full in structure.sites
        }
        if part.structure() != Structure(wanted):
            part.adopt(Structure(wanted))
            changed = True
    return changed


def candidate_parameters(model: Walked) -> dict[str, nn.Parameter]:
    """Return the parameters of all candidates in `model` by name."""
    return {
        join(path, name): parameter
        for path, module in walk(model).modules.items()
        if isinstance(module, Candidates)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def network_state(model: Walked) -> dict[str, Tensor]:
    """Return the state dict without candidates: what the network computes with.

    Its values are the model's own tensors, parameters as such.
    """
    found = walk(model)
    state = found.model.state_dict(keep_vars=True)
    if not any(isinstance(module, Candidates) for module in found.modules.values()):
        return dict(state)
    # Under every name: a layer that is registered twice has its keys twice.
    named = found.model.named_modules(remove_duplicate=False)
    pools = tuple(f"{path}." for path, m in named if isinstance(m, Candidates))
    return {name: t for name, t in state.items() if not name.startswith(pools)}


def managed_parameters(model: Walked) -> list[str]:
    """Return the names of the parameters that pbfx adds to the user's optimizer.

    Those are the dendrites' parameters that learn now. Of candidates only `moments`: it never
    moves, but a loss scaler wants to find a gradient in the optimizer that it steps.
    """
    names = []
    for path, module in walk(model).modules.items():
        if isinstance(module, Candidates):
            names.append(join(path, "moments"))
        elif isinstance(module, Dendrites):
            own = [(name, p) for name, p in module._parameters.items() if p is not None]
            names += [join(path, name) for name, p in own if p.requires_grad and p.numel()]
    return names


def soma_weight_of(model: Walked) -> Callable[[str], nn.Parameter]:
    """Return a function from the name of a dendrites' parameter to its soma's weight."""
    found = walk(model)
    weights = {
        join(path, site.dendrites): join(path, site.home)
        for path, part in parts_of(found).items()
        for site in part.perforation.sites
    }

    def home(name: str) -> nn.Parameter:
        owner = name.removesuffix(".candidates.moments")
        weight = weights[owner if owner != name else name.rpartition(".")[0]]
        # By path: among the model's named parameters a tied weight has one of its names only.
        above, _, role = weight.rpartition(".")
        return getattr(module_at(found.model, above), role)

    return home
