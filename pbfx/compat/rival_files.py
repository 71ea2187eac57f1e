"""Load a network that `perforatedai` 3.x saved into a model of pbfx, with equal outputs.

The two compute the same neuron, and store it differently. What differs beyond names:

- A norm between a layer and the place where dendrites join. pbfx joins after the norm
  (`docs/sites.md`), perforatedai at the layer that it wraps. Where the layer was wrapped alone, its
  links are scaled by what the batch norm after it scales by; where layer and batch norm were
  wrapped as one group, each dendrite has a batch norm of its own, which is folded into its weights.
  Both are exact with running statistics, so outputs are equal in eval mode. Norms without running
  statistics allow neither.
- Layers that are registered under several names are stored under the first.
"""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from pbfx.compat.rival_layout import Network, WrappedLayer, activation_beside, read_network
from pbfx.config import Config
from pbfx.errors import CheckpointError, PbfxError
from pbfx.parts import adopt, parts_of
from pbfx.paths import join
from pbfx.perforated import PerforatedModule, perforated_parts
from pbfx.sites import Site, find_join, soma_weight
from pbfx.structure import Counts, Structure
from pbfx.transform import transform
from pbfx.undo import undoing
from pbfx.wording import counted

logger = logging.getLogger(__name__)

_NORM_STATE = ("running_mean", "running_var", "weight", "bias")


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a wrapped layer's state goes.

    Attributes:
        op: path of the linear or conv layer.
        prefix: of the op's keys inside the wrapped layer's state.
        norm: for a group, the batch norm's keys inside it, and its module.
        moves: from the wrapped layer's keys to the model's.
    """

    op: str
    prefix: str
    norm: tuple[str, nn.Module] | None
    moves: dict[str, str]


def load_perforatedai(
    path: str | os.PathLike[str],
    model: nn.Module,
    config: Config | None = None,
    *,
    activation: str | None = None,
) -> nn.Module:
    """Load a file of `perforatedai` 3.x, such as `best_model.pt`, written in gradient mode.

    The file is read as safetensors; nothing is ever unpickled.

    Args:
        path: the file.
        model: a freshly built plain model, without the other package's wrappers, which is
            transformed first; or one from `pbfx.transform`, which is grown in place. Where the file
            has a group of a layer and its batch norm (PAISequential), an `nn.Sequential` of both.
        config: how to transform a plain model; None for gradient mode, as in the file, at the
            layers that the file has wrapped. Its activation must be the file's.
        activation: what the dendrites apply. The tensors do not say; None asks the settings
            (`<run>_config.json`) that a run leaves in the same folder.

    Returns:
        The perforated model: `model` itself if it was transformed already. Its output equals the
        other package's; where batch norms are involved, in eval mode.

    Raises:
        CheckpointError: if the file is not what is expected, or does not fit. The model is then as
            it was.

    Source: files that `perforatedai` 3.2.9 wrote when it was run.
    """
    file = Path(path)
    network = read_network(file)
    model = getattr(model, "_orig_mod", model)
    wanted = activation or activation_beside(file)
    if wanted is None:
        raise CheckpointError(
            f"{file} does not say what its dendrites apply, and no *_config.json of the run lies "
            'beside it; pass activation="sigmoid", its default, or what set_pai_forward_function '
            "was given"
        )
    places = _places(network, model, file)
    perforated = _perforated(model, config, places, wanted, file)
    sites = _sites(perforated)
    _check(network, places, perforated, sites, file)
    structure, values = _values(network, places, perforated, sites, file)
    try:
        with undoing(perforated):
            adopt(perforated, structure)
            perforated.load_state_dict(_with_aliases(perforated, values))
    except PbfxError as error:
        raise CheckpointError(f"{file} does not fit: {error.__cause__ or error}") from error
    return perforated


def _places(network: Network, model: nn.Module, file: Path) -> dict[str, _Place]:
    """Return the place of each wrapped layer, by its name."""
    places, faults = {}, []
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer in network.layers:
        name = layer.name
        if name not in modules:
            faults.append(f"the model has no module {name!r}")
        elif any(key.startswith("model.") for key in layer.own):
            place = _group_place(layer, modules[name])
            if isinstance(place, str):
                faults.append(f"{name}: {place}")
            else:
                places[name] = place
        else:
            moves = {key: join(name, key) for key in layer.own}
            places[name] = _Place(name, "", None, moves)
    if faults:
        raise CheckpointError(f"{file} does not fit {type(model).__name__}: {'; '.join(faults)}")
    return places


def _group_place(layer: WrappedLayer, module: nn.Module) -> _Place | str:
    """Return the place of a group of layers, or why there is none."""
    name, chain = layer.name, module
    if not isinstance(chain, nn.Sequential):
        inner = getattr(module, "model", None)
        if not isinstance(inner, nn.Sequential):
            return f"a group of layers there; the model needs an nn.Sequential, got {module}"
        name, chain = join(name, "model"), inner
    children = list(chain.named_children())
    kinds = [type(child).__name__ for _, child in children]
    norm = None
    if len(children) == 2 and _has_statistics(children[1][1]):
        norm = f"model.{children[1][0]}.", children[1][1]
    elif len(children) != 1:
        return (
            f"a group of {' and '.join(kinds)}; dendrites of pbfx are a layer, or a layer and a "
            "batch norm with running statistics"
        )
    moves = {key: join(name, key.removeprefix("model.")) for key in layer.own}
    first = children[0][0]
    return _Place(join(name, first), f"model.{first}.", norm, moves)


def _has_statistics(norm: nn.Module) -> bool:
    """Return whether `norm` scales each channel by numbers that it keeps, in eval mode."""
    return isinstance(getattr(norm, "running_var", None), Tensor) and hasattr(norm, "eps")


def _perforated(
    model: nn.Module, config: Config | None, places: dict[str, _Place], activation: str, file: Path
) -> nn.Module:
    parts = perforated_parts(model)
    if not parts:
        if config is None:
            include = tuple(glob.escape(place.op) for place in places.values())
            config = Config(include=include, learning="gradient", activation=activation)
        try:
            model = transform(model, config)
        except PbfxError as error:
            raise CheckpointError(f"{file} does not fit {type(model).__name__}: {error}") from error
        parts = perforated_parts(model)
    elif config is not None:
        raise CheckpointError(f"{file}: the model is transformed already; leave `config` out")
    others = {part.perforation.config.activation for part in parts.values()} - {activation}
    if others:
        raise CheckpointError(
            f"{file}: its dendrites apply {activation!r}, the model's {sorted(others)[0]!r}; "
            f'transform with pbfx.Config(activation="{activation}")'
        )
    if any(part.perforation.tracker is not None for part in parts.values()):
        raise CheckpointError(
            f"{file}: a tracker manages the model, and its optimizer would miss the dendrites; "
            "load before making optimizer and tracker"
        )
    return model


def _sites(model: nn.Module) -> dict[str, tuple[str, PerforatedModule, Site]]:
    """Return, by full path of the site, the path of its part, the part and the site."""
    return {
        join(path, site.name): (path, part, site)
        for path, part in parts_of(model).items()
        for site in part.perforation.sites
    }


def _check(
    network: Network,
    places: dict[str, _Place],
    model: nn.Module,
    sites: dict[str, tuple[str, PerforatedModule, Site]],
    file: Path,
) -> None:
    """Compare keys, shapes and sites with the model's; raise once, naming all that is wrong."""
    faults = []
    for layer in network.layers:
        op = places[layer.name].op
        if layer.dendrites and op not in sites:
            faults.append(f"it has dendrites at {op!r}, where the model cannot grow; pbfx.explain")
        elif layer.to_soma is not None and layer.to_soma.shape[1] != sites[op][2].neurons:
            got, has = layer.to_soma.shape[1], sites[op][2].neurons
            faults.append(f"it has links to {counted(got, 'neuron')} at {op!r}, the model {has}")
    given = {places[x.name].moves[k]: t for x in network.layers for k, t in x.own.items()}
    given |= network.others
    own = {key: value for key, value in model.state_dict().items() if ".dendrites" not in key}
    twins = _twins(model)
    for key in sorted(given.keys() | own.keys()):
        if key not in own:
            faults.append(f"the model has no {key}")
        elif key not in given:
            if not any(twin in given for twin in twins.get(key, ())):
                faults.append(f"the file has no {key}")
        elif given[key].shape != own[key].shape:
            got, has = tuple(given[key].shape), tuple(own[key].shape)
            faults.append(f"{key} has shape {got}, the model's {has}")
    if faults:
        shown = "; ".join(faults[:12]) + (f"; {len(faults) - 12} more" if faults[12:] else "")
        raise CheckpointError(f"{file} does not fit {type(model).__name__}: {shown}")


