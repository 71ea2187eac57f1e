"""Save and load perforated models and running trackers: safetensors, and JSON in its header.

    tensors    model/<state-dict key>, tracker/..., rng/...
    header     "pbfx": format, configuration, structure of each part, the tracker's state

A file holds tensors and JSON and nothing else; loading it cannot execute code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pbfx.config import Config
from pbfx.encoding import decode, encode
from pbfx.errors import CheckpointError, PbfxError
from pbfx.files import atomic_path
from pbfx.perforated import perforated_parts
from pbfx.restructure import restructuring
from pbfx.transform import transform

if TYPE_CHECKING:
    from pbfx.tracker import Tracker

FORMAT = 1


def save(model: nn.Module, path: str | os.PathLike[str], tracker: Tracker | None = None) -> None:
    """Write `model`, and with it a running `tracker`, to `path`, atomically.

    Args:
        model: a model with perforated parts, in either phase, compiled or not.
        path: the file; by custom it ends in `.safetensors`.
        tracker: if given, the file also holds the state of tracker, optimizer, scheduler and
            torch's random streams, so that `load` can continue the run as if it had not stopped.

    Raises:
        CheckpointError: if the model has no perforated parts or its state cannot be written; a file
            that was there before is left as it was.
    """
    model = getattr(model, "_orig_mod", model)
    parts = perforated_parts(model)
    if not parts:
        raise CheckpointError(
            f"pbfx.save: {type(model).__name__} has no perforated parts; use torch.save for "
            f"plain models"
        )
    tensors: dict[str, Tensor] = {
        f"model/{key}": value for key, value in model.state_dict().items()
    }
    header: dict[str, Any] = {
        "format": FORMAT,
        "parts": {
            path_: {
                "config": part.perforation.config.to_json(),
                "sites": [site.name for site in part.perforation.sites],
                "dendrites": {n: c.dendrites for n, c in part.structure().sites.items()},
                "phase": str(part.perforation.phase),
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


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    tracker: Tracker | None = None,
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
    if not perforated_parts(model):
        model = _transform_as(model, header, path)
    _check_fit(model, header, path)
    values = {k.removeprefix("model/"): t for k, t in tensors.items() if k.startswith("model/")}
    parts = perforated_parts(model)
    try:
        optimizer = None if tracker is None else tracker.optimizer
        with restructuring(model, optimizer, None if tracker is None else tracker._schedule):
            model.load_state_dict(values)
            for part_path, part in parts.items():
                part.perforation.draws = header["parts"][part_path]["draws"]
            if tracker is not None:
                tracker.load_state_dict(decode(header["tracker"], tensors))
    except PbfxError as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from error
    if tracker is not None and restore_rng:
        torch.set_rng_state(tensors["rng/cpu"])
        streams = [tensors[k] for k in sorted(tensors) if k.startswith("rng/cuda/")]
        if streams and torch.cuda.is_available() and len(streams) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(streams)
    return model


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, none sharing memory: safetensors stores no
    aliases."""
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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a pbfx checkpoint: {error}. pbfx.load reads what pbfx.save wrote and "
            f"never "
            "unpickles; give a file of torch.save to model.load_state_dict(torch.load(path))"
        ) from error
    if not isinstance(header, dict) or "format" not in header:
        raise CheckpointError(f"{path} is a safetensors file, but pbfx.save did not write it")
    if header["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {header['format']}, this pbfx reads {FORMAT}; update pbfx"
        )
    return header, tensors


def _transform_as(model: nn.Module, header: dict[str, Any], path: Any) -> nn.Module:
    if list(header["parts"]) != [""]:
        raise CheckpointError(
            f"{path} holds a model of which parts were transformed ({', '.join(header['parts'])}); "
            "transform the same parts of yours before pbfx.load"
        )
    part = header["parts"][""]
    # The sites by name stand for a filter function, which is code and is not in the file.
    settings = part["config"] | {"include": tuple(part["sites"]), "exclude": ()}
    return transform(model, Config(**settings))


def _check_fit(model: nn.Module, header: dict[str, Any], path: Any) -> None:
    parts = perforated_parts(model)
    faults = []
    if parts.keys() != header["parts"].keys():
        faults.append(
            f"its perforated parts are {sorted(header['parts'])}, the model's {sorted(parts)}"
        )
    for name in parts.keys() & header["parts"].keys():
        config, saved = parts[name].perforation.config, header["parts"][name]
        sites = {site.name for site in parts[name].perforation.sites}
        missing = sorted(set(saved["dendrites"]) - sites)
        if missing:
            faults.append(f"it has dendrites at {missing}, where the model has no site")
        for setting in ("activation", "learning"):
            theirs, ours = saved["config"][setting], getattr(config, setting)
            if theirs != ours:
                faults.append(f"its {setting} is {theirs!r}, the model's {ours!r}")
    if faults:
        raise CheckpointError(f"{path} does not fit the model: " + "; ".join(faults))
