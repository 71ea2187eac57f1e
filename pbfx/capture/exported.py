"""Capture a whole model by torch.export, on request.

Where symbolic tracing runs a forward with stand-ins that refuse to answer, torch.export runs it
with fake tensors that answer: for shapes, types, lengths and None. The answers are those of an
example, so the graph holds for calls like it, which the entrance checks (`entrance`).

What torch itself computes stays a call of the user's module (`calls`), as in the other rungs, so
norms, dropouts and recurrent nets keep their modes, statistics and hooks. The rest becomes aten
ops, and flags of dropouts and norms that were called as functions follow the mode again (`modes`).
"""

from __future__ import annotations

import collections
import dataclasses
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from pbfx.capture.calls import Calls, recording
from pbfx.capture.clone import python_modules, redirect, shared_clone
from pbfx.capture.entrance import Entrance, Held, leave
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
)
from pbfx.capture.programs import Program, read_program
from pbfx.capture.sizes import Check
from pbfx.capture.structures import take_apart
from pbfx.capture.trace import is_torch_layer
from pbfx.errors import CaptureError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclasses.dataclass(frozen=True)
class Example:
    """What torch.export runs a forward with.

    Attributes:
        inputs: positional arguments as a tuple, or arguments by name.
        dynamic_shapes: which sizes may change, as in torch.export; None for all that can.
    """

    inputs: tuple[Any, ...] | Mapping[str, Any]
    dynamic_shapes: Any = None


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

    def run(training: Mapping[str, bool]) -> Program:
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
) -> Program:
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

    # What stays whole is called again. Recurrent layers keep their weights in a list too.
    besides = frozenset(
        path
        for path, module in whole.items()
        if isinstance(module, nn.RNNBase) or not is_torch_layer(module)
    )
    with _guarded(twin, name, calls, besides, root):
        twin.__dict__["forward"] = run
        try:
            program = _export(twin, list(entrance.leaves), shapes)
        finally:
            del twin.__dict__["forward"]
    return read_program(root, program, calls, entrance.names, box[0])


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
    patched = _config.patch(backed_size_oblivious=True)  # pyright: ignore[reportAttributeAccessIssue]
    with patched, warnings.catch_warnings():
        # Of recurrent layers, which stay whole; what else is assigned is refused.
        warnings.filterwarnings("ignore", message=".*assigned during export")
        return torch.export.export(twin, (leaves,), dynamic_shapes=(shapes,), strict=False)


@contextmanager
def _guarded(
    twin: nn.Module, name: str, calls: Calls, besides: frozenset[str], root: nn.Module
) -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensor

    paths = {id(module): path for path, module in twin.named_modules()}
    try:
        with ExitStack() as guards:
            guards.enter_context(random_streams_kept(name))
            guards.enter_context(attributes_kept(twin, name, besides))
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


def _check_alike(train: Program, evaluated: Program, name: str) -> None:
    """Refuse what differs between train and eval, beside the graphs."""
    same = train.result == evaluated.result and train.constants.keys() == evaluated.constants.keys()
    same = same and all(torch.equal(t, evaluated.constants[k]) for k, t in train.constants.items())
    same = same and {k: r.code for k, r in train.regions.items()} == {
        k: r.code for k, r in evaluated.regions.items()
    }
    if not same:
        raise CaptureError(
            f"cannot capture {name}: in train and in eval mode forward returns different "
            "structures, or computes with different constants, and a graph has only one of them"
        )


def _assemble(
    root: nn.Module, program: Program, entrance: Entrance, checks: list[Check]
) -> fx.Graph:
    """Put the entrance before the graph of a program and the exit after it."""
    parameters = root.named_parameters()
    path, parameter = next(((k, p) for k, p in parameters if p.is_floating_point()), (None, None))
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
    assert isinstance(returned, (tuple, list)), "so read_program writes it"
    leave(graph, program.result, returned)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph
