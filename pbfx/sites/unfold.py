"""Take a layer apart that computes linear maps inside one call, so that these show in the graph.

    h, c = cell(x, (h, c))      ->      i = W_ih x + b_ih;  g = W_hh h + b_hh;  h, c = step(i, g, c)
    a, w = attention(q, k, v)   ->      qkv = W_in x + b_in;  a, w = attend(qkv);  W_out a + b_out

Safe because the parts make torch's own calls in torch's order. A graph runs them only where
dendrites have grown; what has none keeps its one call. A layer with hooks, or of which a subclass
changes the forward, stays whole.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from pbfx.attention import attend, project_apart, sequence_back, sequence_first, split_projection
from pbfx.cells import (
    cell_input,
    cell_map,
    cell_state,
    gru_step,
    lstm_state,
    lstm_step,
    rnn_step,
)
from pbfx.paths import join

CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
UNFOLDABLE = (*CELLS, nn.MultiheadAttention)
# The arguments of attention that shape its graph.
_FLAGS = ("need_weights", "average_attn_weights", "is_causal")


def why_folded(module: nn.Module, node: fx.Node) -> str | None:
    """Return why the call `node` of an unfoldable `module` stays whole, or None."""
    base = next(base for base in UNFOLDABLE if isinstance(module, base))
    if "forward" in module.__dict__ or type(module).forward is not base.forward:
        return f"it computes something else than {base.__name__}, in one call"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks, which have to see its call as one"
    parameters = dict(module.named_parameters())
    expected = {"weight_ih", "weight_hh"} if isinstance(module, CELLS) else {"out_proj.weight"}
    if not expected <= parameters.keys():
        return "its weights are computed, and it reads them inside one call"
    if not isinstance(module, nn.MultiheadAttention):
        return None
    given = bind_arguments(module, node)
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return "it lengthens its keys (add_bias_kv or add_zero_attn), which is not taken apart"
    if any(isinstance(given[flag], fx.Node) for flag in _FLAGS):
        return f"one of {', '.join(_FLAGS)} is computed"
    if given["is_causal"] and given["attn_mask"] is None:
        return "it is called with is_causal and without attn_mask, which is an error in torch"
    weights = ("in_proj_weight",) if module._qkv_same_embed_dim else ("q_proj_weight",)
    return None if {*weights} <= parameters.keys() else "its weights are computed"


def bind_arguments(module: nn.Module, node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by their names, defaults filled in."""
    bound = inspect.signature(type(module).forward).bind(module, *node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def unfold(root: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    """Replace the call `node` of an unfoldable module by its parts."""
    path, module = str(node.target), root.get_submodule(str(node.target))
    before = node.prev
    with graph.inserting_before(node):
        taken = _attention if isinstance(module, nn.MultiheadAttention) else _cell
        result = taken(graph, path, module, bind_arguments(module, node))
    added = before.next
    while added is not node:
        added.meta.update({k: v for k, v in node.meta.items() if k in _PROVENANCE})
        added = added.next
    node.replace_all_uses_with(result)
    graph.erase_node(node)


_PROVENANCE = ("stack_trace", "nn_module_stack")


def unfolded(root: nn.Module, graph: fx.Graph) -> fx.Graph:
    """Return a copy of `graph` in which every layer that can be is taken apart."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in list(copied.nodes):
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            if isinstance(module, UNFOLDABLE) and why_folded(module, node) is None:
                unfold(root, copied, node)
    return copied


def is_cell(module: nn.Module) -> bool:
    """Return whether `module` computes what a recurrent cell of torch's does, with parameters."""
    parameters = module._parameters
    return (
        "forward" not in module.__dict__
        and any(isinstance(module, base) and type(module).forward is base.forward for base in CELLS)
        and parameters.get("weight_ih") is not None
        and parameters.get("weight_hh") is not None
    )


def graph_of_cell(cell: nn.Module) -> fx.Graph:
    """Return the graph of a recurrent cell by itself, taken apart, over the cell as its root.

    Its forward asks for the number of axes, which no tracing follows.
    """
    graph = fx.Graph()
    names = inspect.signature(type(cell).forward).parameters
    given = {
        name: graph.placeholder(name, default_value=names[name].default)
        for name in names
        if name != "self"
    }
    graph.output(_cell(graph, "", cell, given))
    return graph


def _read(graph: fx.Graph, path: str, module: nn.Module, name: str) -> fx.Node | None:
    owner, _, attribute = name.rpartition(".")
    value = getattr(module.get_submodule(owner), attribute)
    return None if value is None else graph.create_node("get_attr", join(path, name), (), {})


def _cell(graph: fx.Graph, path: str, module: Any, given: dict[str, Any]) -> fx.Node:
    x, state, size = given["input"], given["hx"], module.hidden_size
    names = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
    w_i, b_i, w_h, b_h = (_read(graph, path, module, name) for name in names)
    second = None
    if isinstance(module, nn.LSTMCell):
        pair = graph.call_function(lstm_state, (x, state, size))
        hidden, second = (graph.call_function(operator.getitem, (pair, i)) for i in (0, 1))
    else:
        hidden = graph.call_function(cell_state, (x, state, size))
    rows = graph.call_function(cell_input, (x,))
    plain = isinstance(module, nn.RNNCell)
    op = F.linear if plain else cell_map
    i = graph.call_function(op, (rows, w_i, b_i))
    h = graph.call_function(op, (hidden, w_h, b_h))
    if plain:
        return graph.call_function(rnn_step, (i, h, module.nonlinearity, x))
    if second is not None:
        return graph.call_function(lstm_step, (i, h, second, b_i, b_h, x))
    return graph.call_function(gru_step, (i, h, hidden, b_i, b_h, x))


def _attention(graph: fx.Graph, path: str, module: Any, given: dict[str, Any]) -> fx.Node:
    inputs = [given[name] for name in ("query", "key", "value")]
    turned = {
        x: graph.call_function(sequence_first, (x, module.batch_first))
        for x in dict.fromkeys(inputs)
    }
    bias = _read(graph, path, module, "in_proj_bias")
    heads = _project(graph, path, module, [turned[x] for x in inputs], bias)
    training = graph.create_node("get_attr", join(path, "training"), (), {})
    mixed = graph.call_function(
        attend,
        (*heads, given["key_padding_mask"], given["attn_mask"], inputs[0], training),
        {
            "heads": module.num_heads,
            "dropout": module.dropout,
            "need_weights": given["need_weights"],
            "average_weights": given["average_attn_weights"],
            "is_causal": given["is_causal"],
        },
    )
    flat, weights = (graph.call_function(operator.getitem, (mixed, index)) for index in (0, 1))
    names = ("out_proj.weight", "out_proj.bias")
    out = graph.call_function(F.linear, (flat, *(_read(graph, path, module, n) for n in names)))
    return graph.call_function(sequence_back, (out, weights, inputs[0], module.batch_first))


def _project(
    graph: fx.Graph, path: str, module: Any, inputs: list[fx.Node], bias: fx.Node | None
) -> list[fx.Node]:
    """Return the projected query, key and value."""

    def entries(node: fx.Node) -> list[fx.Node]:
        return [graph.call_function(operator.getitem, (node, index)) for index in range(3)]

    if not module._qkv_same_embed_dim:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = [_read(graph, path, module, name) for name in names]
        rows = None if bias is None else graph.call_method("chunk", (bias, 3))
        biases = [None] * 3 if rows is None else entries(rows)
        return [
            graph.call_function(F.linear, arguments)
            for arguments in zip(inputs, weights, biases, strict=True)
        ]
    weight = _read(graph, path, module, "in_proj_weight")
    query, key, value = inputs
    if query is key and key is value:
        packed = graph.call_function(F.linear, (query, weight, bias))
        return entries(graph.call_function(split_projection, (packed, 3)))
    shared = key is value
    return entries(graph.call_function(project_apart, (query, key, value, weight, bias, shared)))
