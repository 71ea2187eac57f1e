"""Put the best form of each dendrites op into a graph that a compiler will fuse.

    y = soma(x)                            y = soma(x)
    d = pbfx::dendrites(y, x, V, ...)  ->  z = linear(x, [V_1; ...; V_D])
    ... d[0] ...                           a_1 = f(z_1 + c_1); a_2 = f(z_2 + c_2 + U_21 a_1); ...
                                           ... y - (0 - T_1 a_1 - T_2 a_2 - ...) ...

Safe because what is put there is the op's reference, bit for bit the soma where the links are zero,
and because it is as perforated as the op: what dendrites read is detached, so the error goes on to
the soma and to `to_soma` alone. It fires on the op, whatever face the soma has: a linear or conv
module, function, method, or a norm that follows one.

It does not fire where `pbfx_kernels.forms` prefers the op's own kernels, and where it cannot know
better: shapes that are not in the graph's metadata, a number of dendrites that is dynamic. Every
site is recorded, with the reason. Candidates stay ops: their backward is no derivative.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer
from torch.nn import functional as F

# They register `pbfx::perforated_linear`, `pbfx::perforated_conv2d` and the depthwise one.
import pbfx_kernels.conv_neuron_op
import pbfx_kernels.depthwise_op
import pbfx_kernels.neuron_op  # noqa: F401
from pbfx.passes.context import copy_provenance, part
from pbfx_kernels import Geometry
from pbfx_kernels.forms import Form, choose_form, dendrites_in_graph, stacked_activations
from pbfx_kernels.packed import prefers_nhwc
from pbfx_kernels.problem import problem_of
from pbfx_kernels.strategy import is_depthwise, recomputes, route

logger = logging.getLogger(__name__)

STRATEGIES = ("auto", *(form.value for form in Form))

# What a compiler fuses with the sum before it: activations, residuals, norms and what is as local.
_ARITHMETIC = "add add_ iadd sub mul mul_ imul truediv div clamp float half bfloat16 to"
_ACTIVATIONS = (
    "relu relu_ relu6 leaky_relu gelu silu elu celu selu mish sigmoid tanh hardtanh hardswish "
    "hardsigmoid softplus softmax log_softmax dropout"
)
ACTIVATIONS = frozenset(_ACTIVATIONS.split())
_NORMS = "batch_norm layer_norm group_norm instance_norm rms_norm"
_FUSED = ACTIVATIONS | frozenset(f"{_ARITHMETIC} {_NORMS}".split())
# What only looks at the values from another side, so that fusion reaches past it.
_LOOKS = (
    "view reshape reshape_as flatten unflatten squeeze unsqueeze transpose permute movedim "
    "contiguous detach"
)
_VIEWS = frozenset(_LOOKS.split())


# Bytes of a site's activations that are kept rather than computed again; an eager call, which does
# not know what else there is, computes them again at any size.
_KEPT_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What became of one site: its path as the graph tells it, the form, and why."""

    site: str
    form: str
    reason: str


@dataclasses.dataclass(frozen=True)
class LoweringContext:
    """What is wanted of a lowered graph, and a record of what was done, filled as the pass runs.

    Attributes:
        strategy: `"auto"`, or the form that every site gets.
        products: dtype of the dendrites' products; None for the soma's.
        training: whether a backward follows.
        records: one for each dendrites op that the pass met, by the name of its node.
    """

    strategy: str = "auto"
    products: torch.dtype | None = None
    training: bool = False
    records: dict[str, Lowered] = dataclasses.field(default_factory=dict)


def lower_dendrites(gm: fx.GraphModule, ctx: LoweringContext) -> int:
    """Rewrite the dendrites ops of `gm`, whose nodes carry example values; return how many."""
    rewrites = 0
    op = torch.ops.pbfx.dendrites.default
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not op:
            continue
        call, reason = _read(node)
        form = Form.KERNEL
        if call is not None:
            form, reason = _choose(call, node, ctx)
        ctx.records[node.name] = Lowered(_site(node), form.value, reason)
        if call is not None and form is Form.FUSED:
            _fuse(gm.graph, node, call, ctx)
            rewrites += 1
        elif call is not None and form is not Form.KERNEL:
            _replace(gm.graph, node, form, call, ctx)
            rewrites += 1
    return rewrites


@dataclasses.dataclass(frozen=True)
class _Call:
    """The arguments of an op's node, and what is known of them while the graph is compiled."""

    tensors: tuple[fx.Node | None, ...]
    activation: str
    geometry: Geometry
    soma: Tensor
    weight: Tensor
    count: int
    neurons: int


def value_of(node: Any) -> Any:
    """Return the example value of a node, by Dynamo's name or by that of torch.export and fx."""
    if not isinstance(node, fx.Node):
        return None
    return node.meta.get("example_value", node.meta.get("val"))


