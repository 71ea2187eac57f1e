"""Capture a whole model by torch.export, on request.

Where symbolic tracing runs a forward with stand-ins that refuse to answer, torch.export runs it with
fake tensors that answer: for shapes, types, lengths and None. The answers are those of an example,
so the graph holds for calls like it, which the entrance checks (`entrance`).

What torch itself computes stays a call of the user's module (`calls`), as in the other rungs, so
norms, dropouts and recurrent nets keep their modes, statistics and hooks. The rest becomes aten
ops, and flags of dropouts and norms that were called as functions follow the mode again (`modes`).
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from pbfx.capture.calls import Calls, recording
from pbfx.capture.clone import python_modules, redirect, shared_clone
from pbfx.capture.entrance import Check, Entrance, Held, checks_of, leave
from pbfx.capture.guards import (
    attributes_kept,
    contexts_refused,
    functions_refused,
    questions_refused,
    random_streams_kept,
)
from pbfx.capture.modes import (
    SIZE,
    check_modules_of_flags,
    differences,
    follow_modes,
    module_of,
)
from pbfx.capture.structures import Structure, take_apart
from pbfx.capture.trace import is_torch_layer
from pbfx.errors import CaptureError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Under such a name the model holds a constant of the graph, and a region that runs under no_grad.
_CONSTANT, _REGION = "_exported_constant_{}", "_exported_region_{}"


@dataclasses.dataclass(frozen=True)
class Example:
    """What torch.export runs a forward with.

    Attributes:
        inputs: positional arguments as a tuple, or arguments by name.
        dynamic_shapes: which sizes may change, as in torch.export; None for all that can.
    """

    inputs: tuple[Any, ...] | Mapping[str, Any]
    dynamic_shapes: Any = None


@dataclasses.dataclass
class _Program:
    """One export: its graph over placeholders, and what the graph is about."""

    graph: fx.Graph
    result: Structure
    checks: list[Check]
    constants: dict[str, Tensor]
    regions: dict[str, fx.GraphModule]


def export(root: nn.Module, is_leaf: Callable[[nn.Module], bool], example: Example) -> fx.Graph:
    """Export `root` for calls like the example, in train and eval mode, and return one graph.

    Args:
        root: a shared clone. It may gain buffers for constants, which stay out of the state dict,
            and graphs of regions under no_grad or autocast.
        is_leaf: modules for which this is true stay one node, beside those that torch made.
        example: what to run it with.

    Raises:
        CaptureError: with the reason, when torch.export refuses or the graph could not follow the
            model. `root` is then as it was. Its `culprit`, if it has one, is the innermost module
            that refused.
    """
    entrance = Entrance.of(root, example.inputs)
    shapes = entrance.shapes(example.dynamic_shapes)
    modules = python_modules(root)
    named = [(path, m) for path, m in root.named_modules() if path]
    whole = {path for path, m in named if is_leaf(m) or is_torch_layer(m)}

    def run(training: Mapping[str, bool]) -> _Program:
        return _run(root, whole, entrance, shapes, training)

    train = run(dict.fromkeys(modules, True))
    evaluated = run(dict.fromkeys(modules, False))
    found = differences(train.graph, evaluated.graph, root)
    _check_alike(train, evaluated, type(root).__name__)
    if len(modules) > 1 and found:
        # Whose flag it is shows where neighbours differ: parents from children, and siblings.
        mixed = {path: _parity(path) for path in modules}
        check_modules_of_flags(found, differences(train.graph, run(mixed).graph, root), mixed)
    follow_modes(train.graph, found)
    checks = list(dict.fromkeys([*train.checks, *evaluated.checks]))
    graph = _assemble(root, train, entrance, checks)
    for name, tensor in train.constants.items():
        root.register_buffer(name, tensor, persistent=False)
    for name, region in train.regions.items():
        root.add_module(name, region)
    return graph


def _parity(path: str) -> bool:
    return (path.count(".") + sum(map(ord, path.rpartition(".")[2])) + bool(path)) % 2 == 0


def _run(
    root: nn.Module,
    kept_whole: set[str],
    entrance: Entrance,
    shapes: list[Any],
    training: Mapping[str, bool],
) -> _Program:
    twin, name, calls = shared_clone(root), type(root).__name__, Calls()
    for path, module in python_modules(twin).items():
        module.__dict__["training"] = training[path]
    whole = {path: twin.get_submodule(path) for path in kept_whole}
    for path, module in whole.items():
        if isinstance(module, torch.jit.ScriptModule):
            # The clone's is the user's own.
            holder = _Holder(module)
            redirect(twin.modules(), {id(module): holder})
            module = holder
        calls.keep_whole(module, path)
    # Those of the root run when the graph does, those of others when it calls them.
    for module in (twin, *whole.values()):
        for hooks in _HOOKS:
            module.__dict__[hooks] = collections.OrderedDict()
    forward, box = twin.forward, []

    def run(leaves: list[Tensor]) -> list[Any]:
        args, kwargs = entrance.arguments(leaves)
        values: list[Any] = []
        box[:] = [take_apart(forward(*args, **kwargs), values, "what forward returns")]
        return values

    with _guarded(twin, name, calls, frozenset(whole), root):
        twin.__dict__["forward"] = run
        try:
            program = _export(twin, list(entrance.leaves), shapes)
        finally:
            del twin.__dict__["forward"]
    return _read(root, program, calls, entrance, box[0])


class _Holder(nn.Module):
    """Calls a TorchScript module, which takes no forward of another's."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.__dict__["held"] = held

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["held"](*args, **kwargs)


def _export(twin: nn.Module, leaves: list[Tensor], shapes: list[Any]) -> Any:
    import torch.export
    from torch.fx.experimental import _config

    # Sizes of 0 and 1 are sizes like others, unless forward asks for them, which is then a guard.
    with _config.patch(backed_size_oblivious=True), warnings.catch_warnings():
        # Of recurrent layers, which stay whole; what else is assigned is refused.
        warnings.filterwarnings("ignore", message=".*were assigned during export")
        return torch.export.export(twin, (leaves,), dynamic_shapes=(shapes,), strict=False)


@contextmanager
def _guarded(
    twin: nn.Module, name: str, calls: Calls, whole: frozenset[str], root: nn.Module
) -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensor

    paths = {id(module): path for path, module in twin.named_modules()}
    try:
        with ExitStack() as guards:
            guards.enter_context(random_streams_kept(name))
            guards.enter_context(attributes_kept(twin, name, whole))
            traced = lambda value: isinstance(value, FakeTensor) and not calls.inside  # noqa: E731
            guards.enter_context(functions_refused(name, traced))
            guards.enter_context(contexts_refused(name))
            guards.enter_context(questions_refused(name, bulk=False))
            guards.enter_context(recording(calls))
            yield
    # Exporting runs the user's forward, so any exception at all can come out of it.
    except Exception as error:
        culprit = getattr(error, "culprit", None) or _culprit(error, paths)
        path = paths.get(id(culprit))
        if isinstance(error, CaptureError):
            failure = error
        else:
            where = f" (in {path!r})" if path else ""
            reason = str(error).strip().partition("\n\n")[0]
            failure = CaptureError(
                f"cannot capture {name} by torch.export{where}: {type(error).__name__}: {reason}"
            )
        failure.culprit = None if path is None else root.get_submodule(path)
        raise failure from error


def _culprit(error: Exception, paths: Mapping[int, str]) -> nn.Module | None:
    """Return the innermost module of the model whose code was running."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in paths:
            found = module
    return found


def _read(
    root: nn.Module, program: Any, calls: Calls, entrance: Entrance, result: Structure
) -> _Program:
    """Turn an ExportedProgram into a graph over the attributes of `root`."""
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
                f"cannot capture {name}: forward changes {spec.target!r} in a way that torch.export "
                f"can only hand out ({spec.kind.name.lower()}); update it in place (add_, copy_)"
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
    return _Program(graph, result, checks_of(entrance.names, fakes), constants, regions)


def _provenance(root: nn.Module, node: fx.Node) -> dict[str, Any]:
    """Return where `node` comes from as symbolic tracing notes it, and the size it computes."""
    meta: dict[str, Any] = {}
    if node.meta.get("stack_trace"):
        meta["stack_trace"] = node.meta["stack_trace"]
    # The second call of a module has a number, and what has no module another mark.
    stack = [
        re.sub(r"@\d+", "", str(path)) for path, _ in node.meta.get("nn_module_stack", {}).values()
    ]
    modules = {path: root.get_submodule(path) for path in stack if _exists(root, path)}
    meta["nn_module_stack"] = {path: (path, type(module)) for path, module in modules.items()}
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        meta[SIZE] = str(value.node.expr)
    return meta


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
        error = CaptureError(
            f"cannot capture {name}: {module_of(called[0]) or 'forward'} calls a layer inside "
            "torch.no_grad or torch.autocast (or a torch.cond), where no dendrite can learn; use "
            "detach() in place of no_grad, and put autocast around the whole model"
        )
        raise error
    return region


def _check_alike(train: _Program, evaluated: _Program, name: str) -> None:
    """Refuse what differs between train and eval, beside the graphs."""
    same = train.result == evaluated.result and train.constants.keys() == evaluated.constants.keys()
    same = same and all(torch.equal(t, evaluated.constants[k]) for k, t in train.constants.items())
    same = same and {k: r.code for k, r in train.regions.items()} == {
        k: r.code for k, r in evaluated.regions.items()
    }
    if not same:
        raise CaptureError(
            f"cannot capture {name}: in train and in eval mode forward returns different structures, "
            "or computes with different constants, and a graph has only one of them"
        )


def _assemble(
    root: nn.Module, program: _Program, entrance: Entrance, checks: list[Check]
) -> fx.Graph:
    """Put the entrance before the graph of a program and the exit after it."""
    parameters = root.named_parameters()
    path, parameter = next(
        ((k, p) for k, p in parameters if p.is_floating_point()), (None, None)
    )
    if path is None or parameter is None:
        raise CaptureError(
            f"{type(root).__name__} has no floating-point parameters, and so nothing that can "
            "carry dendrites"
        )
    graph = fx.Graph()
    graphs = [program.graph, *(region.graph for region in program.regions.values())]
    arguments = [
        value for g in graphs for node in g.nodes for value in (*node.args, *node.kwargs.values())
    ]
    held = Held(parameter, any(isinstance(value, torch.device) for value in arguments))
    leaves = entrance.build(graph, checks, path, held)
    values = dict(
        zip([n for n in program.graph.nodes if n.op == "placeholder"], leaves, strict=True)
    )
    returned = graph.graph_copy(program.graph, values)
    for copied in graph.nodes:
        copied.meta.pop(SIZE, None)
    leave(graph, program.result, returned)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph
