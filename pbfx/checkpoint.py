"""Save and load perforated models and running trackers: safetensors, and JSON in its header.

    tensors    model/<state-dict key>, tracker/..., rng/...
    header     "pbfx": format, configuration, structure of each part, the tracker's state

A file holds tensors and JSON and nothing else; loading it cannot execute code.
"""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pbfx.config import Config
from pbfx.encoding import decode, encode
from pbfx.errors import CheckpointError, PbfxError
from pbfx.files import atomic_path
from pbfx.kept import kept_modules
from pbfx.paths import join
from pbfx.perforated import perforated_parts
from pbfx.structure import Structure, structure_of_keys
from pbfx.transform import transform
from pbfx.undo import undoing

# 2: sites by full paths, and whether the whole model was transformed.
FORMAT = 2


class Resumable(Protocol):
    """What `save` and `load` ask of a tracker."""

    model: nn.Module

    def state_dict(self) -> dict[str, Any]:
        """Return plain data and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state` left off, or raise and change nothing."""
        ...


def save(model: nn.Module, path: str | os.PathLike[str], tracker: Resumable | None = None) -> None:
    """Write `model`, and with it a running `tracker`, to `path`, atomically.

    Args:
        model: a model with perforated parts, in either phase, compiled or not.
        path: the file; by custom it ends in `.safetensors`.
        tracker: its `pbfx.Tracker`; if given, the file also holds the state of tracker, optimizer,
            scheduler and torch's random streams, so that `load` can continue the run as if it had
            not stopped.

    Raises:
        CheckpointError: if the model has no perforated parts, the tracker is another model's, or
            the state cannot be written; a file that was there before is left as it was.
    """
    model = getattr(model, "_orig_mod", model)
    parts = perforated_parts(model)
    if not parts:
        raise CheckpointError(
            f"pbfx.save: {type(model).__name__} has no perforated parts; use torch.save for plain "
            "models"
        )
    if tracker is not None and tracker.model is not model:
        raise CheckpointError("pbfx.save: the tracker is another model's")
    tensors: dict[str, Tensor] = {
        f"model/{key}": value for key, value in model.state_dict().items()
    }
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"cannot save {name}: a {type(value).__name__} is no tensor")
    header: dict[str, Any] = {
        "format": FORMAT,
        "transformed": _is_transformed(model),
        "parts": {
            path_: {
                "config": part.perforation.config.to_json(),
                "sites": [site.name for site in part.perforation.sites],
                "dendrites": {n: c.dendrites for n, c in part.structure().sites.items()},
                "draws": part.perforation.draws,
            }
            for path_, part in parts.items()
        },
        "tracker": None if tracker is None else encode(tracker.state_dict(), tensors, "tracker"),
    }
    if tracker is not None:
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            tensors |= {f"rng/cuda/{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    try:
        with atomic_path(path) as temporary:
            save_file(_separate(tensors), temporary, {"pbfx": json.dumps(header)})
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"pbfx.save: cannot write {os.fspath(path)}: {error}") from error


def _is_transformed(model: nn.Module) -> bool:
    """Return whether `model` itself came out of `pbfx.transform`, and not only parts of it."""
    return "" in perforated_parts(model) or "" in kept_modules(model)


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    tracker: Resumable | None = None,
    *,
    restore_rng: bool = True,
) -> nn.Module:
    """Load a file that `save` wrote.

    Args:
        path: the file.
        model: a freshly built plain model, which is transformed with the saved configuration first,
            or a transformed one, which is grown to the saved structure in place.
        tracker: a new tracker of `model` over a new optimizer and scheduler, built as in the first
            run; it continues where the saved one stood.
        restore_rng: whether a tracker's file also sets torch's random streams back, so that dropout
            and shuffling go on as they would have.

    Returns:
        The perforated model: `model` itself if it was transformed already.

    Raises:
        CheckpointError: if the file is not a pbfx checkpoint or does not fit. Model, optimizer and
            tracker are then as they were.
    """
    header, tensors = _read(Path(path))
    model = getattr(model, "_orig_mod", model)
    if tracker is not None and header["tracker"] is None:
        raise CheckpointError(f"{path} holds a model but no tracker; it was saved without one")
    if tracker is not None and tracker.model is not model:
        raise CheckpointError(
            "pbfx.load: the tracker is another model's; make it on the transformed model that you "
            "load into"
        )
    if not perforated_parts(model):
        model = _transform_as(model, header, path)
    learning = tracker is not None and any(".candidates." in key for key in tensors)
    _check_fit(model, header, path, learning)
    values = {k.removeprefix("model/"): t for k, t in tensors.items() if k.startswith("model/")}
    wanted = _structures(model, values)
    if tracker is None:
        # Candidates are for the tracker that trains them; without it a model is its network.
        values, wanted = _network(model, values, wanted)
        _check_untracked(model, wanted, path)
    try:
        with undoing(model):
            for part_path, part in perforated_parts(model).items():
                if part.structure() != wanted[part_path]:
                    part.adopt(wanted[part_path])
                saved = header["parts"].get(part_path)
                if saved is not None:
                    part.perforation.draws = saved["draws"]
            model.load_state_dict(values)
            if tracker is not None:
                tracker.load_state_dict(decode(header["tracker"], tensors))
    except PbfxError as error:
        cause = error.__cause__ or error
        raise CheckpointError(f"{path} does not fit the model: {cause}") from error
    if tracker is not None and restore_rng:
        torch.set_rng_state(tensors["rng/cpu"])
        streams = [tensors[k] for k in sorted(tensors) if k.startswith("rng/cuda/")]
        if streams and torch.cuda.is_available() and len(streams) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(streams)
    return model


def _structures(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Structure]:
    """Return the structure of each part of `model` that the saved keys describe."""
    return {
        path: structure_of_keys(values, f"{path}." if path else "", part.perforation.sites)
        or Structure({})
        for path, part in perforated_parts(model).items()
    }


def _network(
    model: nn.Module, values: dict[str, Tensor], structures: dict[str, Structure]
) -> tuple[dict[str, Tensor], dict[str, Structure]]:
    """Return values and structures without candidates, and without sites that have no more."""
    parts = perforated_parts(model)
    networks = {path: structure.without_candidates() for path, structure in structures.items()}
    # A layer that is registered under several names has its dendrites' keys under each.
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    dropped = []
    for path, network in networks.items():
        for site in parts[path].perforation.sites:
            owner, _, own = join(path, site.dendrites).rpartition(".")
            end = ".candidates." if site.name in network.sites else "."
            dropped += [join(a, own) + end for a in aliases[id(model.get_submodule(owner))]]
    kept = {k: value for k, value in values.items() if not k.startswith(tuple(dropped))}
    return kept, networks


def _check_untracked(model: nn.Module, wanted: dict[str, Structure], path: Any) -> None:
    for name, part in perforated_parts(model).items():
        if part.perforation.tracker is not None and part.structure() != wanted[name]:
            raise CheckpointError(
                f"{path} has another number of dendrites than the model, whose tracker and "
                "optimizer would not know; give the tracker too, or load into a fresh model"
            )


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, none sharing memory: the format has no aliases."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        separate[name] = value
    return separate


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("pbfx", "null"))
            # Copied to where torch would have put them: a tensor's place in the file decides how it
            # is aligned, that in which order a BLAS sums, and that the last bit of a continued run.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a pbfx checkpoint: {error}. pbfx.load reads what pbfx.save wrote and "
            "never unpickles; give a file of torch.save to model.load_state_dict(torch.load(path))"
        ) from error
    if not isinstance(header, dict) or "format" not in header:
        raise CheckpointError(f"{path} is a safetensors file, but pbfx.save did not write it")
    if header["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {header['format']}, this pbfx reads {FORMAT}; update pbfx, or read "
            "an older file with the pbfx that wrote it"
        )
    return header, tensors


def _transform_as(model: nn.Module, header: dict[str, Any], path: Any) -> nn.Module:
    parts = header["parts"]
    if not header["transformed"]:
        raise CheckpointError(
            f"{path} holds a model of which parts were transformed ({', '.join(parts)}); "
            "transform the same parts of yours before pbfx.load"
        )
    if any(saved["config"].get("capture") == "export" for saved in parts.values()):
        raise CheckpointError(
            f"{path} holds a model that was exported, which takes example_inputs; pass yours "
            'through pbfx.transform with capture="export" first, and load into that'
        )
    # The sites by name stand for a filter function, which is code and is not in the file.
    names = [join(part, name) for part, saved in parts.items() for name in saved["sites"]]
    settings = next(iter(parts.values()))["config"]
    settings = settings | {"include": [glob.escape(name) for name in names], "exclude": ()}
    try:
        return transform(model, Config(**settings))
    except PbfxError as error:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from error


def _check_fit(model: nn.Module, header: dict[str, Any], path: Any, learning: bool) -> None:
    """Compare site by site: a graph may have been split since, when hooks came.

    Args:
        model: to load into.
        header: the file's.
        path: of the file, for the message.
        learning: whether candidates in training are to be taken over.
    """
    parts = perforated_parts(model)
    ours = {
        join(name, site.name): part.perforation.config
        for name, part in parts.items()
        for site in part.perforation.sites
    }
    theirs = {
        join(name, site): saved["config"]
        for name, saved in header["parts"].items()
        for site in saved["sites"]
    }
    grown = [join(n, s) for n, saved in header["parts"].items() for s in saved["dendrites"]]
    both, faults = ours.keys() & theirs.keys(), []
    if parts.keys() != header["parts"].keys() and not both:
        faults.append(
            f"its perforated parts are {sorted(header['parts'])}, the model's {sorted(parts)}"
        )
    elif missing := sorted(set(grown) - ours.keys()):
        faults.append(f"it has dendrites at {missing}, where the model has no site")
    # Candidates remember what their objective needs.
    for setting in ("activation", "learning", *(("objective",) if learning else ())):
        # A file may be older than the setting, and was then written by its default.
        default = getattr(Config(), setting)
        pairs = {
            (theirs[name].get(setting, default), getattr(ours[name], setting)) for name in both
        }
        faults += [
            f"its {setting} is {their!r}, the model's {our!r}"
            for their, our in sorted(pairs)
            if their != our
        ]
    if faults:
        raise CheckpointError(f"{path} does not fit the model: " + "; ".join(faults))
