"""Work in place that is put out of place: where it is safe, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pbfx.backend.out_of_place import put_out_of_place, written


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graph_of(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    found = []

    def keep(gm: fx.GraphModule, _: list[Tensor]):
        found.append(gm)
        return gm.forward

    torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    (gm,) = found
    return gm


def added(x: Tensor, y: Tensor) -> Tensor:
    out = x * 2
    out += y
    out -= 1
    return out


def activated(x: Tensor, y: Tensor) -> Tensor:
    dropped = F.dropout(x * y, 0.5, False, True)
    return F.relu(x + y, inplace=True) + F.elu(x - y, 1.0, True) + dropped


def called(x: Tensor, y: Tensor) -> Tensor:
    return torch.relu_(x + y) * torch.sigmoid_(x - y) + (x * y).mul_(3).clamp_(min=0.5)


def through_a_view(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).view(-1)[:3].add_(1)


def in_a_layer(x: Tensor, y: Tensor) -> Tensor:
    out = nn.functional.conv1d(x[None], y[None, :, :1])
    return nn.functional.hardtanh(out, -1.0, 1.0, True)


@pytest.mark.parametrize(
    ("function", "rewrites"),
    [(added, 2), (activated, 3), (called, 4), (through_a_view, 1), (in_a_layer, 1)],
)
def test_it_computes_anew(function, rewrites):
    x, y = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3)
    gm = graph_of(function, x, y)
    assert put_out_of_place(gm, None) == rewrites
    assert not [node for node in gm.graph.nodes if written(node) is not None]
    gm.graph.lint()
    gm.recompile()
    assert put_out_of_place(gm, None) == 0
    wanted = function(x, y)
    given = {"l_x_": x, "l_y_": y}
    found = gm(*[given[node.name] for node in gm.graph.find_nodes(op="placeholder")])
    assert torch.equal(found[0], wanted)
    (gradient,) = torch.autograd.grad(found[0].square().sum(), x)
    (expected,) = torch.autograd.grad(wanted.square().sum(), x)
    torch.testing.assert_close(gradient, expected)


def over_an_input(x: Tensor, y: Tensor) -> Tensor:
    y += 1
    return x + y.t().relu_()


def read_afterwards(x: Tensor, y: Tensor) -> Tensor:
    out = x * 2
    return out.add_(y) + out


def seen_from_another_side(x: Tensor, y: Tensor) -> Tensor:
    out = x * 2
    view = out[0]
    out.add_(y)
    return view + 1


def a_part(x: Tensor, y: Tensor) -> Tensor:
    out = x * 2
    out[0].relu_()
    return out + y


def set_apart(x: Tensor, y: Tensor) -> Tensor:
    out = x * 2
    out[0] = y[0]
    return out


def of_another_dtype(x: Tensor, y: Tensor) -> Tensor:
    out = x.half()
    out += y
    return out


def without_gradients(x: Tensor, y: Tensor) -> Tensor:
    out = x * 2
    with torch.no_grad():
        out += y
    return out * 2


def in_autocast(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out = x @ y
        return out.exp_()


def has_no_other_form(x: Tensor, y: Tensor) -> Tensor:
    return (x * 2).copy_(y)


@pytest.mark.parametrize(
    "function",
    [
        over_an_input,
        read_afterwards,
        seen_from_another_side,
        a_part,
        set_apart,
        of_another_dtype,
        without_gradients,
        in_autocast,
        has_no_other_form,
    ],
)
def test_it_does_not_fire(function):
    gm = graph_of(function, torch.randn(3, 3, requires_grad=True), torch.randn(3, 3))
    before = str(gm.graph)
    assert put_out_of_place(gm, None) == 0
    assert str(gm.graph) == before
    assert [node for node in gm.graph.nodes if written(node) is not None]


def test_after_a_switch_it_goes_on():
    def function(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            scale = y.abs()
            scale += 1
        out = x * scale
        out += y
        return out

    gm = graph_of(function, torch.randn(3, 3, requires_grad=True), torch.randn(3, 3))
    assert put_out_of_place(gm, None) == 1


def test_a_graph_that_does_not_tell_is_left_alone():
    gm = graph_of(added, torch.randn(3, 3), torch.randn(3, 3))
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    del node.meta["example_value"]
    assert put_out_of_place(gm, None) == 0


def test_what_is_written():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for node, tensor in (
        (graph.call_method("add_", (x, y)), x),
        (graph.call_method("__add__", (x, y)), None),
        (graph.call_function(torch.add, (x, y)), None),
        (graph.call_function(torch.add, (x, x), {"out": y}), y),
        (graph.call_function(F.relu, (x, True)), x),
        (graph.call_function(F.relu, (x, False)), None),
        (graph.call_function(F.dropout, (x, 0.5, True)), None),
        (graph.call_function(F.dropout, (x, 0.5, True, True)), x),
        (graph.call_function(F.silu, (), {"input": x, "inplace": True}), x),
        (x, None),
    ):
        assert written(node) is tensor
