"""Compile a graph region by region: equal regions once, and after a growth only those that changed.

    stem -> blocks.0 -> blocks.1 -> ... -> head      one compiled function per distinct block

`cuts` tells where regions begin. They are told apart by their content: ops and their arguments, and
the shapes, strides, dtypes and gradients of their inputs. So twelve equal layers are compiled once,
and a restructure costs the compilation of the regions in which it changed something.

Each region is a graph with a backward of its own, which costs some tens of microseconds per region
and step, and fusion across its borders.
"""

from __future__ import annotations

import collections
import itertools
import logging
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.passes.split_module import split_module
from torch.utils import _pytree as pytree

from pbfx.backend.cuts import cut_at_blocks, cut_at_sites
from pbfx.backend.out_of_place import word_of, written
from pbfx.backend.overlap import overlapping
from pbfx.backend.settings import Compiled, Settings
from pbfx.backend.sources import is_static, keep_sources
from pbfx.errors import PassError
from pbfx.passes.lower_dendrites import value_of

logger = logging.getLogger(__name__)

# Compiled regions by their content, those used last at the end. A restructure leaves some behind.
_MOST_REGIONS = 256
_compiled: collections.OrderedDict[Any, _Known] = collections.OrderedDict()


def compile_regions(gm: fx.GraphModule, example_inputs: list[Any], settings: Settings) -> Compiled:
    """Compile the regions of `gm` that have not been compiled before, and chain them all.

    Args:
        gm: a graph of Dynamo's; left as it is.
        example_inputs: fake tensors and sizes.
        settings: who compiles a region.

    Returns:
        What computes `gm`.
    """
    cut = cut_at_sites if settings.regional == "sites" else cut_at_blocks
    region_of = cut(gm.graph)
    whole = _depends_on_values(gm.graph)
    if whole:
        logger.info("compiled as a whole: it has sizes that depend on values")
    if whole or len(set(region_of.values())) < 2:
        with overlapping():
            return settings.inner(gm, example_inputs)
    split = split_module(
        gm, nn.Module(), lambda node: region_of[node.name], keep_original_order=True
    )
    tell_sources(gm, split)
    order_outputs(split)
    mode, inputs = _as_fake(example_inputs)
    before = set(_compiled)
    try:
        with overlapping():
            _Compilation(split, settings, mode).run(*inputs)
    except BaseException:
        # Some of it may have no kernels.
        for key in _compiled.keys() - before:
            del _compiled[key]
        raise
    return split


def _depends_on_values(graph: fx.Graph) -> bool:
    """Return whether it has sizes that are read off tensors: a region cannot tell them the next."""
    sized = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    leaves = (leaf for node in graph.nodes for leaf in pytree.tree_leaves(value_of(node)))
    return any(isinstance(leaf, sized) and free_unbacked_symbols(leaf) for leaf in leaves)


def tell_sources(gm: fx.GraphModule, split: fx.GraphModule) -> None:
    """Tell of each region's inputs what Dynamo told of the graph's; see `keep_sources`.

    Args:
        gm: a graph of Dynamo's.
        split: its regions, of which no other has been compiled yet.
    """
    given = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    for call in split.graph.find_nodes(op="call_module"):
        region = split.get_submodule(str(call.target))
        assert isinstance(region, fx.GraphModule)
        places = region.graph.find_nodes(op="placeholder")
        keep_sources(gm, region, places, [given.get(str(arg)) for arg in call.args])


def order_outputs(split: fx.GraphModule) -> None:
    """Let every region return what it gives in the order in which it computes it.

    It would be the order in which the next regions read it, so that a growth of theirs changed it.
    """
    for call in split.graph.find_nodes(op="call_module"):
        region = split.get_submodule(str(call.target))
        assert isinstance(region, fx.GraphModule)
        (output,) = region.graph.find_nodes(op="output")
        given = output.args[0]
        if not isinstance(given, (tuple, list)):
            continue
        place = {node: index for index, node in enumerate(region.graph.nodes)}
        order = sorted(range(len(given)), key=lambda index: place[given[index]])
        if order == list(range(len(given))):
            continue
        output.args = (tuple(given[index] for index in order),)
        region.recompile()
        for taken in list(call.users):
            assert taken.target is operator.getitem, "split_module takes every output apart"
            taken.args = (call, order.index(taken.args[1]))
    split.recompile()


