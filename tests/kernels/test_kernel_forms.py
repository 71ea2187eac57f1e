"""The forms in graphs: they compute what the op does, and sum as a compiler likes it."""

from __future__ import annotations

import pytest
import torch
from tolerances import TOLERANCES, relative_error
from torch.fx.experimental.proxy_tensor import make_fx

from pbfx_kernels import Geometry, dendrites
from pbfx_kernels.forms import Form, dendrites_in_graph, sums_by_image

CONV = Geometry.convolution(2, padding=1)
LINEAR = Geometry()
# The soma's shape, the input's, one weight's, and the form of the site.
SITES = {
    "conv": ((3, 5, 7, 9), (3, 2, 7, 9), (5, 2, 3, 3), CONV),
    "grouped": ((3, 6, 7, 9), (3, 4, 7, 9), (6, 2, 3, 3), Geometry.convolution(2, 1, 1, 1, 2)),
    "tokens": ((2, 33, 6), (2, 33, 4), (6, 4), LINEAR),
    "heads": ((2, 4, 11, 6), (2, 4, 11, 4), (6, 4), LINEAR),
}
each_site = pytest.mark.parametrize("name", SITES)


def drawn(name: str, count: int) -> tuple[torch.Tensor, ...]:
    out, x, weight, _ = SITES[name]
    generator = torch.Generator().manual_seed(0)
    n = weight[0]
    shapes = [out, x, (count, *weight), (count, n), (count, n), (count, count, n)]
    soma, x, v, c, t, u = (torch.randn(shape, generator=generator) for shape in shapes)
    return soma.requires_grad_(), x.requires_grad_(), v, c, t.requires_grad_(), u


def in_graph(name: str, form: Form, by_image: bool, *tensors: torch.Tensor) -> torch.Tensor:
    soma, _, weight = tensors[:3]
    geometry = SITES[name][3]
    neurons = soma.shape[geometry.channel_axis]
    axes = soma.dim() if by_image else None
    counts = len(weight), neurons, torch.float32, None, axes
    return dendrites_in_graph(form, *tensors, "tanh", geometry, *counts)[0]


@each_site
@pytest.mark.parametrize("form", [Form.PACKED, Form.LOOPED])
@pytest.mark.parametrize("count", [1, 3])
def test_sums_by_image_are_the_same_sums(name, form, count):
    tensors = drawn(name, count)
    soma, x, *_, to_soma, _ = tensors
    grad = torch.randn(soma.shape, generator=torch.Generator().manual_seed(1))
    wanted = dendrites(*tensors, "tanh", SITES[name][3])[0]
    expected = torch.autograd.grad(wanted, (soma, to_soma), grad)
    outs = [in_graph(name, form, by_image, *tensors) for by_image in (False, True)]
    assert torch.equal(*outs)
    for out in outs:
        assert relative_error(out, wanted) <= TOLERANCES[torch.float32]
        found = torch.autograd.grad(out, (soma, to_soma), grad, retain_graph=True)
        assert torch.equal(found[0], expected[0])
        assert relative_error(found[1], expected[1]) <= TOLERANCES[torch.float32]
        assert torch.autograd.grad(out, x, grad, allow_unused=True) == (None,)


@each_site
def test_the_sum_over_images_comes_last(name):
    tensors = drawn(name, 2)
    soma, *_, to_soma, _ = tensors

    def backward(grad: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(in_graph(name, Form.PACKED, True, *tensors), to_soma, grad)[0]

    graph = make_fx(backward)(torch.ones_like(soma)).graph
    sums = graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)
    axis = soma.dim() + SITES[name][3].channel_axis
    inner = {i for i in range(1, soma.dim()) if i != axis}
    reduced = [{i % soma.dim() for i in node.args[1]} for node in sums]
    # One for each dendrite within the image, and one over the images, of all dendrites.
    assert reduced[:2] == [inner, inner]
    assert len(sums) == 3
    padded = graph.find_nodes(op="call_function", target=torch.ops.aten.select_backward.default)
    assert not padded


def test_only_images_with_enough_positions_are_worth_it():
    assert sums_by_image((8, 64, 7, 7), -3)
    assert sums_by_image((8, 128, 768), -1)
    assert not sums_by_image((8, 64, 5, 6), -3)
    # Rows without images, one image, and what is not known before it runs.
    assert not sums_by_image((4096, 768), -1)
    assert not sums_by_image((64, 26, 26), -3)
    shape_env = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    size = shape_env.create_unbacked_symint()
    assert not sums_by_image((8, size, 768), -1)
    assert sums_by_image((size, 128, 768), -1)
