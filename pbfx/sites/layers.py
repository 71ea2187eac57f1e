"""Linear and conv layers called as modules."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from pbfx.paths import join
from pbfx.sites.site import Padding, Site, Skipped, convolution_form
from pbfx.sites.unfold import UNFOLDABLE, why_folded
from pbfx_kernels import LINEAR, Geometry

MODULES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
# The helpers that these classes compute through.
_HELPERS = ("forward", "_conv_forward", "_output_padding")


def is_site_module(module: nn.Module) -> bool:
    """Return whether `module` computes what one of the supported classes does.

    The layers of quantisation-aware training do, with a weight that is rounded first.
    """
    kind = type(module)
    rounds = kind.__module__.startswith("torch.ao.nn.qat.")
    return "forward" not in module.__dict__ and any(
        isinstance(module, base)
        and (
            rounds
            or all(getattr(kind, name, None) is getattr(base, name, None) for name in _HELPERS)
        )
        for base in MODULES
    )


def describe_module(module: nn.Module, path: str, node: fx.Node) -> Site | Skipped | None:
    """Return the site that a call of `module` at `path` is, why it is none, or None."""
    kind = type(module).__name__
    if not is_site_module(module):
        quantised = type(module).__module__.startswith("torch.ao.nn.")
        owns = quantised or next(module.parameters(), None) is not None
        return Skipped(path, kind, why_no_layer(module, node)) if owns else None
    assert isinstance(module, tuple(MODULES))
    home, reason = find_home(module)
    # A transposed convolution may also be given the size of its output.
    most = 2 if isinstance(module, TRANSPOSED) else 1
    if not reason and not 1 <= len(node.args) + len(node.kwargs) <= most:
        reason = "it is called with more than one argument"
    if not reason and hasattr(module, "dendrites"):
        reason = "it has an attribute named 'dendrites' already"
    if reason:
        return Skipped(path, kind, reason)
    geometry, padding = module_form(module)
    bias = module._parameters.get("bias")
    return Site(
        name=path,
        op=next(op for base, op in MODULES.items() if isinstance(module, base)),
        weight=join(path, "weight"),
        home=join(path, home),
        shape=weight_shape(module),
        bias=None if bias is None else join(path, "bias"),
        biased=getattr(module, "bias", None) is not None,
        dendrites=join(path, "dendrites"),
        geometry=geometry,
        padding=padding,
    )


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of the weight of a linear or conv module, without computing the weight."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED))
    sides = [module.out_channels, module.in_channels]
    if isinstance(module, TRANSPOSED):
        sides.reverse()
    return sides[0], sides[1] // module.groups, *module.kernel_size


def module_form(module: nn.Module) -> tuple[Geometry, Padding | None]:
    """Return the geometry of a linear or conv module, and what has to be padded before its op."""
    if isinstance(module, nn.Linear):
        return LINEAR, None
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED))
    return convolution_form(
        tuple(module.kernel_size),
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.padding_mode,
        module.output_padding if isinstance(module, TRANSPOSED) else None,
    )


def find_home(module: nn.Module) -> tuple[str, str | None]:
    """Return the name of the parameter that a layer's weight is or is made from.

    Dendrites read what the soma reads, so it makes no difference to them how the soma's weight
    comes about: by a parametrization, a hook (the older weight_norm), or fake quantisation.

    Returns:
        The name, and the reason why there is none that could be a soma's.
    """
    if module._parameters.get("weight") is not None:
        return "weight", why_ineligible(module._parameters["weight"])
    made_from = {name: p for name, p in module.named_parameters() if "weight" in name}
    shape = weight_shape(module)
    for name in sorted(made_from, key=lambda name: made_from[name].shape != shape):
        return name, why_ineligible(made_from[name])
    return "weight", why_ineligible(None)


def why_ineligible(weight: Any) -> str | None:
    """Return why this weight cannot be a soma's, or None."""
    if not isinstance(weight, nn.Parameter):
        return "its weight is no parameter and is not made from one (a buffer, or quantised)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, and dendrites need a floating-point one"
    return None


def why_no_layer(module: nn.Module, node: fx.Node | None = None) -> str:
    """Return why a layer that is neither linear nor conv carries no dendrites.

    Args:
        module: the layer.
        node: its call, or None where a forward that is not captured calls it.
    """
    if isinstance(module, UNFOLDABLE):
        outside = "its linear maps run inside one call, and what calls it is not captured"
        return (None if node is None else why_folded(module, node)) or outside
    if isinstance(module, _TRANSFORMERS):
        return (
            "its forward branches on values, so that it stays one call; the layers inside it can "
            "carry dendrites where they are transformed by themselves"
        )
    if isinstance(module, nn.RNNBase):
        return (
            "it runs all its steps inside one op, where no dendrite can join; its cell form "
            "(nn.LSTMCell, nn.GRUCell, nn.RNNCell) can carry them"
        )
    if type(module).__module__.startswith("torch.ao.nn.quantized."):
        return "its weight is quantised, and dendrites need a floating-point one"
    return "not a linear or conv operation"
