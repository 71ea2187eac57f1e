"""From a plain model to one that can grow dendrites."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pbfx.assembly import Plan, assemble, make_plan
from pbfx.capture import Example, capture
from pbfx.config import Config
from pbfx.errors import CaptureError, ConfigError
from pbfx.perforated import hides, perforated_parts
from pbfx.sites import choose_sites, folded_weights, is_op

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
    Other methods then still see the dendrites of modules that they call, but not of single layers.

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
    plan = _plan(model, config, _example(config, example_inputs, dynamic_shapes))
    if not any(plan.chosen.values()):
        reasons = [f"{path} ({op}): {reason}" for path, op, reason in plan.left_out()]
        raise CaptureError(
            f"{type(model).__name__} has no linear or conv operation that can carry dendrites"
            + (f". Left out: {'; '.join(reasons)}" if reasons else "")
        )
    for path, op, reason in plan.left_out():
        logger.info("no dendrites at %s (%s): %s", path, op, reason)
    return assemble(plan, config)


def look_alike(model: nn.Module, config: Config | None = None) -> nn.Module:
    """Return what `transform` returns, also where that has nothing to grow on.

    Args:
        model: see transform.
        config: see transform.

    Raises:
        CaptureError: if the model cannot be cloned.
        ConfigError: see transform.
    """
    config = Config() if config is None else config
    _check_arguments(model, config)
    return assemble(_plan(model, config), config)


def _plan(model: nn.Module, config: Config, example: Example | None = None) -> Plan:
    captured = capture(model, is_op, hides, example)
    folded = folded_weights(captured.root)
    return make_plan(captured, lambda parts: choose_sites(parts, config, folded))


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
                "pbfx.transform: example_inputs and dynamic_shapes are for torch.export; ask for "
                'it with pbfx.Config(capture="export"), or leave them out'
            )
        return None
    if isinstance(inputs, torch.Tensor) or not isinstance(inputs, (tuple, list, Mapping)):
        got = "a tensor" if isinstance(inputs, torch.Tensor) else repr(inputs)
        raise ConfigError(
            'pbfx.transform: capture="export" needs example_inputs, a tuple of positional '
            f"arguments such as (x,), or a dict of arguments by name, got {got}"
        )
    return Example(inputs if isinstance(inputs, Mapping) else tuple(inputs), dynamic_shapes)
