"""How `perforatedai` 3.x lays a network out in a file, read into plain data.

Learnt from files that 3.2.9 wrote when it was run. A layer at `fc1` that it wrapped is

    fc1.main_module.<key>                     the layer's own state
    fc1.dendrite_module.layers.<d>.<key>      dendrite d: the same keys, V_d and c_d
    fc1.dendrites_to_top.<D - 1>              (D, N), T; smaller numbers are of the past
    fc1.dendrite_module.dendrites_to_dendrites.<d>    (d, N), row e is U_{d,e}; d from 1 on

where a group of layers (its PAISequential) has `model.<i>.` before its keys. Everything else of a
wrapped layer is bookkeeping. Other modules keep their keys. The tracker's state is a text in a
tensor of bytes. The activation is in no tensor: the run's settings, `<run>_config.json` in the same
folder, name it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pbfx.config import ACTIVATIONS
from pbfx.errors import CheckpointError
from pbfx.paths import join

TRACKER = "tracker_string"
_OWN = re.compile(r"(?:(?P<name>.+?)\.)?main_module\.(?P<key>.+)", re.DOTALL)
_TO_TOP = re.compile(r"dendrites_to_top\.(\d+)")
_LAYER = re.compile(r"dendrite_module\.layers\.(\d+)\.(.+)", re.DOTALL)
_CASCADE = re.compile(r"dendrite_module\.dendrites_to_dendrites\.(\d+)")
# What it needs to train on and a network does not: shapes seen, counters, a copy of the layer to
# draw dendrites from, links of candidates that do not exist in gradient mode.
_BOOKKEEPING = re.compile(
    r"(dendrite_module\.)?this_(node_index|output_dimensions)"
    r"|dendrite_module\.(num_cycles|parent_module\..+|dendrites_to_candidates\.\d+"
    r"|dendrite_values\.\d+\..+)",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class WrappedLayer:
    """A layer that it wrapped, and its D dendrites.

    Attributes:
        name: path in the model; `""` for the root.
        own: the layer's state by its keys.
        dendrites: of each dendrite, a state with keys of `own`.
        to_soma: T, (D, N); None where D is 0.
        to_dendrite: U_{d,e} for e < d, (d, N) for each d from 1 on.
    """

    name: str
    own: dict[str, Tensor]
    dendrites: tuple[dict[str, Tensor], ...]
    to_soma: Tensor | None
    to_dendrite: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Network:
    """What a file holds: wrapped layers, and the state of all other modules by their keys."""

    layers: tuple[WrappedLayer, ...]
    others: dict[str, Tensor]


def read_network(path: Path) -> Network:
    """Read a file of safetensors that `perforatedai` 3.x wrote.

    Raises:
        CheckpointError: if it is something else; nothing is ever unpickled.
    """
    tensors = _read(path)
    own: dict[str, dict[str, Tensor]] = {}
    for key in tensors:
        if match := _OWN.fullmatch(key):
            own.setdefault(match["name"] or "", {})[match["key"]] = tensors[key]
    if not own:
        raise CheckpointError(
            f"{path} is a safetensors file, but no layer in it was wrapped by perforatedai 3.x (no "
            "key has 'main_module' in it); a plain state dict goes into model.load_state_dict"
        )
    rest: dict[str, dict[str, Tensor]] = {name: {} for name in own}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if _OWN.fullmatch(key):
            continue
        owner = _owner(key, own)
        if owner is not None:
            rest[owner][key.removeprefix(f"{owner}.")] = tensor
        elif key != TRACKER:
            others[key] = tensor
    faults: list[str] = []
    layers = tuple(_layer(name, own[name], rest[name], faults) for name in own)
    if faults:
        raise CheckpointError(
            f"{path} is not laid out as perforatedai 3.x does in gradient mode: {'; '.join(faults)}"
        )
    return Network(layers, others)


def activation_beside(path: Path) -> str | None:
    """Return the activation that the run's settings name, None where there are no settings.

    Raises:
        CheckpointError: if pbfx has no such activation, or the settings cannot be read.
    """
    folder = path.resolve().parent
    named = folder / f"{folder.name}_config.json"
    found = [named] if named.is_file() else sorted(folder.glob("*_config.json"))
    if len(found) != 1:
        return None
    try:
        value = json.loads(found[0].read_text(encoding="utf-8")).get("pai_forward_function")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{found[0]} cannot be read as the run's settings: {error}"
        ) from error
    if value is None:
        return None
    # "torch.sigmoid", "torch._C._nn.gelu", "torch.nn.functional.silu", "SiLU()".
    match = re.fullmatch(r"(?:\w+\.)*(\w+)(?:\((?:approximate='none')?\))?", str(value))
    name = match[1].lower() if match else ""
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{found[0]}: dendrites there apply {value!r}, which pbfx does not have; it has "
            f"{', '.join(ACTIVATIONS)}"
        )
    return name


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if "pbfx" in (file.metadata() or {}):
                raise CheckpointError(f"{path} was written by pbfx.save; read it with pbfx.load")
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (OSError, SafetensorError, ValueError) as error:
        pickled = path.is_file() and zipfile.is_zipfile(path)
        raise CheckpointError(
            f"{path} is not a safetensors file: {error}. "
            + (
                "It is a pickle of torch.save, which is never opened here; write it again with "
                "set_using_safe_tensors(True), perforatedai's default"
                if pickled
                else "perforatedai 3.x writes best_model.pt in the folder of the run"
            )
        ) from error


def _owner(key: str, names: dict[str, dict[str, Tensor]]) -> str | None:
    """Return the wrapped layer that `key` belongs to; the root owns what its own keys look like."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        if name in names:
            return name
    return "" if "" in names and _known(key) else None


def _known(key: str) -> bool:
    return any(form.fullmatch(key) for form in (_TO_TOP, _LAYER, _CASCADE, _BOOKKEEPING))


def _layer(
    name: str, own: dict[str, Tensor], rest: dict[str, Tensor], faults: list[str]
) -> WrappedLayer:
    dendrites: dict[int, dict[str, Tensor]] = {}
    to_top: dict[int, Tensor] = {}
    cascade: dict[int, Tensor] = {}
    for key, tensor in rest.items():
        if match := _LAYER.fullmatch(key):
            dendrites.setdefault(int(match[1]), {})[match[2]] = tensor
        elif match := _TO_TOP.fullmatch(key):
            to_top[int(match[1])] = tensor
        elif match := _CASCADE.fullmatch(key):
            cascade[int(match[1])] = tensor
        elif not _BOOKKEEPING.fullmatch(key):
            faults.append(f"{join(name, key)} is unknown")
    count = len(dendrites)
    if sorted(dendrites) != list(range(count)):
        faults.append(f"{name} has dendrites {sorted(dendrites)}, not all from 0 on")
        count = 0
    for index in range(count):
        if dendrites[index].keys() != own.keys():
            faults.append(f"dendrite {index} of {name} has other keys than the layer")
        elif wrong := [k for k in own if dendrites[index][k].shape != own[k].shape]:
            faults.append(f"dendrite {index} of {name} has another {wrong[0]} than the layer")
    links = to_top.get(count - 1)
    if count and (links is None or links.dim() != 2 or links.shape[0] != count):
        faults.append(f"{join(name, f'dendrites_to_top.{count - 1}')} must have {count} rows")
        links = None
    if links is not None:
        neurons = links.shape[1]
        for index in range(1, count):
            got = None if index not in cascade else tuple(cascade[index].shape)
            if got != (index, neurons):
                key = join(name, f"dendrite_module.dendrites_to_dendrites.{index}")
                faults.append(f"{key} must have shape {(index, neurons)}, got {got}")
    return WrappedLayer(
        name,
        own,
        tuple(dendrites[index] for index in range(count)),
        links,
        tuple(cascade[index] for index in range(1, count) if index in cascade),
    )
