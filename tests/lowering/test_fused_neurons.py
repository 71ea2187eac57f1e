"""Lowered linear neurons in the layout of a GPU's kernel: what else they must still do.

There is no such GPU here, so the rule that chooses the layout is told to say yes.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import pbfx
from models import CASES, assert_equal, assert_lowers, assert_near, randomise, run
from pbfx.neurons import FusedNeurons, Neurons
from pbfx_kernels import frozen

NAMES = ("perceptron", "functional", "shared", "residual", "attention", "convolutional")


@pytest.fixture(autouse=True)
def _kernel_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "wins", lambda stacked: stacked.shape[0] > 1)


def grown(name: str, dendrites: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = pbfx.transform(CASES[name].build())
    with torch.no_grad():
        run(model, CASES[name].input(2))
    randomise(pbfx.grow(model, dendrites))
    return model.eval()


def kinds(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules() if isinstance(m, Neurons)]


@pytest.mark.parametrize("dendrites", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_it_computes_the_same(name: str, dendrites: int):
    model, x = grown(name, dendrites), CASES[name].input()
    lowered = assert_lowers(model, x)
    assert FusedNeurons in kinds(lowered)
    for twin in (copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))):
        assert kinds(twin) == kinds(lowered)
        assert_equal(run(twin, x), run(lowered, x))
    portable = pbfx.lower(model, portable=True)
    assert set(kinds(portable)) == {Neurons}
    assert_near(run(portable, x), run(lowered, x))


def test_what_it_leaves_to_packed_neurons():
    model = grown("convolutional")
    # A convolution, and a linear op whose dendrites reach nothing.
    with torch.no_grad():
        model.get_submodule("fc").dendrites.to_soma.zero_()
    assert FusedNeurons not in kinds(assert_lowers(model, CASES["convolutional"].input()))
    assert kinds(pbfx.lower(grown("perceptron"))) == [FusedNeurons, FusedNeurons]


# Of torch itself: exporting recurrent layers.
@pytest.mark.filterwarnings(
    "ignore:The tensor attributes .*were assigned during export:UserWarning"
)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["perceptron", "attention"])
def test_it_exports_without_pbfx(name: str, strict: bool, monkeypatch: pytest.MonkeyPatch):
    # As if the input were on a GPU: what is exported there must not hold the op either.
    monkeypatch.setattr(frozen, "_on_gpu", lambda x: True)
    model, x = grown(name), CASES[name].input()
    lowered = pbfx.lower(model)
    program = torch.export.export(lowered, (x,), strict=strict)
    modules = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = {str(n.target) for m in modules for n in m.graph.nodes if n.op == "call_function"}
    assert not any("pbfx" in target for target in called)
    with torch.no_grad():
        assert_near(run(program.module(), x), run(model, x))


def test_a_compiled_graph_holds_the_op(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frozen, "_on_gpu", lambda x: True)
    model, x = grown("perceptron"), CASES["perceptron"].input()
    lowered, graphs = pbfx.lower(model), []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append({node.target for node in gm.graph.nodes})
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(lowered, backend=backend, fullgraph=True)(x)
        assert_near([found], [model(x)])
    assert torch.ops.pbfx.frozen_neurons.default in graphs[0]
    # Gradients to the input are those of plain torch.
    compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True)
    given = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(compiled(given).sum(), given)
    (wanted,) = torch.autograd.grad(pbfx.lower(model, portable=True)(given).sum(), given)
    assert_near([found], [wanted])
    torch._dynamo.reset()


def test_a_layer_answers_for_its_soma():
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 1:
                x = x + 1
            return self.head(x) + self.head.bias * self.head.weight.sum()

    model = pbfx.transform(Kept())
    randomise(pbfx.grow(model, 2))
    lowered = assert_lowers(model, torch.randn(5, 4))
    assert kinds(lowered) == [FusedNeurons]
    for role in ("weight", "bias"):
        assert torch.equal(getattr(lowered.head, role), model.get_parameter(f"head.{role}"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moving_and_narrowing(dtype: torch.dtype):
    model, x = grown("perceptron"), CASES["perceptron"].input()
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        found = pbfx.lower(model).to(dtype)(x.to(dtype))
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_explain_counts_them_as_one_product():
    (report,) = pbfx.explain(grown("perceptron"), lowered=True).lowered
    assert report.fused == ("0", "4")
    assert report.apart == ()