def _as_fake(example_inputs: list[Any]) -> tuple[Any, list[Any]]:
    """Return Dynamo's fake mode, and the inputs as it traced with them: its backend gets the real
    ones.

    Raises:
        PassError: if no compilation is under way.
    """
    from torch._guards import TracingContext
    from torch._subclasses import FakeTensor

    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        raise PassError("regions can be compiled within torch.compile only: no trace is under way")
    mode, known = context.fake_mode, context.tensor_to_context

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        sizes = known.get(value)
        if sizes is None:
            return mode.from_tensor(value, static_shapes=True)
        source = getattr(sizes, "tensor_source", None)
        return mode.from_tensor(value, symbolic_context=sizes, source=source, trace=False)

    return mode, [fake(value) for value in example_inputs]


def forget_regions() -> None:
    """Drop every compiled region."""
    _compiled.clear()


class _Compilation(fx.Interpreter):
    """Runs a split graph on fake tensors, and compiles each region as its inputs are known."""

    def __init__(self, split: fx.GraphModule, settings: Settings, mode: Any) -> None:
        super().__init__(split)
        self.settings, self.mode = settings, mode
        self.extra_traceback = False

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the constant `target`, as a fake tensor if it is one."""
        value = super().get_attr(target, args, kwargs)
        return self.mode.from_tensor(value) if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compile the region `target`, and return what it gives for `args`."""
        assert not kwargs, "split_module passes everything by position"
        region = self.module.get_submodule(target)
        assert isinstance(region, fx.GraphModule)
        (output,) = region.graph.find_nodes(op="output")
        alone = not isinstance(output.args[0], (tuple, list))
        if alone:
            # Compilers want a tuple.
            output.args = ((output.args[0],),)
            region.recompile()
        # Before it runs, because a run may change its inputs, and whether gradients are on.
        learns = torch.is_grad_enabled()
        key = _content(region, args, self.settings)
        known = _compiled.get(key) if key is not None else None
        if known is not None and known.outputs is not None:
            results = [output.make(self.mode) for output in known.outputs]
        else:
            results = self._run(region, args)
        if known is None:
            outputs = _describe(region, args, results)
            with torch.set_grad_enabled(learns):
                known = _Known(self.settings.inner(region, list(args)), outputs)
        if key is not None:
            _compiled[key] = known
            _compiled.move_to_end(key)
            while len(_compiled) > _MOST_REGIONS:
                _compiled.popitem(last=False)
        self.module.add_module(target, _Region(known.compiled, alone))
        return results[0] if alone else results

    def _run(self, region: fx.GraphModule, args: tuple[Any, ...]) -> Any:
        """Return what a region gives, which is real without a mode if it is made of nothing."""
        with self.mode:
            return region(*args)


