"""Turn what torch.export returns into a graph over the attributes of the model."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from pbfx.capture.calls import Calls
from pbfx.capture.modes import SIZE
from pbfx.capture.sizes import Check, checks_of
from pbfx.capture.structures import Structure
from pbfx.errors import CaptureError

# Under such a name the model holds a constant of the graph, and a region that runs under no_grad.
_CONSTANT, _REGION = "_exported_constant_{}", "_exported_region_{}"


@dataclasses.dataclass
class Program:
    """One export.

    Attributes:
        graph: it has a placeholder for each tensor of the example, and returns a tuple of tensors.
        result: the structure of what forward returned.
        checks: what has to hold for the sizes of the inputs.
        constants: the tensors that forward made out of nothing, by the name of a new buffer.
        regions: the graphs that run under no_grad or autocast, by the name of a new submodule.
    """

    graph: fx.Graph
    result: Structure
    checks: list[Check]
    constants: dict[str, Tensor]
    regions: dict[str, fx.GraphModule]


def read_program(
    root: nn.Module, program: Any, calls: Calls, names: Sequence[str], result: Structure
) -> Program:
    """Turn an ExportedProgram into a graph over the attributes of `root`.

    Args:
        root: the module that was exported, which is left as it is.
        program: the ExportedProgram of a clone of it.
        calls: the modules that stayed whole.
        names: what to call each input.
        result: the structure of what forward returned.

    Raises:
        CaptureError: if the program does what such a graph cannot.
    """
    from torch.export.graph_signature import InputKind, OutputKind

    name = type(root).__name__
    graph, values = fx.Graph(), {}
    constants: dict[str, Tensor] = {}
    regions: dict[str, fx.GraphModule] = {}
    inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    fakes: list[Any] = []
    constant_names, region_names = _unused(root, _CONSTANT), _unused(root, _REGION)
    for spec in program.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"cannot capture {name}: forward changes {spec.target!r} in a way that "
                f"torch.export can only hand out ({spec.kind.name.lower()}); update it in place "
                "(add_, copy_)"
            )
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = inputs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                values[node] = graph.placeholder(f"leaf_{len(fakes)}")
                fakes.append(node.meta["val"])
                continue
            if not node.users:
                continue
            path = str(spec.target)
            if spec.kind is InputKind.CONSTANT_TENSOR:
                path = next(constant_names)
                constants[path] = program.constants[spec.target]
            elif spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
                raise CaptureError(
                    f"cannot capture {name}: it holds {path!r}, a {spec.kind.name.lower()}, which "
                    "a graph over tensors has no place for"
                )
            values[node] = graph.get_attr(path)
        elif node.op == "get_attr":
            region = getattr(program.graph_module, str(node.target))
            path = next(region_names)
            regions[path] = _checked_region(region, name)
            values[node] = graph.get_attr(path)
        elif node.op == "output":
            break
        # Where forward casts, torch.export asserts what it cast from; the cast itself is enough.
        elif node.target is not torch.ops.aten._assert_tensor_metadata.default:
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta = _provenance(root, node)
    (returned,) = program.graph.output_node().args
    graph.output(map_arg(tuple(returned), values.__getitem__))
    calls.restore(graph)
    return Program(graph, result, checks_of(names, fakes, calls.guards), constants, regions)


def _provenance(root: nn.Module, node: fx.Node) -> dict[str, Any]:
    """Return where `node` comes from as symbolic tracing notes it, and the size it computes."""
    meta: dict[str, Any] = {}
    if node.meta.get("stack_trace"):
        meta["stack_trace"] = node.meta["stack_trace"]
    modules = {path: root.get_submodule(path) for path in _stack(node) if _exists(root, path)}
    meta["nn_module_stack"] = {path: (path, type(module)) for path, module in modules.items()}
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        meta[SIZE] = str(value.node.expr)
    return meta


def _stack(node: fx.Node) -> list[str]:
    """Return the paths of the modules that were running, some of which may be torch's own marks."""
    # The second call of a module has a number.
    paths = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return [re.sub(r"@\d+", "", path) for path in paths]


def _exists(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def _unused(root: nn.Module, name: str) -> Iterator[str]:
    """Yield names for attributes that `root` does not have."""
    return (key for n in itertools.count() if not hasattr(root, key := name.format(n)))


def _checked_region(region: Any, name: str) -> fx.GraphModule:
    called = [
        node
        for part in region.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
        if node.target is torch.ops.pbfx.call_module.default
    ]
    if called:
        where = next(reversed(_stack(called[0])), "")
        raise CaptureError(
            f"cannot capture {name}: {where!r} is called inside "
            "torch.no_grad or torch.autocast (or a torch.cond), where no dendrite can learn; use "
            "detach() in place of no_grad, and put autocast around the whole model"
        )
    return region
