"""Which parameters of a model belong to linear and conv ops, and which of them can grow."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from pbfx.paths import join
from pbfx.perforated import PerforatedModule
from pbfx.sites import Site

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# Layers that multiply by weights of their own, and what those are called. Recurrent layers of
# several steps are neither linear nor conv.
_COMPOUNDS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("in_proj_", "q_proj_", "k_proj_", "v_proj_"),
    nn.RNNCellBase: ("weight_", "bias_"),
}


def linear_conv_parameters(model: nn.Module) -> dict[str, dict[int, nn.Parameter]]:
    """Return the parameters of every linear and conv layer in `model` by the layer's path.

    Parametrized layers have what their weight is computed from. Layers that a forward never calls
    are among them.

    Args:
        model: any module.

    Returns:
        For each layer its parameters by identity, as tied ones are to be counted once.
    """
    found: dict[str, dict[int, nn.Parameter]] = {}
    for path, module in model.named_modules():
        own = {id(p): p for p in layer_parameters(module)}
        if own:
            found[path] = own
    return found


def layer_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield what `module` itself, as a linear or conv layer, computes with."""
    if isinstance(module, LAYERS):
        yield from module.parameters(recurse=False)
        computed = module._modules.get("parametrizations")
        if computed is not None:
            yield from computed.parameters()
    for kind, prefixes in _COMPOUNDS.items():
        if isinstance(module, kind):
            named = module.named_parameters(recurse=False)
            yield from (p for name, p in named if name.startswith(prefixes))


def soma_parameters(part: PerforatedModule, site: Site) -> dict[int, nn.Parameter]:
    """Return by identity what the soma of `site` computes with."""
    owner = part.get_submodule(site.weight.rpartition(".")[0])
    # A weight or bias that is no attribute of a layer, as those of functions.
    own = [part.get_parameter(path) for path in (site.home, site.bias) if path]
    if site.weight == join(site.weight.rpartition(".")[0], "weight"):
        own += layer_parameters(owner)
    return {id(p): p for p in own}
