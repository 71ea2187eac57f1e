"""Find the places in a graph that can carry dendrites, and say why the others cannot.

A site is a linear or conv op whose weight is a parameter. It may be called as a module or as a
function, once or several times; all its calls share one set of dendrites. The dendrites module
nests under the module that owns the weight (`fc1.dendrites`), or beside the parameter when the op
is a function (`head.weight_dendrites`).
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from pbfx.config import Config
from pbfx.errors import ConfigError, nearest
from pbfx.paths import join
from pbfx.topology import reaches_output
from pbfx_kernels import Geometry

MODULES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}
FUNCTIONS: dict[Callable[..., Any], str] = {
    F.linear: "linear",
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
}
_FUNCTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_FUNCTION_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@dataclasses.dataclass(frozen=True)
class Padding:
    """What is added around the input before the op: `F.pad`'s widths (last axis first), mode."""

    widths: tuple[int, ...]
    mode: str


@dataclasses.dataclass(frozen=True)
class Site:
    """One place that can carry dendrites.

    Attributes:
        name: path of the module that owns the weight, or of the parameter itself for a functional
            op.
        op: linear, conv1d, conv2d or conv3d.
        functional: whether the graph calls a function rather than a module.
        weight: path of the soma's weight.
        bias: path of the soma's bias, or None.
        dendrites: path at which the site's dendrites live.
        geometry: stride, padding, dilation, groups.
        padding: what has to be padded before the op, for padding modes that the op does not know.
        calls: how often the graph calls the op.
    """

    name: str
    op: str
    functional: bool
    weight: str
    bias: str | None
    dendrites: str
    geometry: Geometry
    padding: Padding | None = None
    calls: int = 1

    def is_soma(self, node: fx.Node) -> bool:
        """Return whether `node` is a call of this site's soma."""
        if not self.functional:
            return node.op == "call_module" and node.target == self.name
        return (
            node.op == "call_function"
            and node.target in FUNCTIONS
            and _weight_path(node) == self.weight
        )


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An op with parameters that carries no dendrites, and the reason."""

    name: str
    op: str
    reason: str


def is_site_module(module: nn.Module) -> bool:
    """Return whether `module` computes what one of the supported classes does."""
    return "forward" not in module.__dict__ and any(
        isinstance(module, base)
        and type(module).forward is base.forward
        and getattr(type(module), "_conv_forward", None) is getattr(base, "_conv_forward", None)
        for base in MODULES
    )


def read_input(node: fx.Node) -> fx.Node:
    """Return the node that a call of a layer reads: its first argument, or `input`."""
    value = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(value, fx.Node)
    return value


def find_sites(root, graph, config):
    sites, skipped = describe_sites(root, graph)
    chosen, unwanted = choose_sites({"": (root, sites)}, config)
    return chosen[""], (*skipped, *unwanted[""])


def choose_sites(parts, config):
    _check_patterns(config, [join(p, s.name) for p, (_, ss) in parts.items() for s in ss])
    chosen, unwanted = {}, {}
    for path, (root, sites) in parts.items():
        mine, no = [], []
        for site in sites:
            reason = _unwanted(root, site, config, join(path, site.name))
            if reason:
                no.append(Skipped(site.name, site.op, reason))
            else:
                mine.append(site)
        chosen[path], unwanted[path] = tuple(mine), tuple(no)
    return chosen, unwanted


def describe_sites(
    root: nn.Module, graph: fx.Graph
) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """Return the sites of `graph` in the order of their first call, and what was left out.

    Args:
        root: the module over which the graph runs.
        graph: the source graph.
        config: `include`, `exclude` and `filter_fn` choose among the eligible ops.

    Returns:
        Sites, and skipped ops with the reason for each.

    Raises:
        ConfigError: if a pattern of `include` or `exclude` matches no eligible op.
    """
    sites: dict[str, Site] = {}
    skipped: dict[str, Skipped] = {}
    useful, alive = reaches_output(graph), set()
    for node in graph.nodes:
        found = _describe(root, node)
        if isinstance(found, Site):
            if node in useful:
                alive.add(found.name)
            known = sites.get(found.name)
            if known is None:
                sites[found.name] = found
            elif dataclasses.replace(known, calls=1) == found:
                sites[found.name] = dataclasses.replace(known, calls=known.calls + 1)
            else:
                found = Skipped(
                    found.name,
                    found.op,
                    "its weight is used with two different geometries or biases",
                )
        if isinstance(found, Skipped):
            skipped.setdefault(found.name, found)
    for site in sites.values():
        if site.name not in alive | skipped.keys():
            reason = "its output does not reach the model's output"
            skipped[site.name] = Skipped(site.name, site.op, reason)
    # A weight that any of its calls rules out is ruled out: its dendrites would be right for some
    # calls only.
    eligible = [site for site in sites.values() if site.name not in skipped]
    return tuple(eligible), tuple(skipped.values())


def _unwanted(root: nn.Module, site: Site, config: Config, name: str) -> str | None:
    if not any(fnmatch.fnmatchcase(name, glob) for glob in config.include):
        return "no pattern of include matches it"
    for glob in config.exclude:
        if fnmatch.fnmatchcase(name, glob):
            return f"excluded by {glob!r}"
    owner = root.get_submodule(site.weight.rpartition(".")[0])
    if config.filter_fn is not None and not config.filter_fn(owner, name):
        return "filter_fn said no"
    return None


def _check_patterns(config: Config, names: list[str]) -> None:
    for setting in ("include", "exclude"):
        for glob in getattr(config, setting):
            if names and not any(fnmatch.fnmatchcase(name, glob) for name in names):
                raise ConfigError(
                    f"pbfx.Config: {setting}={glob!r} matches no eligible op; "
                    f"{nearest(glob, names)}"
                )


def _describe(root: nn.Module, node: fx.Node) -> Site | Skipped | None:
    """Return the site that `node` calls, why it is none, or None for other ops."""
    if node.op == "call_module":
        return _describe_module(root.get_submodule(str(node.target)), str(node.target), node)
    op = FUNCTIONS.get(node.target) if callable(node.target) else None
    return None if op is None else _describe_function(root, node, op)


def _describe_module(module: nn.Module, path: str, node: fx.Node) -> Site | Skipped | None:
    kind = type(module).__name__
    if not is_site_module(module):
        owns = next(module.parameters(), None) is not None
        return Skipped(path, kind, "not a linear or conv operation") if owns else None
    op = next(op for base, op in MODULES.items() if isinstance(module, base))
    assert isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    reason = _ineligible_weight(module._parameters.get("weight"))
    if not reason and len(node.args) + len(node.kwargs) != 1:
        reason = "it is called with more than one argument"
    if not reason and hasattr(module, "dendrites"):
        reason = "it has an attribute named 'dendrites' already"
    if reason:
        return Skipped(path, kind, reason)
    geometry, padding = Geometry((), (), (), 1), None
    if not isinstance(module, nn.Linear):
        geometry, padding = _conv_geometry(
            tuple(module.kernel_size),
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.padding_mode,
        )
    return Site(
        name=path,
        op=op,
        functional=False,
        weight=f"{path}.weight",
        bias=None if module.bias is None else f"{path}.bias",
        dendrites=f"{path}.dendrites",
        geometry=geometry,
        padding=padding,
    )


def _describe_function(root: nn.Module, node: fx.Node, op: str) -> Site | Skipped | None:
    arguments: dict[str, Any] = dict(_FUNCTION_DEFAULTS)
    arguments |= zip(_FUNCTION_ARGUMENTS, node.args, strict=False)
    arguments |= node.kwargs
    path = _weight_path(node)
    if path is None:
        return Skipped(node.name, op, "its weight is computed, not a parameter")
    weight = _attribute(root, path)
    bias_node = arguments["bias"]
    reason = _ineligible_weight(weight)
    if (
        not reason
        and bias_node is not None
        and not (isinstance(bias_node, fx.Node) and bias_node.op == "get_attr")
    ):
        reason = "its bias is computed, not a parameter"
    form = [arguments[name] for name in ("stride", "padding", "dilation", "groups")]
    if not reason and any(isinstance(leaf, fx.Node) for value in form for leaf in _leaves(value)):
        reason = "its stride, padding, dilation or groups are computed from the input"
    if not reason and hasattr(
        root.get_submodule(path.rpartition(".")[0]), f"{path.rpartition('.')[2]}_dendrites"
    ):
        reason = "its owner has an attribute of the name that its dendrites would take"
    if reason:
        return Skipped(path, op, reason)
    assert isinstance(weight, torch.Tensor)
    owner = path.rpartition(".")[0]
    named = path.rpartition(".")[2] == "weight" and is_site_module(root.get_submodule(owner))
    geometry, padding = Geometry((), (), (), 1), None
    if op != "linear":
        stride, pad, dilation, groups = form
        geometry, padding = _conv_geometry(
            tuple(weight.shape[2:]), stride, pad, dilation, groups, "zeros"
        )
    return Site(
        name=owner if named else path,
        op=op,
        functional=True,
        weight=path,
        bias=None if bias_node is None else str(bias_node.target),
        dendrites=join(owner, "dendrites") if named else f"{path}_dendrites",
        geometry=geometry,
        padding=padding,
    )


def _ineligible_weight(weight: Any) -> str | None:
    if not isinstance(weight, nn.Parameter):
        return "its weight is not a parameter (parametrized, weight-normed or quantised)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, and dendrites need a floating-point one"
    return None


def _weight_path(node: fx.Node) -> str | None:
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def _attribute(root: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _leaves(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _conv_geometry(
    kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int, mode: str
) -> tuple[Geometry, Padding | None]:
    """Return the op's geometry, and what it cannot pad by itself."""
    dims = len(kernel)
    stride, dilation = _expand(stride, dims), _expand(dilation, dims)
    if padding == "valid":
        padding = 0
    if padding == "same":
        # As torch defines it: what is left over goes to the end of the axis.
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(width, width) for width in _expand(padding, dims)]
    if mode == "zeros" and all(left == right for left, right in sides):
        return Geometry(stride, tuple(left for left, _ in sides), dilation, groups), None
    widths = tuple(width for side in reversed(sides) for width in side)
    before = Padding(widths, "constant" if mode == "zeros" else mode)
    return Geometry(stride, (0,) * dims, dilation, groups), before


def _expand(value: Any, dims: int) -> tuple[int, ...]:
    values = _leaves(value)
    return tuple(values) * dims if len(values) == 1 else tuple(values)
