"""From a plain model to one that can grow dendrites."""

from __future__ import annotations

import logging

from torch import nn

from pbfx.capture import capture
from pbfx.config import Config
from pbfx.errors import CaptureError, ConfigError
from pbfx.perforated import PerforatedModule, Perforation, perforated_parts
from pbfx.sites import choose_sites, describe_sites, is_site_module

logger = logging.getLogger(__name__)

# Wrappers that must come after the transform, because they look at the parameters when they are
# made.
_WRAPPERS = (
    "OptimizedModule",
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
)


def transform(model: nn.Module, config: Config | None = None) -> PerforatedModule:
    """Return a module that computes what `model` computes, and can grow dendrites.

    It shares the parameters and buffers of `model`, has the same state-dict keys, and gives
    bit-identical outputs until dendrites carry weight. `model` itself is left as it is.

    Args:
        model: any module that symbolic tracing can capture whole.
        config: where and how to grow; `Config()` if None.

    Returns:
        The perforated module. Train it, save it and compile it in place of `model`.

    Raises:
        CaptureError: if `forward` cannot be traced, or no op can carry dendrites; says why.
        ConfigError: if an argument is not what it should be, or a pattern matches nothing.
    """
    config = Config() if config is None else config
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
    name = type(model).__name__
    root, graph = capture(model, is_site_module)
    own = {*root.__dict__, *root._modules, *root._parameters, *root._buffers}
    for attribute in sorted(own - set(dir(nn.Module))):
        if attribute == "perforation" or hasattr(PerforatedModule, attribute):
            raise CaptureError(
                f"cannot perforate {name}: its attribute {attribute!r} would hide behind "
                f"PerforatedModule.{attribute}; rename it"
            )
    described, skipped = describe_sites(root, graph)
    sites, unwanted = choose_sites({"": (root, described)}, config)[""]
    skipped += unwanted
    if not sites:
        reasons = "; ".join(f"{s.name} ({s.op}): {s.reason}" for s in skipped)
        raise CaptureError(
            f"{name} has no linear or conv operation that can carry dendrites"
            + (f". Left out: {reasons}" if reasons else "")
        )
    for op in skipped:
        logger.info("no dendrites at %s (%s): %s", op.name, op.op, op.reason)
    return PerforatedModule(root, Perforation(graph, sites, skipped, config), name)