def _read(node: fx.Node) -> tuple[_Call | None, str]:
    """Return what the op is called with, or None and why it is not known."""
    arguments = node.normalized_arguments(fx.GraphModule({}, fx.Graph()), None, None, True)
    assert arguments is not None, "an overload normalises its own call"
    named = arguments.kwargs
    tensors = tuple(
        named[name] for name in ("soma", "x", "weight", "bias", "to_soma", "to_dendrite")
    )
    soma, weight = value_of(tensors[0]), value_of(tensors[2])
    if not isinstance(soma, Tensor) or not isinstance(weight, Tensor):
        return None, "the graph does not say which shapes it has"
    form: list[Any] = [named[name] for name in _FORM]
    if any(isinstance(v, fx.Node) for value in form for v in _leaves(value)):
        return None, "its geometry is dynamic"
    stride, padding, dilation, groups, transposed, output_padding = form
    geometry = Geometry(
        tuple(stride), tuple(padding), tuple(dilation), groups, transposed, tuple(output_padding)
    )
    count, neurons = weight.shape[0], geometry.neurons(weight.shape[1:])
    if not isinstance(count, int) or not isinstance(neurons, int):
        return None, "its number of dendrites or neurons is dynamic"
    if count == 0:
        return None, "it has no dendrites"
    return _Call(tensors, named["activation"], geometry, soma, weight, count, neurons), ""


_FORM = ("stride", "padding", "dilation", "groups", "transposed", "output_padding")


def _leaves(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _choose(call: _Call, node: fx.Node, ctx: LoweringContext) -> tuple[Form, str]:
    with_soma = _fusible_soma(node, call)
    if ctx.strategy == Form.FUSED.value and not with_soma:
        return Form.PACKED, "its soma is not a linear op or conv2d that nothing else reads"
    if ctx.strategy != "auto":
        return Form(ctx.strategy), "asked for"
    if ctx.products is not None:
        return Form.PACKED, "its products have a dtype of their own"
    absorbed = _absorbed(node)
    problem = problem_of(call.soma, call.weight, call.geometry)
    if with_soma and call.geometry.spatial and not is_depthwise(problem):
        with_soma = route(problem, value_of(call.tensors[1]).shape) is not None
    form = choose_form(problem, ctx.training, bool(absorbed), with_soma)
    if form is Form.FUSED:
        return form, "soma and dendrites in one kernel of ours are measured to be faster here"
    if form is Form.KERNEL:
        return form, "our own kernels are measured to be faster here"
    return form, f"fused with {', '.join(absorbed)}" if absorbed else "fused by the compiler"


def _fusible_soma(node: fx.Node, call: _Call) -> bool:
    """Return whether the soma is `F.linear(x, W, b)`, or `F.conv2d(x, W, b, ...)` of a batch.

    It is of what the dendrites read, and for them alone.
    """
    soma, x = call.tensors[:2]
    return (
        soma is not None
        and soma.op == "call_function"
        and (soma.target is F.linear or (soma.target is F.conv2d and call.soma.dim() == 4))
        and not soma.kwargs
        and soma.args[0] is x
        and list(soma.users) == [node]
    )


def _fuse(graph: fx.Graph, node: fx.Node, call: _Call, ctx: LoweringContext) -> None:
    """Put one op in the place of the soma and of the op; autocast would have cast both alike."""
    soma, x, *links = call.tensors
    assert soma is not None
    form, geometry = (), call.geometry
    op: Any = torch.ops.pbfx.perforated_linear.default
    learns = isinstance(value := value_of(links[2]), Tensor) and value.requires_grad
    if geometry.spatial:
        form = geometry.stride, geometry.padding, geometry.dilation
        if is_depthwise(problem_of(call.soma, call.weight, geometry)):
            op = torch.ops.pbfx.perforated_depthwise.default
        else:
            op, form = torch.ops.pbfx.perforated_conv2d.default, (*form, geometry.groups)
        learns = learns and not _computes_again(call)
    keep = part(node, 1) is not None or (ctx.training and learns)
    last = node.prev
    with graph.inserting_before(node):
        cast: list[Any] = []
        for tensor in (x, *soma.args[1:3], *[None] * (3 - len(soma.args))):
            value = value_of(tensor)
            if isinstance(value, Tensor) and value.dtype is not call.soma.dtype:
                tensor = graph.call_method("to", (tensor, call.soma.dtype))
            cast.append(tensor)
        nhwc = geometry.spatial and _walks_nhwc(value_of(x), call)
        if nhwc:
            how: Any = {"memory_format": torch.channels_last}
            cast[0] = graph.call_method("contiguous", (cast[0],), how)
        fused = graph.call_function(op, (*cast, *links, call.activation, *form, keep))
    _describe(last, node)
    node.replace_all_uses_with(fused)
    if nhwc:
        _restore(graph, fused)
    graph.erase_node(node)
    graph.erase_node(soma)


def _walks_nhwc(x: Any, call: _Call) -> bool:
    """Return whether an op in NCHW would copy its input to NHWC, and its backward the error.

    A graph's copies are fused with what comes before and after.
    """
    known = isinstance(x, Tensor) and call.soma.is_contiguous()
    return known and prefers_nhwc(x.shape, call.soma.element_size(), call.geometry)


def _restore(graph: fx.Graph, fused: fx.Node) -> None:
    """Give what an op returns in NHWC the layout that the graph was captured with."""
    for taken in list(fused.users):
        taken.meta["example_value"] = value_of(fused)[taken.args[1]]
        with graph.inserting_after(taken):
            restored = graph.call_method("contiguous", (taken,))
        taken.replace_all_uses_with(restored, lambda user, new=restored: user is not new)
        copy_provenance(taken, restored)
        _propagate([restored])


def _computes_again(call: _Call) -> bool:
    """Return whether a backward computes activations again: where they are worth the memory."""
    problem = problem_of(call.soma, call.weight, call.geometry)
    kept = problem.dendrites * problem.positions * problem.neurons * problem.dtype.itemsize
    return kept > _KEPT_BYTES and recomputes(call.soma, call.weight, call.geometry)


def _describe(last: fx.Node, node: fx.Node) -> None:
    """Give what stands between `last` and `node` its provenance and its example values."""
    added = []
    while last.next is not node:
        last = last.next
        added.append(last)
    copy_provenance(node, *added)
    _propagate(added)


def _absorbed(node: fx.Node) -> list[str]:
    """Return the names of what a compiler fuses with the site's output, if that is all it feeds."""
    out = part(node, 0)
    if out is None:
        return []
    names, seen = [], [out]
    for value in seen:
        for user in value.users:
            name = str(getattr(user.target, "__name__", user.target)).partition(".")[0]
            if name in _VIEWS:
                seen.append(user)
            elif name in _FUSED or user.target in (operator.add, operator.mul):
                names.append(name)
            else:
                return []
    return sorted(set(names))


def _replace(graph: fx.Graph, node: fx.Node, form: Form, call: _Call, ctx: LoweringContext) -> None:
    last = node.prev
    with graph.inserting_before(node), _autocast_off(graph, node, call.soma):
        tracer = GraphAppendingTracer(graph)
        soma, x, weight, bias, to_soma, to_dendrite = (
            None if node is None else fx.Proxy(node, tracer) for node in call.tensors
        )
        out, activations = dendrites_in_graph(
            form,
            soma,
            x,
            weight,
            bias,
            to_soma,
            to_dendrite,
            call.activation,
            call.geometry,
            call.count,
            call.neurons,
            call.soma.dtype,
            ctx.products,
            call.soma.shape if ctx.training else None,
        )
        results = {0: out}
        if part(node, 1) is not None:
            results[1] = stacked_activations(activations, call.soma.dtype)
    _describe(last, node)
    for index, result in results.items():
        taken = part(node, index)
        if taken is not None:
            taken.replace_all_uses_with(result.node)
            graph.erase_node(taken)
    graph.erase_node(node)


@contextlib.contextmanager
def _autocast_off(graph: fx.Graph, node: fx.Node, soma: Tensor) -> Iterator[None]:
    """Switch autocast off for what the body adds, where a graph switches it on.

    The dtype of the computation is the soma's; a library's product would else be cast once more.
    """
    device = soma.device.type
    enter = torch.amp.autocast_mode._enter_autocast
    inside = torch.is_autocast_enabled(device) or any(
        other.target is enter for other in graph.nodes if other is not node
    )
    if not inside:
        yield
        return
    entered = graph.call_function(enter, (device, None, False, None))
    yield
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))


