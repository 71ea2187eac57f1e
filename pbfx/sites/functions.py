"""Linear and conv ops called as functions over a module's parameter."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from pbfx.cells import cell_map
from pbfx.paths import join, module_at
from pbfx.sites.layers import MODULES, find_home, is_site_module, weight_shape, why_ineligible
from pbfx.sites.site import Site, Skipped, convolution_form, leaves
from pbfx_kernels import LINEAR

aten = torch.ops.aten

FUNCTIONS: dict[Callable[..., Any], str] = {
    F.linear: "linear",
    # The linear maps of a recurrent cell that is taken apart.
    cell_map: "linear",
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


# `x @ W` in its spellings: where x, W and what is added to the product stand.
_PRODUCTS: dict[Any, tuple[int, int, int | None]] = {
    torch.matmul: (0, 1, None),
    torch.mm: (0, 1, None),
    operator.matmul: (0, 1, None),
    torch.addmm: (1, 2, 0),
    "matmul": (0, 1, None),
    "mm": (0, 1, None),
    "__matmul__": (0, 1, None),
    "addmm": (1, 2, 0),
    aten.matmul.default: (0, 1, None),
    aten.mm.default: (0, 1, None),
    aten.addmm.default: (1, 2, 0),
}
_KEYWORDS = ("mat1", "input"), ("mat2", "other", "tensor"), ("input",)
_TRANSPOSES = frozenset({"t", torch.t, aten.t.default, aten.mT.default, aten.numpy_T.default})
_SWAPPED = frozenset({(0, 1), (1, 0), (-1, -2), (-2, -1), (0, -1), (-1, 0), (-2, 1), (1, -2)})


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a linear or conv function, its arguments by name.

    Attributes:
        op: linear, conv1d, ...; every matrix product is linear.
        arguments: by the names that `F.linear` and the convolutions give them.
        weight: path of the weight, or None where it is computed.
        input_first: whether the weight is stored (K, N).
        matrix: whether the op takes a matrix only.
    """

    op: str
    arguments: dict[str, Any]
    weight: str | None
    input_first: bool = False
    matrix: bool = False

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.op.startswith("conv_transpose")


def read_call(node: fx.Node) -> Call | None:
    """Return what `node` calls if that is a linear or conv function, or x @ W by a parameter W."""
    if node.op == "call_function" and node.target in FUNCTIONS:
        op = FUNCTIONS[node.target]  # pyright: ignore[reportArgumentType]
        names = _TRANSPOSED if op.startswith("conv_transpose") else _CONV
        arguments = _DEFAULTS | dict(zip(names, node.args, strict=False)) | node.kwargs
        path, flipped = _read_parameter(arguments.get("weight"))
        if flipped and op != "linear":
            path = None
        return Call(op, arguments, path, flipped, op == "linear")
    if node.op not in ("call_function", "call_method") or node.target not in _PRODUCTS:
        return None
    arguments = dict(_DEFAULTS)
    for name, place, keywords in zip(
        ("input", "weight", "bias"), _PRODUCTS[node.target], _KEYWORDS, strict=True
    ):
        named = [node.kwargs[key] for key in keywords if key in node.kwargs]
        if place is not None and place < len(node.args):
            arguments[name] = node.args[place]
        elif place is not None and named:
            arguments[name] = named[0]
    path, flipped = _read_parameter(arguments.get("weight"))
    # Two values multiplied, as in attention, are no op with parameters.
    known = path is not None and isinstance(arguments.get("input"), fx.Node)
    return Call("linear", arguments, path, not flipped, True) if known else None


def _read_parameter(node: Any) -> tuple[str | None, bool]:
    """Return the path of the attribute that `node` reads, and whether it is then transposed."""
    flipped = False
    while isinstance(node, fx.Node) and is_transpose(node) and isinstance(node.args[0], fx.Node):
        node, flipped = node.args[0], not flipped
    read = isinstance(node, fx.Node) and node.op == "get_attr"
    return (str(node.target), flipped) if read else (None, False)  # pyright: ignore[reportOptionalMemberAccess]


