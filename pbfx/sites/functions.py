"""Linear and conv ops called as functions over a module's parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pbfx.paths import join
from pbfx.sites.layers import MODULES, why_ineligible
from pbfx.sites.site import Site, Skipped, convolution_form, leaves
from pbfx_kernels import LINEAR

aten = torch.ops.aten

FUNCTIONS: dict[Callable[..., Any], str] = {
    F.linear: "linear",
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
    F.conv_transpose1d: "conv_transpose1d",
    F.conv_transpose2d: "conv_transpose2d",
    F.conv_transpose3d: "conv_transpose3d",
    # What torch.export makes of them; places and names of the arguments are the same.
    aten.linear.default: "linear",
    aten.conv1d.default: "conv1d",
    aten.conv1d.padding: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv2d.padding: "conv2d",
    aten.conv3d.default: "conv3d",
    aten.conv3d.padding: "conv3d",
    aten.conv_transpose1d.default: "conv_transpose1d",
    aten.conv_transpose2d.input: "conv_transpose2d",
    aten.conv_transpose3d.input: "conv_transpose3d",
}
# Positional arguments of torch's, in order; what is left out has the value of `_DEFAULTS`.
_LINEAR = ("input", "weight", "bias")
_CONV = (*_LINEAR, "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_LINEAR, "stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS: dict[str, Any] = {
    "bias": None,
    "stride": 1,
    "padding": 0,
    "output_padding": 0,
    "dilation": 1,
    "groups": 1,
}


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a linear or conv function, its arguments by name."""

    op: str
    arguments: dict[str, Any]

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.op.startswith("conv_transpose")

    @property
    def weight(self) -> str | None:
        """Path of the weight, or None where it is computed."""
        weight = self.arguments.get("weight")
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return None
        return str(weight.target)


def read_call(node: fx.Node) -> Call | None:
    """Return what `node` calls if that is a linear or conv function."""
    op = FUNCTIONS.get(node.target) if callable(node.target) else None
    if node.op != "call_function" or op is None:
        return None
    names = _TRANSPOSED if op.startswith("conv_transpose") else _CONV
    return Call(op, _DEFAULTS | dict(zip(names, node.args, strict=False)) | node.kwargs)


def read_input(node: fx.Node) -> fx.Node:
    """Return the node that a call of a soma, or of any layer, reads."""
    call = read_call(node)
    if call is not None:
        value = call.arguments["input"]
    else:
        value = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(value, fx.Node)
    return value


def soma_weight(node: fx.Node) -> str | None:
    """Return the path of the weight that `node` computes with, if it may be the call of a soma.

    The path of a site's weight is found at that site's somas and nowhere else.
    """
    if node.op == "call_module":
        return join(str(node.target), "weight")
    call = read_call(node)
    return None if call is None else call.weight


def describe_function(root: nn.Module, node: fx.Node, call: Call) -> Site | Skipped:
    """Return the site that a call of a function is, or why it is none."""
    path, arguments = call.weight, call.arguments
    if path is None:
        return Skipped(node.name, call.op, "its weight is computed, not a parameter")
    owner_path, _, attribute = path.rpartition(".")
    owner = root.get_submodule(owner_path)
    weight = getattr(owner, attribute)
    # The function then stands for a call of the module itself.
    stands_for_module = attribute == "weight" and isinstance(owner, tuple(MODULES))
    name = owner_path if stands_for_module else path
    dendrites = join(owner_path, "dendrites") if stands_for_module else f"{path}_dendrites"
    reason = why_ineligible(weight)
    form = [arguments[key] for key in _DEFAULTS if key != "bias"]
    if not reason and any(isinstance(leaf, fx.Node) for value in form for leaf in leaves(value)):
        reason = "its stride, padding, dilation or groups are computed from the input"
    if not reason and hasattr(owner, dendrites.rpartition(".")[2]):
        reason = "its owner has an attribute of the name that its dendrites would take"
    if reason:
        return Skipped(name, call.op, reason)
    assert isinstance(weight, Tensor)
    geometry, padding = LINEAR, None
    if call.op != "linear":
        geometry, padding = convolution_form(
            tuple(weight.shape[2:]),
            arguments["stride"],
            arguments["padding"],
            arguments["dilation"],
            arguments["groups"],
            output_padding=arguments["output_padding"] if call.transposed else None,
        )
    bias = arguments["bias"]
    known = isinstance(bias, fx.Node) and bias.op == "get_attr"
    return Site(
        name=name,
        op=call.op,
        weight=path,
        home=path,
        shape=tuple(weight.shape),
        bias=str(bias.target) if known else None,
        biased=bias is not None,
        dendrites=dendrites,
        geometry=geometry,
        padding=padding,
    )
