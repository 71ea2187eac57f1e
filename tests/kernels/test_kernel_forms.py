"""The forms in graphs: they compute what the op does, and sum as a compiler likes it."""

from __future__ import annotations

import pytest
import torch
from tolerances import TOLERANCES, relative_error
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pbfx_kernels import Geometry, dendrites
from pbfx_kernels.forms import Form, choose_form, dendrites_in_graph, parts_of_sum
from pbfx_kernels.problem import Problem

CONV = Geometry.convolution(2, padding=1)
LINEAR = Geometry()
# The soma's shape, the input's, one weight's, and the form of the site.
SITES = {
    "conv": ((3, 5, 7, 9), (3, 2, 7, 9), (5, 2, 3, 3), CONV),
    "grouped": ((3, 6, 7, 9), (3, 4, 7, 9), (6, 2, 3, 3), Geometry.convolution(2, 1, 1, 1, 2)),
    "tokens": ((2, 33, 6), (2, 33, 4), (6, 4), LINEAR),
    "long tokens": ((2, 96, 6), (2, 96, 4), (6, 4), LINEAR),
    "heads": ((2, 4, 64, 6), (2, 4, 64, 4), (6, 4), LINEAR),
    "rows": ((64, 6), (64, 4), (6, 4), LINEAR),
}
each_site = pytest.mark.parametrize("name", SITES)


def drawn(name: str, count: int) -> tuple[torch.Tensor, ...]:
    out, x, weight, _ = SITES[name]
    generator = torch.Generator().manual_seed(0)
    n = weight[0]
    shapes = [out, x, (count, *weight), (count, n), (count, n), (count, count, n)]
    soma, x, v, c, t, u = (torch.randn(shape, generator=generator) for shape in shapes)
    return soma.requires_grad_(), x.requires_grad_(), v, c, t.requires_grad_(), u


def in_graph(name: str, form: Form, in_parts: bool, *tensors: torch.Tensor) -> torch.Tensor:
    soma, _, weight = tensors[:3]
    geometry = SITES[name][3]
    neurons = soma.shape[geometry.channel_axis]
    shape = soma.shape if in_parts else None
    counts = len(weight), neurons, torch.float32, None, shape
    return dendrites_in_graph(form, *tensors, "tanh", geometry, *counts)[0]


def test_a_kernel_for_the_soma_too_has_to_save_what_an_op_costs():
    def form(rows: int, neurons: int, inputs: int, training: bool = True, count: int = 3) -> Form:
        shape = LINEAR, rows, neurons, inputs, 1, count
        problem = Problem("cuda", (9, 0), torch.bfloat16, True, *shape)
        assert choose_form(problem, training, False) is not Form.FUSED
        return choose_form(problem, training, False, with_soma=True)

    # Layers of GPT-2 small at 8 sequences of 512, and at 64; and one that is a tenth of them.
    assert form(4096, 768, 768) is Form.FUSED
    assert form(4096, 3072, 768) is Form.FUSED
    assert form(4096, 256, 768) is Form.PACKED
    assert form(32768, 3072, 768) is Form.FUSED
    assert form(65536, 256, 256) is Form.FUSED
    assert form(65536, 256, 256, count=1) is Form.FUSED
    assert form(8192, 256, 256, count=1) is Form.PACKED
    # Inference keeps nothing, and gains the more.
    assert form(8192, 256, 256) is Form.PACKED
    assert form(8192, 256, 256, training=False) is Form.FUSED
    # Likewise of few rows, where the weights are what is read, if they are many.
    assert form(1, 4096, 4096, training=False) is Form.FUSED
    assert form(1, 4096, 4096) is Form.PACKED
    assert form(1, 4096, 4096, training=False, count=1) is Form.FUSED
    assert form(256, 1024, 1024, training=False) is Form.PACKED


@pytest.mark.parametrize(
    ("count", "training", "with_soma", "expected"),
    [
        (1, False, True, Form.FUSED),
        (3, True, True, Form.FUSED),
        (3, False, False, Form.KERNEL),
        (1, False, False, Form.LOOPED),
        (3, True, False, Form.LOOPED),
        (9, False, True, Form.PACKED),
    ],
)
def test_depthwise_sites(count: int, training: bool, with_soma: bool, expected: Form) -> None:
    shape = Geometry.convolution(2, groups=144), 200704, 144, 1, 9, count
    problem = Problem("cuda", (9, 0), torch.bfloat16, True, *shape)
    assert choose_form(problem, training, True, with_soma) is expected


@each_site
@pytest.mark.parametrize("form", [Form.PACKED, Form.LOOPED])
@pytest.mark.parametrize("count", [1, 3])
def test_parts_of_sum_are_the_same_sums(name, form, count):
    tensors = drawn(name, count)
    soma, x, *_, to_soma, _ = tensors
    grad = torch.randn(soma.shape, generator=torch.Generator().manual_seed(1))
    wanted = dendrites(*tensors, "tanh", SITES[name][3])[0]
    expected = torch.autograd.grad(wanted, (soma, to_soma), grad)
    outs = [in_graph(name, form, in_parts, *tensors) for in_parts in (False, True)]
    assert torch.equal(*outs)
    for out in outs:
        assert relative_error(out, wanted) <= TOLERANCES[torch.float32]
        found = torch.autograd.grad(out, (soma, to_soma), grad, retain_graph=True)
        assert torch.equal(found[0], expected[0])
        assert relative_error(found[1], expected[1]) <= TOLERANCES[torch.float32]
        assert torch.autograd.grad(out, x, grad, allow_unused=True) == (None,)


@each_site
def test_the_sum_over_parts_comes_last(name):
    tensors = drawn(name, 2)
    soma, *_, to_soma, _ = tensors

    def backward(grad: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(in_graph(name, Form.PACKED, True, *tensors), to_soma, grad)[0]

    graph = make_fx(backward)(torch.ones_like(soma)).graph
    sums = graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)
    positions = soma.numel() // to_soma.shape[1]
    kept = [node.meta["val"].numel() // to_soma.shape[1] for node in sums]
    parts = parts_of_sum(soma.shape, SITES[name][3].channel_axis) or 0
    images = positions // 63 if SITES[name][3].spatial else soma[..., 0, 0].numel()
    # One for each dendrite within the parts, and one over the parts, of all dendrites.
    assert kept == [images * parts] * 2 + [2]
    padded = graph.find_nodes(op="call_function", target=torch.ops.aten.select_backward.default)
    assert not padded


def test_parts_are_worth_a_sum_and_enough_for_a_loop():
    # Images, whatever their number.
    assert parts_of_sum((8, 64, 7, 7), -3) == 1
    assert parts_of_sum((8, 64, 5, 6), -3) is None
    assert parts_of_sum((64, 26, 26), -3) is None
    # The fewest parts that make enough sums; else the most that are long enough.
    assert parts_of_sum((64, 128, 768), -1) == 1
    assert parts_of_sum((8, 512, 768), -1) == 8
    assert parts_of_sum((1024, 128), -1) == 32
    assert parts_of_sum((65536, 256), -1) == 128
    assert parts_of_sum((32, 197, 768), -1) == 1
    assert parts_of_sum((16, 768), -1) is None
    assert parts_of_sum((768,), -1) is None
    size = ShapeEnv().create_unbacked_symint()
    assert parts_of_sum((8, size, 768), -1) is None
    assert parts_of_sum((size, 768), -1) is None
    assert parts_of_sum((size, 512, 768), -1) == 16
    assert parts_of_sum((size, 64, 7, 7), -3) == 1
    assert parts_of_sum((8, 64, size, 7), -3) is None
