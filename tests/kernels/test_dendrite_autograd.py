"""Eager dendrites past the dispatcher: the same results as the op's, and the op for who looks."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BY_NAME, SITES, Site, Tensors, make_dendrites
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pbfx_kernels import dendrites, functional
from pbfx_kernels.errors import ArgumentError

KNOWN = [site for site in SITES if "empty" not in site.name]
OP = torch.ops.pbfx.dendrites.default


class Seen(TorchDispatchMode):
    """Records which ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def by_op(args: Tensors, site: Site, keep: bool) -> tuple[Tensor, Tensor]:
    g = site.geometry
    form = g.stride, g.padding, g.dilation, g.groups, g.transposed, g.output_padding
    return OP(*args.values(), "tanh", *form, keep)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("site", KNOWN, ids=[site.name for site in KNOWN])
def test_bit_for_bit_what_the_op_gives(site, keep):
    args = make_dendrites(site, 2).args()
    learning = args["soma"], args["to_soma"]
    results = []
    for call in (lambda: dendrites(**args, geometry=site.geometry, keep=keep),
                 lambda: by_op(args, site, keep)):  # fmt: skip
        out, activations = call()
        assert out.grad_fn is not None
        assert not activations.requires_grad
        grads = torch.autograd.grad(out.square().sum(), learning)
        results.append((out, *grads, *([activations] if keep else [])))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)
        assert found.stride() == wanted.stride()


def test_who_records_ops_sees_the_op():
    args = make_dendrites(BY_NAME["linear"], 2).args()
    assert "_Dendrites" in type(dendrites(**args)[0].grad_fn).__name__
    with Seen() as seen:
        dendrites(**args)
    assert OP in seen.ops


def test_no_gradient_where_none_is_wanted():
    args = make_dendrites(BY_NAME["conv2d"], 2).args()
    geometry = BY_NAME["conv2d"].geometry
    with torch.no_grad():
        out, _ = dendrites(**args, geometry=geometry)
    assert not out.requires_grad
    args["to_soma"] = args["to_soma"].detach()
    out, _ = dendrites(**args, geometry=geometry, keep=False)
    assert torch.equal(torch.autograd.grad(out.sum(), args["soma"])[0], torch.ones_like(out))


def test_what_was_checked_once_does_not_excuse_what_differs():
    args = make_dendrites(BY_NAME["linear"], 2).args()
    dendrites(**args)
    with pytest.raises(ArgumentError, match="to_soma"):
        dendrites(**args | {"to_soma": args["to_soma"][:, 1:]})
    with pytest.raises(ArgumentError, match="activation"):
        dendrites(**args, activation="step")


def test_links_have_no_second_derivative_and_say_so():
    args = make_dendrites(BY_NAME["linear"], 2).args()
    out, _ = dendrites(**args)
    (grad,) = torch.autograd.grad(out.square().sum(), args["to_soma"], create_graph=True)
    with pytest.raises(RuntimeError, match="dendrites_backward"):
        grad.sum().backward()


def test_a_backward_that_computes_again_sees_work_in_place(monkeypatch):
    monkeypatch.setattr(functional, "_backward_wants_activations", lambda *_: False)
    args = make_dendrites(BY_NAME["linear"], 2).args()
    x = args["x"].detach().clone()
    args = args | {"x": x}
    out, activations = dendrites(**args, keep=False)
    assert not len(activations)
    wanted = torch.autograd.grad(out.sum(), args["to_soma"], retain_graph=True)[0]
    assert wanted.abs().sum() > 0
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), args["to_soma"])
