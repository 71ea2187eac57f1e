"""From a plain model to one that can grow dendrites."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pbfx.capture import Capture, Example, Rung, capture, redirect
from pbfx.config import Config
from pbfx.errors import CaptureError, ConfigError
from pbfx.kept import ATTRIBUTE, Kept
from pbfx.paths import join
from pbfx.perforated import PerforatedModule, Perforation, hides, perforated_parts
from pbfx.sites import Site, Skipped, choose_sites, describe_sites, is_site_module

logger = logging.getLogger(__name__)

# Wrappers that must come after the transform, because they look at the parameters when they are
# made.
_WRAPPERS = (
    "OptimizedModule",
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
)


def transform(
    model: nn.Module,
    config: Config | None = None,
    *,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> nn.Module:
    """Return a module that computes what `model` computes, and can grow dendrites.

    It shares the parameters and buffers of `model`, is an instance of the same class, has the same
    state-dict keys, and gives bit-identical outputs until dendrites carry weight. `model` itself is
    left as it is.

    The model is captured whole where symbolic tracing allows it and its class offers no more than
    `forward`. Otherwise it keeps its own forward and methods, and the largest modules inside that
    can be captured are, down to single linear and conv layers; `pbfx.explain` tells which and why.

    With `Config(capture="export")` torch.export captures it as one graph instead, for calls like
    the example: of its structure and dtypes, and of all sizes that `forward` does not ask about.
    Then only `forward` computes with dendrites, not what other methods do with the layers.

    Args:
        model: any module.
        config: where and how to grow; `Config()` if None.
        example_inputs: for `capture="export"`, what to call the model with: positional arguments as
            a tuple, or a dict of arguments by name.
        dynamic_shapes: for `capture="export"`, which sizes may change, as torch.export takes it;
            None for all sizes that can.

    Returns:
        The perforated module. Train it, save it and compile it in place of `model`.

    Raises:
        CaptureError: if no op can carry dendrites, or the model cannot be cloned; says why.
        ConfigError: if an argument is not what it should be, or a pattern matches nothing.
    """
    config = Config() if config is None else config
    _check_arguments(model, config)
    example = _example(config, example_inputs, dynamic_shapes)
    name = type(model).__name__
    captured = capture(model, is_site_module, hides, example)
    described = {
        path: describe_sites(part.root, part.graph) for path, part in captured.parts.items()
    }
    # An op that is a part of its own is no site of the graph that calls it.
    own = {id(part.root): path for path, part in captured.parts.items()}
    sites = {
        path: tuple(
            site
            for site in found
            if own.get(id(_owner(captured.parts[path].root, site)), path) == path
        )
        for path, (found, _) in described.items()
    }
    skipped = {path: left for path, (_, left) in described.items()}
    roots = {path: part.root for path, part in captured.parts.items()}
    choice = choose_sites({path: (roots[path], sites[path]) for path in roots}, config)
    chosen = {path: kept for path, (kept, _) in choice.items()}
    skipped = {
        path: (*(_left_for(captured, path, s) for s in skipped[path]), *choice[path][1])
        for path in roots
    }
    outside = _outside(captured)
    if not any(chosen.values()):
        reasons = [
            f"{join(path, s.name)} ({s.op}): {s.reason}"
            for path, found in (skipped | outside).items()
            for s in found
        ]
        raise CaptureError(
            f"{name} has no linear or conv operation that can carry dendrites"
            + (f". Left out: {'; '.join(reasons)}" if reasons else "")
        )
    return _assemble(captured, chosen, skipped, outside, config)


def _check_arguments(model: nn.Module, config: Config) -> None:
    if not isinstance(config, Config):
        raise ConfigError(f"pbfx.transform: config must be a pbfx.Config, got {config!r}")
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise ConfigError(f"pbfx.transform: model must be an nn.Module instance, got {given}")
    if type(model).__name__ in _WRAPPERS:
        raise ConfigError(
            f"pbfx.transform: apply it before {type(model).__name__} wraps the model, to the plain "
            "one"
        )
    for path in perforated_parts(model):
        raise ConfigError(
            f"pbfx.transform: the model is perforated already (at {path or 'its root'!r})"
        )


def _example(config: Config, inputs: Any, dynamic_shapes: Any) -> Example | None:
    if config.capture == "trace":
        if inputs is not None or dynamic_shapes is not None:
            raise ConfigError(
                "pbfx.transform: example_inputs and dynamic_shapes are for torch.export; ask for it "
                'with pbfx.Config(capture="export"), or leave them out'
            )
        return None
    if isinstance(inputs, torch.Tensor) or not isinstance(inputs, (tuple, list, Mapping)):
        got = "a tensor" if isinstance(inputs, torch.Tensor) else repr(inputs)
        raise ConfigError(
            'pbfx.transform: capture="export" needs example_inputs, a tuple of positional arguments '
            f"such as (x,), or a dict of arguments by name, got {got}"
        )
    return Example(inputs if isinstance(inputs, Mapping) else tuple(inputs), dynamic_shapes)


def _owner(root: nn.Module, site: Site) -> nn.Module:
    return root.get_submodule(site.weight.rpartition(".")[0])


def _left_for(captured: Capture, path: str, op: Skipped) -> Skipped:
    """Return `op` of the graph at `path` with the reason for which capture left it, if it did."""
    return dataclasses.replace(op, reason=captured.left.get(join(path, op.name), op.reason))


def _outside(captured: Capture) -> dict[str, tuple[Skipped, ...]]:
    """Return the layers that forwards of their own call and that cannot grow, by their owner."""
    climbed = captured.parts.keys() | captured.kept.keys()
    found: dict[str, tuple[Skipped, ...]] = {}
    for path in captured.kept:
        layers = {
            name: child
            for name, child in captured.root.get_submodule(path).named_children()
            if next(child.parameters(), None) is not None
        }
        found[path] = tuple(
            _left_for(
                captured, path, Skipped(name, type(m).__name__, "not a linear or conv operation")
            )
            for name, m in layers.items()
            if not any(f"{known}.".startswith(f"{join(path, name)}.") for known in climbed)
        )
    return found


def _assemble(
    captured: Capture,
    chosen: dict[str, tuple[Site, ...]],
    skipped: dict[str, tuple[Skipped, ...]],
    outside: dict[str, tuple[Skipped, ...]],
    config: Config,
) -> nn.Module:
    """Put a perforated module in the place of each captured one that has sites."""
    for path, found in (skipped | outside).items():
        for op in found:
            logger.info("no dendrites at %s (%s): %s", join(path, op.name), op.op, op.reason)
    for path, reason in captured.kept.items():
        module = captured.root.get_submodule(path)
        module.__dict__[ATTRIBUTE] = Kept(reason, outside.get(path, ()))
    places: dict[int, nn.Module] = {}
    for path, part in captured.parts.items():
        if chosen[path]:
            perforation = Perforation(
                part.graph, chosen[path], skipped[path], config, path, part.rung, part.reason
            )
            places[id(part.root)] = PerforatedModule.over(part.root, perforation)
        elif part.rung is not Rung.OP:
            part.root.__dict__[ATTRIBUTE] = Kept("no op in it can grow", skipped[path])
    redirect([*captured.root.modules(), *places.values()], places)
    return places.get(id(captured.root), captured.root)
