"""From a model that has grown to one for inference."""

from __future__ import annotations

import copy
import logging
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from pbfx.absorbed import release
from pbfx.capture import python_modules, redirect, shared_clone
from pbfx.errors import ConfigError, RestructureError
from pbfx.kept import ATTRIBUTE
from pbfx.lowered import LoweredModule
from pbfx.parts import parts_of
from pbfx.passes.context import PassContext
from pbfx.perforated import PerforatedModule, perforated_parts
from pbfx.phase import Phase
from pbfx.pipeline import LOWERING, run_passes

logger = logging.getLogger(__name__)


def lower(model: nn.Module, *, fold_norms: bool = True, portable: bool = False) -> nn.Module:
    """Return `model` for inference: soma and dendrites in one product, norms folded in.

        y = x [W; V_1; ...; V_D]ᵀ + [b; c_1; ...; c_D]; then the cascade and the sum, element-wise

    The weights of a site are stacked once and not at every call; a batch norm behind an op is
    folded into them. Dropouts, candidates, training flags, and dendrites that reach no soma are
    gone. The result computes what `model.eval()` does, to rounding, on any device, and what
    `torch.export` makes of it holds no op of pbfx.

    Where the model lies on a GPU that has the *fused* kernel for a linear op, the weights of that
    op are laid out for the kernel. So lower the model where, and in the dtype in which, it will
    run.

    A model that was captured whole, or by export, becomes an `fx.GraphModule`. One that was
    captured by parts becomes a copy of itself with its parts lowered. Either way `model` is left as
    it is. What is stacked or folded is a copy, and all other parameters and buffers are shared.

    Args:
        model: with perforated parts, in either phase and mode; a `torch.compile`d one is lowered as
            what it wraps.
        fold_norms: whether to fold batch norms.
        portable: whether to lay all weights out as every device and compiler likes them, whatever
            the model lies on: what to export for other machines.

    Returns:
        The lowered model. `train()` has no effect on its graphs, and their packed parameters
        require no gradients. The gradient to its input is that of the function, where a perforated
        model passes none through dendrites.

    Raises:
        ConfigError: if `model` is no module.
        RestructureError: if it has no perforated parts, or has been lowered already.
        PassError: if a pass fails.
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise ConfigError(f"pbfx.lower: model must be an nn.Module instance, got {given}")
    return lower_with_reports(model, fold_norms, portable)[0]


class LoweredPart(NamedTuple):
    """One lowered graph, by the path of the perforated one whose place it took."""

    path: str
    module: LoweredModule


def lower_with_reports(
    model: nn.Module, fold_norms: bool = True, portable: bool = False
) -> tuple[nn.Module, list[LoweredPart]]:
    """Return what `lower` returns, and its graphs, the outer ones first."""
    model = getattr(model, "_orig_mod", model)
    if not perforated_parts(model) and any(isinstance(m, LoweredModule) for m in model.modules()):
        raise RestructureError(
            f"pbfx.lower: {type(model).__name__} has been lowered already; lower the model that it "
            "came from"
        )
    parts_of(model)
    root = shared_clone(model)
    # A clone shares them with the model, and their mode is not the model's to change.
    scripts = [m for m in root.modules() if isinstance(m, torch.jit.ScriptModule)]
    redirect(list(root.modules()), {id(m): copy.deepcopy(m).eval() for m in scripts})
    for module in python_modules(root).values():
        module.__dict__["training"] = False
        module.__dict__.pop(ATTRIBUTE, None)
    for module in list(root.modules()):
        if parametrize.is_parametrized(module):
            _settle(module)
    lowered: list[LoweredPart] = []
    # The inner ones first, because a graph takes over the modules that it calls.
    for path, part in sorted(
        perforated_parts(root).items(), key=lambda item: item[0].count(".") + bool(item[0])
    )[::-1]:
        # A whole model is its graph; code around a part may want more of it.
        kind = part.perforation.kind if path else None
        module = _lower_part(part, kind, fold_norms, portable)
        lowered.insert(0, LoweredPart(path, module))
        redirect(list(root.modules()), {id(part): module})
        root = module if part is root else root
        logger.info("lowered %s: %s", path or type(part).__name__, _summary(module))
    return root, lowered


def _lower_part(
    part: PerforatedModule, kind: type[nn.Module] | None, fold_norms: bool, portable: bool
) -> LoweredModule:
    perforation, name = part.perforation, type(part).__name__
    release(part, perforation.absorbed)
    work = fx.GraphModule(nn.Module(), fx.Graph(), name)
    for state in ("_parameters", "_buffers", "_modules"):
        work.__dict__[state] = part.__dict__[state]
    work.__dict__["training"] = False
    graph = fx.Graph(owning_module=work)
    graph.output(graph.graph_copy(perforation.source, {}))
    work._graph = graph
    ctx = PassContext(
        perforation.sites, Phase.NEURON, lowering=True, fold_norms=fold_norms, portable=portable
    )
    records = run_passes(work, ctx, LOWERING)
    for site in perforation.sites:
        # A soma that stayed a call would bring them along. Their tensors are the model's.
        owner, _, attribute = site.dendrites.rpartition(".")
        part.get_submodule(owner)._modules.pop(attribute, None)
    return LoweredModule.over(part.original(), graph, name, kind, records, ctx.notes)


@torch.no_grad()
def _settle(module: nn.Module) -> None:
    """Compute the parametrized tensors of a clone once, and let it be of its own class again."""
    own = parametrize.type_before_parametrizations(module)
    lists = module._modules.pop("parametrizations")
    assert isinstance(lists, nn.ModuleDict)
    values = {}
    for name, parametrization in lists.items():
        assert isinstance(parametrization, parametrize.ParametrizationList)
        # The original may be what comes out.
        values[name] = parametrization().detach().clone()
    object.__setattr__(module, "__class__", own)
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    # Those that load the keys of an older spelling into what is no more.
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "hook", hook).__module__.startswith("torch.nn.utils."):
            del hooks[key]


def _summary(module: LoweredModule) -> str:
    made = [f"{record.rewrites} by {record.name}" for record in module.records if record.rewrites]
    return f"{len(module.graph.nodes)} nodes; rewrites: {', '.join(made) or 'none'}"
