"""The backend itself: lower the graph that Dynamo captured, and hand it to a compiler.

    Dynamo's graph  ->  lower_dendrites  ->  Inductor, whole or region by region

A graph without dendrites goes to Inductor as it is. Parameters are made by `pbfx.transform` and
never here: Dynamo lifts them to inputs, and an optimizer would not see what a backend added.
"""

from __future__ import annotations

import collections
import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from pbfx.backend.out_of_place import put_out_of_place
from pbfx.backend.regions import compile_regions, forget_regions
from pbfx.backend.settings import Compiled, Settings, settings_of
from pbfx.backend.sources import keep_sources
from pbfx.passes.lower_dendrites import LoweringContext, lower_dendrites
from pbfx.pipeline import run_passes

logger = logging.getLogger(__name__)

# In the order in which they run.
LOWERING = (lower_dendrites,)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a graph of Dynamo's; `torch.compile(model, backend="pbfx")` calls it.

    Args:
        gm: the graph; it is left as it is.
        example_inputs: what it will be called with, fake.
        mode: `"default"`, `"reduce-overhead"`, `"max-autotune"` or
            `"max-autotune-no-cudagraphs"`, as Inductor takes them.
        options: `strategy` (`"auto"`, `"kernel"`, `"packed"`, `"looped"`), `precision` of the
            dendrites' products (`"soma"`, `"bfloat16"`, `"float16"`), `regional` (True compiles
            blocks apart, `"sites"` the dendrites of each site and what lies between, equal ones
            once, and after a growth only those that changed), `compiler` (`"inductor"`,
            `"aot_eager"`, `"eager"`), `mode`, since torch takes either `mode` or `options`;
            everything else is Inductor's.

    Returns:
        The compiled graph.

    Raises:
        ConfigError: if an option is unknown or has a value it cannot have. Dynamo wraps it.
        PassError: if lowering fails; nothing has been compiled, and the model still runs eagerly.
    """
    settings = settings_of(mode, options)
    lowered = lower(gm, example_inputs, settings)
    if settings.regional:
        return compile_regions(lowered, example_inputs, settings)
    return settings.inner(lowered, example_inputs)


def lower(gm: fx.GraphModule, example_inputs: list[Any], settings: Settings) -> fx.GraphModule:
    """Return `gm` with each dendrites op in its best form; `gm` itself where there is none.

    For regions, what it does in place is put out of place too.
    """
    op = torch.ops.pbfx.dendrites.default
    passes = LOWERING if any(node.target is op for node in gm.graph.nodes) else ()
    if settings.regional:
        passes = (put_out_of_place, *passes)
    if not passes:
        return gm
    learns = any(isinstance(value, Tensor) and value.requires_grad for value in example_inputs)
    training = learns and torch.is_grad_enabled()
    context = LoweringContext(settings.strategy, settings.products, training)
    lowered = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    ours, theirs = (graph.find_nodes(op="placeholder") for graph in (lowered.graph, gm.graph))
    keep_sources(gm, lowered, ours, theirs)
    run_passes(lowered, context, passes)
    lowered.recompile()
    if not context.records:
        return lowered
    forms = collections.Counter(record.form for record in context.records.values())
    logger.info(
        "lowered %d sites for %s: %s",
        sum(forms.values()),
        "training" if training else "inference",
        ", ".join(f"{count} {form}" for form, count in sorted(forms.items())),
    )
    for record in context.records.values():
        logger.debug("%s: %s, %s", record.site, record.form, record.reason)
    return lowered


def _reset() -> None:
    """Forget compiled regions; `torch.compiler.reset` calls it through torch's own wrapper."""
    forget_regions()


compile_graph.reset = _reset  # pyright: ignore[reportFunctionMemberAccess]