def is_transpose(node: fx.Node) -> bool:
    """Return whether `node` transposes a matrix: `W.t()`, `W.T`, `W.mT`, `W.transpose(0, 1)`."""
    rest = node.args[1:]
    if node.target is getattr:
        return rest[0] in ("T", "mT")
    if node.target in _TRANSPOSES:
        return not rest
    transposes = "transpose", torch.transpose, aten.transpose.int
    return node.target in transposes and tuple(rest) in _SWAPPED


def read_input(node: fx.Node) -> fx.Node:
    """Return the node that a call of a soma, or of any layer, reads."""
    call = read_call(node)
    if call is not None:
        value = call.arguments["input"]
    else:
        value = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(value, fx.Node)
    return value


def soma_weight(root: nn.Module, node: fx.Node) -> str | None:
    """Return the path of the weight with which `node` computes a linear or conv op, or None.

    The path of a site's weight is found at that site's somas and nowhere else.
    """
    if node.op == "call_module":
        # An embedding may own the same weight, and computes something else with it.
        is_soma = is_site_module(module_at(root, str(node.target)))
        return join(str(node.target), "weight") if is_soma else None
    call = read_call(node)
    return None if call is None else call.weight


def describe_function(root: nn.Module, node: fx.Node, call: Call) -> Site | Skipped:
    """Return the site that a call of a function is, or why it is none."""
    path, arguments = call.weight, call.arguments
    if path is None:
        return Skipped(node.name, call.op, "its weight is computed, not a parameter")
    owner_path, _, attribute = path.rpartition(".")
    owner = module_at(root, owner_path)
    # The function then stands for a call of the module itself.
    stands_for_module = attribute == "weight" and isinstance(owner, tuple(MODULES))
    name = owner_path if stands_for_module else path
    dendrites = join(owner_path, "dendrites") if stands_for_module else f"{path}_dendrites"
    if stands_for_module and owner._parameters.get(attribute) is None:
        # Not read: a parametrization may update its state whenever it computes a weight.
        shape = weight_shape(owner)
        home, reason = find_home(owner)
        home = join(owner_path, home)
    else:
        weight = getattr(owner, attribute)
        home, reason, shape = path, why_ineligible(weight), tuple(weight.shape)
    if not reason and call.matrix and len(shape) != 2:
        reason = f"its weight has {len(shape)} axes, and dendrites need a matrix"
    if call.transposed and isinstance(arguments["output_padding"], fx.Node):
        # The dendrites see by the soma's output what was added to it.
        arguments = arguments | {"output_padding": 0}
    form = [arguments[key] for key in _DEFAULTS if key != "bias"]
    if not reason and any(isinstance(leaf, fx.Node) for value in form for leaf in leaves(value)):
        reason = "its stride, padding, dilation or groups are computed from the input"
    if not reason and hasattr(owner, dendrites.rpartition(".")[2]):
        reason = "its owner has an attribute of the name that its dendrites would take"
    if reason:
        return Skipped(name, call.op, reason)
    geometry, padding = LINEAR, None
    if call.op != "linear":
        geometry, padding = convolution_form(
            shape[2:],
            arguments["stride"],
            arguments["padding"],
            arguments["dilation"],
            arguments["groups"],
            output_padding=arguments["output_padding"] if call.transposed else None,
        )
    bias: Any = arguments["bias"]
    known = isinstance(bias, fx.Node) and bias.op == "get_attr"
    return Site(
        name=name,
        op=call.op,
        weight=path,
        home=home,
        shape=shape,
        bias=str(bias.target) if known else None,
        biased=bias is not None,
        dendrites=dendrites,
        geometry=geometry,
        padding=padding,
        input_first=call.input_first,
    )