def _values(
    network: Network,
    places: dict[str, _Place],
    model: nn.Module,
    sites: dict[str, tuple[str, PerforatedModule, Site]],
    file: Path,
) -> tuple[Structure, dict[str, Tensor]]:
    """Return how many dendrites each site has, and the model's state without aliases."""
    values, counts = dict(network.others), {}
    for layer in network.layers:
        values |= {places[layer.name].moves[key]: tensor for key, tensor in layer.own.items()}
    for layer in network.layers:
        if not layer.dendrites:
            continue
        place = places[layer.name]
        path, part, site = sites[place.op]
        roles = _roles(layer, place, part, site, {"path": path, "file": file}, values)
        counts[place.op] = Counts(len(layer.dendrites))
        values |= {join(path, f"{site.dendrites}.{role}"): t for role, t in roles.items()}
    return Structure(counts), values


def _roles(
    layer: WrappedLayer,
    place: _Place,
    part: PerforatedModule,
    site: Site,
    where: dict[str, object],
    values: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Return the tensors of one site's dendrites."""
    assert layer.to_soma is not None
    count, neurons = layer.to_soma.shape
    weight = torch.stack([d[f"{place.prefix}weight"] for d in layer.dendrites])
    bias_key = f"{place.prefix}bias"
    bias = weight.new_zeros(count, neurons)
    if bias_key in layer.own:
        bias = torch.stack([d[bias_key] for d in layer.dendrites])
    to_soma = layer.to_soma
    norm = _norm_after(part, site)
    if place.norm is not None:
        prefix, module = place.norm
        if norm is None:
            raise CheckpointError(
                f"{where['file']}: {layer.name} is a group of a layer and a norm, but in the model "
                f"no norm follows {place.op!r} directly"
            )
        affine = [_affine(d, prefix, module) for d in layer.dendrites]
        scale = torch.stack([a for a, _ in affine]).to(weight.dtype)
        shift = torch.stack([b for _, b in affine]).to(weight.dtype)
        weight, bias = weight * site.along_weight(scale), bias * scale + shift
    elif norm is not None:
        full = join(str(where["path"]), norm)
        module = part.get_submodule(norm)
        if not _has_statistics(module):
            raise CheckpointError(
                f"{where['file']}: dendrites at {place.op!r} join before {full!r} "
                f"({type(module).__name__}), in pbfx after it, and a norm without running "
                "statistics does not allow to move them"
            )
        logger.warning(
            "dendrites at %s joined before %s and now join after it: outputs are equal in eval "
            "mode, and in train mode the batch's statistics no longer see them",
            place.op,
            full,
        )
        scale, _ = _affine(values, f"{full}.", module)
        to_soma = to_soma * scale.to(to_soma.dtype)
    to_dendrite = to_soma.new_zeros(count, count, neurons)
    for index, links in enumerate(layer.to_dendrite, start=1):
        to_dendrite[index, :index] = links
    roles = {"weight": weight, "to_soma": to_soma, "to_dendrite": to_dendrite}
    return roles | ({"bias": bias} if site.biased else {})


def _norm_after(part: PerforatedModule, site: Site) -> str | None:
    """Return the path of the norm after which the dendrites of `site` join, None without one."""
    for node in part.perforation.source.nodes:
        if soma_weight(part, node) != site.weight:
            continue
        place = find_join(part, node, site.neurons)
        if place is not None and place.norm.op == "call_module":
            return str(place.norm.target)
        if place is not None:
            raise CheckpointError(
                f"dendrites at {site.name!r} join after a norm that is called as a function "
                f"({place.kind}); where the file's joined cannot be moved there"
            )
    return None


def _affine(state: dict[str, Tensor], prefix: str, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what a norm with running statistics multiplies by and adds, (N,) in float64."""
    mean, variance, weight, bias = (state.get(f"{prefix}{name}") for name in _NORM_STATE)
    assert mean is not None
    assert variance is not None
    scale = (variance.double() + float(getattr(norm, "eps"))).rsqrt()  # noqa: B009
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias.double()


def _twins(model: nn.Module) -> dict[str, set[str]]:
    """Return, for each key of a tensor that has several, all of them."""
    names: dict[int, set[str]] = {}
    pairs = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in pairs:
        names.setdefault(id(tensor), set()).add(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _with_aliases(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `values` under every key that a tensor has."""
    twins, full = _twins(model), dict(values)
    for key in values:
        full |= dict.fromkeys(twins.get(key, ()), values[key])
    return full