def _propagate(nodes: list[fx.Node]) -> None:
    """Compute the example values of new nodes from those of the nodes that they read."""
    for node in nodes:
        arguments, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: value_of(n))
        run: Callable[..., Any]
        if node.op == "call_method":
            run = getattr(arguments[0], str(node.target))
            arguments = arguments[1:]
        elif getattr(node.target, "__name__", "").endswith("_autocast"):
            # Modes have no value; that they hold for the nodes between is not seen here, because
            # those cast nothing themselves.
            continue
        else:
            assert callable(node.target)
            run = node.target
        # Of the values, not the one that now traces: Dynamo gives its backend another.
        modes = [
            mode for value in _leaves(arguments) if (mode := getattr(value, "fake_mode", None))
        ]
        with modes[0] if modes else contextlib.nullcontext():
            node.meta["example_value"] = run(*arguments, **kwargs)


def _site(node: fx.Node) -> str:
    """Return the path of the module whose op it is, as far as the graph remembers it."""
    return module_path(node).removesuffix(".dendrites") or node.name


def module_path(node: fx.Node) -> str:
    """Return the path of the module that `node` was traced in, in the words of `named_modules`.

    Dynamo writes `L['self'].blocks[0]` and `getattr(L['self'], '0')`, symbolic tracing the path.
    """
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    name = stack[-1][0] if isinstance(stack[-1], (tuple, list)) else ""
    words = [word for word in re.findall(r"\w+", name) if word not in _SOURCE_WORDS]
    return ".".join(words)


# What sources in Dynamo's graphs are made of beside names of modules.
_SOURCE_WORDS = frozenset(("L", "G", "getattr", "self", "_modules"))
