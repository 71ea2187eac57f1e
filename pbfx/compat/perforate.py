"""From a plain model to a perforated one with its tracker; files; and what scripts do around it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

import pbfx
from pbfx import CheckpointError, ConfigError
from pbfx.compat.accepted import accept_dimensions
from pbfx.compat.hints import narration, speak
from pbfx.compat.owners import give, latest_or_none, tracker_of
from pbfx.compat.places import chosen_modules, replace_modules
from pbfx.compat.rival_files import load_perforatedai
from pbfx.compat.store import PAIConfig, Settings
from pbfx.compat.switching import CAPACITY, config_of, learning_of
from pbfx.compat.tracker import ScriptTracker

# Files that the tracker keeps up to date, by the names that scripts load them by.
_KEPT = {"best_model": "best", "latest": "last", "final_clean_pai": "best"}


def _dendrites() -> int:
    tracker = latest_or_none()
    return 0 if tracker is None else tracker.dendrites


# One set of settings for each dialect, as each has defaults of its own.
snake_settings = Settings(camel=False, dendrites=_dendrites)
camel_settings = Settings(camel=True, dendrites=_dendrites)
pc = PAIConfig(snake_settings)


def perforate(
    model: nn.Module,
    settings: Settings,
    *,
    doing: bool = True,
    save_name: str = "",
    making_graphs: bool = True,
    maximizing_score: bool | None = None,
) -> nn.Module:
    """Return what `model` computes as a module that can grow dendrites, and make its tracker.

    Args:
        model: any module; it stays as it is.
        settings: of the script's dialect; its lists of modules and its mode of learning are read
            now, everything else when it is needed.
        doing: whether to grow at all.
        save_name: the folder of the run.
        making_graphs: whether to draw the run when it is complete.
        maximizing_score: whether a larger score is better; None for what the settings say.

    Raises:
        CaptureError: if no layer can carry dendrites; says why.
        ConfigError: if the settings leave none, or cannot be honoured.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"pbfx.compat: the model must be an nn.Module instance, got {model!r}")
    model = replace_modules(model, settings)
    chosen = chosen_modules(model, settings)
    for path in chosen.paths:
        # Scripts call it on the layers themselves.
        accept_dimensions(model.get_submodule(path))
    perforated = pbfx.transform(model, config_of(settings, chosen))
    if maximizing_score is None:
        maximizing_score = bool(settings.now("maximizing_score"))
    tracker = ScriptTracker(
        perforated,
        settings,
        save_name or settings.value("save_name") or ("PB" if settings.camel else "PAI"),
        maximize=bool(maximizing_score),
        plain=not doing,
        drawing=making_graphs,
    )
    give(perforated, tracker, model)
    speak()
    if doing and not settings.now("silent"):
        narration.info(
            "%s, learning=%r",
            f"a test that grows {CAPACITY} dendrites quickly"
            if settings.now("testing_dendrite_capacity")
            else "an experiment with dendrites",
            learning_of(settings),
        )
    return perforated


def save_system(net: nn.Module, folder: str, name: str) -> None:
    """Write the model and the run so far to `folder/name.safetensors`."""
    target = _file(folder, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    tracker_of(net).save(target)


def save_net(net: nn.Module, folder: str, name: str) -> None:
    """Write the model alone to `folder/name.safetensors`."""
    target = _file(folder, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    tracker_of(net).save(target, with_run=False)


def load_system(
    net: nn.Module,
    folder: str,
    name: str,
    load_from_restart: bool = False,
    switch_call: bool = False,
    load_from_manual_save: bool = False,
) -> nn.Module:
    """Load a file of a run, and go on with the run where the file holds one.

    A `.pt` of `perforatedai` 3.x will do, where there is no file of pbfx; it holds a network only.

    Args:
        net: the model that was perforated.
        folder: of the run.
        name: `"latest"`, `"best_model"`, or what `save_system` was given.
        load_from_restart: not needed: the file says what it holds.
        switch_call: not needed.
        load_from_manual_save: not needed.

    Returns:
        `net` itself.

    Raises:
        CheckpointError: if there is no such file, or it does not fit.
    """
    source = _existing(folder, name)
    tracker = tracker_of(net)
    if source.suffix == ".pt":
        load_perforatedai(source, tracker.model)
    else:
        tracker.load(source, resume=_holds_run(source))
    return net


def load_net(net: nn.Module, folder: str, name: str) -> nn.Module:
    """Load the network of a file and nothing of its run.

    Returns:
        `net` itself.

    Raises:
        CheckpointError: if there is no such file, or it does not fit.
    """
    source = _existing(folder, name)
    if source.suffix == ".pt":
        load_perforatedai(source, tracker_of(net).model)
    else:
        pbfx.load(source, tracker_of(net).model)
    return net


def load_net_from_dict(net: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Load a state dict, growing the model to what it describes.

    Returns:
        `net` itself.
    """
    net.load_state_dict(state_dict)
    return net


def count_params(net: nn.Module) -> int:
    """Return how many parameters the network has, candidates not counted."""
    sites = pbfx.explain(net).sites
    inside = tuple(site.name + end for site in sites for end in (".", "_dendrites."))
    whole = {site.name for site in sites}
    outside = (
        parameter.numel()
        for name, parameter in net.named_parameters()
        if name not in whole and not name.startswith(inside)
    )
    return sum(outside) + sum(site.parameters for site in sites)


def deep_copy(net: nn.Module) -> nn.Module:
    """Return a copy of the model; it has no tracker."""
    return copy.deepcopy(net)


def parameters_of(net: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all layers that can grow, their dendrites' included."""
    sites = tuple(f"{site.name}." for site in pbfx.explain(net).sites)
    return [p for name, p in net.named_parameters() if name.startswith(sites)]


def same_net(net: nn.Module, *ignored: Any, **also_ignored: Any) -> nn.Module:
    """Return `net`: there is no scaffolding that would have to be taken down for inference."""
    return net


def _file(folder: str, name: str) -> Path:
    return Path(folder) / f"{name}.safetensors"


def _existing(folder: str, name: str) -> Path:
    for candidate in (_file(folder, name), _file(folder, _KEPT.get(name, name))):
        if candidate.exists():
            return candidate
    theirs = Path(folder) / f"{name}.pt"
    if theirs.exists():
        return theirs
    known = sorted(path.stem for path in Path(folder).glob("*.safetensors"))
    raise CheckpointError(
        f"there is no file {_file(folder, name)}; that folder has "
        f"{', '.join(known) or 'no files of pbfx'}"
    )


def _holds_run(path: Path) -> bool:
    """Return whether a file of `pbfx.save` holds more than a model."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["pbfx"])["tracker"] is not None
    # What else is wrong with the file, pbfx.load will say.
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return False