class _Output(NamedTuple):
    """A tensor that a region has given: an equal region need not run to know its own."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def make(self, mode: Any) -> Tensor:
        """Return a fake tensor like it, which is no leaf if it requires gradients."""
        with mode, torch.enable_grad():
            made = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
            return made.requires_grad_().clone() if self.requires_grad else made


class _Known(NamedTuple):
    """A compiled region, and what it gives; None if that takes a run to know."""

    compiled: Compiled
    outputs: tuple[_Output, ...] | None


def _describe(
    region: fx.GraphModule, args: tuple[Any, ...], results: Sequence[Any]
) -> tuple[_Output, ...] | None:
    """Return the outputs of a region where each is a tensor in memory of its own, else None."""
    # A switch of gradients is for the regions that follow too; autocast ends where a region does.
    if region.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        return None
    values = dict(zip(region.graph.find_nodes(op="placeholder"), args, strict=True))
    over = ((node, tensor) for node in region.graph.nodes if (tensor := written(node)) is not None)
    if not all(_only_counts(node, values.get(tensor)) for node, tensor in over):
        return None
    taken = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}
    outputs = []
    for result in results:
        if not (
            isinstance(result, Tensor)
            and result.layout is torch.strided
            and result.untyped_storage()._cdata not in taken
            and all(type(size) is int for size in (*result.shape, *result.stride()))
            and _is_dense(result)
            and result.is_leaf != result.requires_grad
        ):
            return None
        taken.add(result.untyped_storage()._cdata)
        outputs.append(
            _Output(
                tuple(result.shape),
                result.stride(),
                result.dtype,
                result.device,
                result.requires_grad,
            )
        )
    return tuple(outputs)


def _only_counts(node: fx.Node, value: Any) -> bool:
    """Return whether work in place on `value` adds to whole numbers, as a norm counts batches.

    It leaves all that the graph after it goes by as it was: shape, strides, gradients.
    """
    whole = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
    return whole and word_of(node) == "add_"


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor fills its memory, in whatever order of its axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return tensor.storage_offset() == 0


class _Region(nn.Module):
    """A compiled region in a split graph."""

    def __init__(self, compiled: Compiled, alone: bool) -> None:
        super().__init__()
        self.compiled, self.alone = compiled, alone

    def forward(self, *args: Any) -> Any:
        results = self.compiled(*args)
        return results[0] if self.alone else results


def _content(region: fx.GraphModule, args: tuple[Any, ...], settings: Settings) -> Any:
    """Return what decides how a region is compiled, or None where that is not all known here.

    Two regions of equal content are compiled to the same code. With dynamic sizes they are not: the
    guards of such code belong to the compilation in which it was made.
    """
    numbers = {node: index for index, node in enumerate(region.graph.nodes)}
    static = tuple(map(is_static, region.graph.find_nodes(op="placeholder")))
    storages: dict[int, int] = {}
    inputs: list[Any] = []
    for arg in args:
        if not isinstance(arg, Tensor):
            if not isinstance(arg, (bool, int, float, str, type(None))):
                return None
            inputs.append((type(arg), arg))
            continue
        sizes = (*arg.shape, *arg.stride(), arg.storage_offset())
        if arg.layout is not torch.strided or not all(type(size) is int for size in sizes):
            return None
        # Tensors that share memory are compiled in another way than ones that do not.
        storage = storages.setdefault(arg.untyped_storage()._cdata, len(storages))
        inputs.append(
            (sizes, arg.dtype, arg.device, arg.requires_grad, arg.is_leaf, type(arg), storage)
        )

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", numbers[value])
        if isinstance(value, (tuple, list)):
            return (type(value).__name__, *map(plain, value))
        if isinstance(value, dict):
            return ("dict", *((name, plain(item)) for name, item in value.items()))
        if isinstance(value, slice):
            return ("slice", plain(value.start), plain(value.stop), plain(value.step))
        return _frozen(value)

    nodes = []
    for node in region.graph.nodes:
        if node.op == "get_attr":
            # A constant, or a graph inside: whose content is not looked at.
            return None
        target = None if node.op == "placeholder" else node.target
        nodes.append((node.op, target, plain(node.args), plain(node.kwargs)))
    key = (tuple(nodes), tuple(inputs), static, _surroundings(settings))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Any:
    """Return what options of Inductor's say, to be compared by value and not by address.

    A number comes with its type: 1, 1.0 and True are equal, but compiled differently.
    """
    if isinstance(value, dict):
        return ("dict", *((name, _frozen(value[name])) for name in sorted(value, key=str)))
    if isinstance(value, (set, frozenset)):
        return ("set", frozenset(map(_frozen, value)))
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(_frozen, value))
    return (type(value), value)


def _surroundings(settings: Settings) -> tuple[Any, ...]:
    """Return what else compilers look at."""
    devices = ("cpu", "cuda")
    return (
        settings.compiler,
        _frozen(getattr(settings.inner, "config", {})),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        *itertools.chain.from_iterable(
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in devices
        ),
    )
