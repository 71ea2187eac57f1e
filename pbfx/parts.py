"""Questions about the perforated parts of a model, the whole of which may be larger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from pbfx.candidates import Candidates
from pbfx.dendrites import Dendrites
from pbfx.errors import RestructureError
from pbfx.paths import join, modules_in
from pbfx.perforated import PerforatedModule, perforated_parts
from pbfx.sites import on_channels
from pbfx.structure import Counts, Structure


def parts_of(model: nn.Module) -> dict[str, PerforatedModule]:
    """Return the perforated parts of `model` by path.

    Raises:
        RestructureError: if there are none.
    """
    return _checked(model, perforated_parts(model))


class Survey(NamedTuple):
    """What one walk over a model finds.

    Attributes:
        parts: the perforated parts by path.
        dendrites: per neuron, of the most grown site.
        parameters: of the network, candidates not counted. Of `to_dendrite` (D, D, N) the strictly
            lower triangle counts; the rest is never read.
        modules: all of the model's.
    """

    parts: dict[str, PerforatedModule]
    dendrites: int
    parameters: int
    modules: list[nn.Module]


def survey(model: nn.Module) -> Survey:
    """Walk over `model` once, for the answers that the tracker needs at every step.

    Raises:
        RestructureError: if it has no perforated parts.
    """
    found = _walk(model)
    _checked(model, found.parts)
    return found


def parameter_count(model: nn.Module) -> int:
    """Return how many parameters the network of `model` has, as `Survey` counts them."""
    return _walk(model).parameters


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


def _walk(model: nn.Module) -> Survey:
    parts: dict[str, PerforatedModule] = {}
    seen: set[int] = set()
    dendrites = parameters = 0
    modules = modules_in(model)
    for path, module in modules.items():
        if isinstance(module, Candidates):
            continue
        if isinstance(module, PerforatedModule):
            parts[path] = module
        elif isinstance(module, Dendrites):
            dendrites = max(dendrites, module.count)
            # Neither slots without a dendrite count, nor links that are never read.
            held = sum(p.numel() for p in module._parameters.values() if p is not None)
            parameters += module.parameter_count - held
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters += parameter.numel()
    return Survey(parts, dendrites, parameters, list(modules.values()))


def _checked(model: nn.Module, parts: dict[str, PerforatedModule]) -> dict[str, PerforatedModule]:
    if not parts:
        raise RestructureError(
            f"{type(model).__name__} has no perforated parts; pass it through pbfx.transform first"
        )
    return parts


def structure_of(model: nn.Module) -> Structure:
    """Return the structure of all parts of `model` together, by the full paths of their sites."""
    return Structure(
        {
            join(path, name): counts
            for path, part in parts_of(model).items()
            for name, counts in part.structure().sites.items()
        }
    )


def adopt(model: nn.Module, structure: Structure) -> None:
    """Let each part of `model` take on what `structure`, with full paths, says of its sites."""
    for path, part in parts_of(model).items():
        names = {site.name: join(path, site.name) for site in part.perforation.sites}
        wanted = {
            name: structure.sites[full] for name, full in names.items() if full in structure.sites
        }
        if part.structure() != Structure(wanted):
            part.adopt(Structure(wanted))


def candidate_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of all candidates in `model` by name."""
    return {
        join(path, name): parameter
        for path, module in modules_in(model).items()
        if isinstance(module, Candidates)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def network_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without candidates: what the network computes with.

    Its values are the model's own tensors, parameters as such.
    """
    state = model.state_dict(keep_vars=True)
    if not any("candidates." in name for name in state) or not any(
        isinstance(module, Candidates) for module in modules_in(model).values()
    ):
        return dict(state)
    # Under every name: a layer that is registered twice has its keys twice.
    named = model.named_modules(remove_duplicate=False)
    pools = tuple(f"{path}." for path, m in named if isinstance(m, Candidates))
    return {name: t for name, t in state.items() if not name.startswith(pools)}


def managed_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters that pbfx adds to the user's optimizer.

    Those are the dendrites' parameters that learn now. Of candidates only `moments`: it never
    moves, but a loss scaler wants to find a gradient in the optimizer that it steps.
    """
    names = []
    for path, module in modules_in(model).items():
        if isinstance(module, Candidates):
            names.append(join(path, "moments"))
        elif isinstance(module, Dendrites):
            own = [(name, p) for name, p in module._parameters.items() if p is not None]
            names += [join(path, name) for name, p in own if p.requires_grad and p.numel()]
    return names


def soma_weight_of(model: nn.Module) -> Callable[[str], nn.Parameter]:
    """Return a function from the name of a dendrites' parameter to its soma's weight."""
    weights = {
        join(path, site.dendrites): join(path, site.home)
        for path, part in parts_of(model).items()
        for site in part.perforation.sites
    }

    def home(name: str) -> nn.Parameter:
        owner = name.removesuffix(".candidates.moments")
        weight = weights[owner if owner != name else name.rpartition(".")[0]]
        # By path: among the model's named parameters a tied weight has one of its names only.
        return model.get_parameter(weight)

    return home
