"""`pbfx.lower`: a graph for inference that computes the same, and holds nothing else."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pbfx
from models import (
    CASES,
    Case,
    assert_equal,
    assert_lowers,
    assert_near,
    each_case,
    perceptron,
    randomise,
    run,
)
from pbfx.candidates import Candidates
from pbfx.dendrites import Dendrites
from pbfx.neurons import Neurons, PackedDendrites
from pbfx.pipeline import LOWERING, op_name
from pbfx.restructure import start_dendrite_phase
from zoo.member import tensors_of
from zoo.registry import ZOO


def grown(case: Case, dendrites: int) -> nn.Module:
    """Return a transformed model with running statistics and dendrites that matter."""
    model = pbfx.transform(case.build())
    with torch.no_grad():
        for seed in range(3):
            run(model, case.input(seed))
    if dendrites:
        randomise(pbfx.grow(model, dendrites))
    return model


def ops(model: fx.GraphModule) -> list[str]:
    return [op_name(model, node) for node in model.graph.nodes]


@each_case
@pytest.mark.parametrize("dendrites", [0, 1, 3])
def test_it_computes_the_same(case: Case, dendrites: int):
    model, x = grown(case, dendrites), case.input()
    lowered = assert_lowers(model, x)
    assert isinstance(lowered, fx.GraphModule)
    assert not isinstance(lowered, pbfx.PerforatedModule)
    assert [record.name for record in lowered.records] == [p.__name__ for p in LOWERING]
    assert not any(isinstance(m, (Dendrites, Candidates)) for m in lowered.modules())
    expected = run(lowered, x)
    for twin in (copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered)), copy.copy(lowered)):
        assert type(twin).__name__ == type(lowered).__name__
        assert_equal(run(twin, x), expected)
        assert twin.code == lowered.code
        assert list(twin.state_dict()) == list(lowered.state_dict())
    own = {id(t) for t in [*model.parameters(), *model.buffers()]}
    deep = copy.deepcopy(lowered)
    assert not own & {id(t) for t in [*deep.parameters(), *deep.buffers()]}


@pytest.mark.parametrize("member", ZOO.values(), ids=ZOO.keys())
def test_the_zoo(member):
    model = pbfx.transform(member.fresh())
    args, kwargs = member.arguments(training=True)
    with torch.no_grad():
        model.train()(*args, **kwargs)
        # Small ones: a unit of a few neurons would else die behind its relu.
        randomise(pbfx.grow(model, 2), scale=0.1)
        lowered = pbfx.lower(model.eval())
        args, kwargs = member.arguments(training=False)
        outputs = []
        for each in (model, lowered):
            torch.manual_seed(3)
            outputs.append(tensors_of(each(*args, **kwargs)))
        assert_near(outputs[1], outputs[0])
        for twin in (copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))):
            torch.manual_seed(3)
            assert_equal(tensors_of(twin(*args, **kwargs)), outputs[1])
        if not isinstance(lowered, pbfx.LoweredModule):
            for method in member.methods.values():
                found, wanted = tensors_of(method(lowered)), tensors_of(method(model))
                assert [t.shape for t in found] == [t.shape for t in wanted]
    assert not any(isinstance(m, (Dendrites, pbfx.PerforatedModule)) for m in lowered.modules())
    packed = [m for m in lowered.modules() if isinstance(m, (Neurons, PackedDendrites))]
    assert len(packed) >= len(pbfx.explain(model).sites)


def test_the_graph_holds_neurons_and_nothing_of_training():
    model = grown(CASES["perceptron"], 2)
    lowered = pbfx.lower(model)
    assert ops(lowered) == ["placeholder", "Neurons", "ReLU", "Neurons", "output"]
    assert sorted(lowered.state_dict()) == [
        f"{site}.neurons.{role}"
        for site in (0, 4)
        for role in ("bias", "to_dendrite", "to_soma", "weight")
    ]
    assert lowered.get_parameter("0.neurons.weight").shape == (24, 5)
    assert not any(p.requires_grad for p in lowered.parameters())
    for mode in (True, False):
        assert not any(m.training for m in lowered.train(mode).modules())
    # One product for the soma and its dendrites.
    calls = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Spy():
        lowered(CASES["perceptron"].input())
    assert calls.count("linear") == 2
    assert not {"batch_norm", "dropout"} & set(calls)


def test_what_nothing_is_folded_into_is_shared():
    model = grown(CASES["residual"], 1)
    lowered = pbfx.lower(model)
    for name, parameter in lowered.named_parameters():
        if "neurons" not in name:
            assert parameter is model.get_parameter(name), name
    assert {name.rpartition(".")[0] for name, _ in lowered.named_parameters()} == {
        *("blocks.0.norm", "blocks.1.norm"),
        *("blocks.0.fc.neurons", "blocks.1.fc.neurons", "head.neurons"),
    }
    # A plain model has nothing to fold here either.
    plain = pbfx.lower(pbfx.transform(CASES["residual"].build()))
    assert [n for n, _ in plain.named_parameters() if "neurons" in n] == []


def test_what_is_packed_does_not_follow_further_training():
    model, x = grown(CASES["perceptron"], 1), CASES["perceptron"].input()
    lowered = pbfx.lower(model)
    before = run(lowered, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert_equal(run(lowered, x), before)


def test_candidates_are_gone():
    model, x = grown(CASES["convolutional"], 1), CASES["convolutional"].input()
    start_dendrite_phase(model)
    lowered = assert_lowers(model, x)
    assert not any("candidates" in name for name in lowered.state_dict())
    assert model.perforation.phase is pbfx.Phase.DENDRITE


@pytest.mark.parametrize("learning", ["sham", "perforated"])
def test_dendrites_that_reach_nothing_are_left_out(learning: str):
    model = pbfx.grow(pbfx.transform(perceptron(), pbfx.Config(learning=learning)), 3)
    with torch.no_grad():
        head = model.grown()["4"]
        # The second feeds the third, which is the only one with a link.
        head.to_soma[2] = 1.0
        head.to_dendrite[2, 1] = 1.0
        head.to_dendrite[1, 0] = 0.0
        head.to_dendrite[2, 0] = 0.0
    lowered = assert_lowers(model, CASES["perceptron"].input())
    assert lowered.get_parameter("0.neurons.to_soma").shape == (0, 8)
    assert lowered.get_parameter("4.neurons.to_soma").shape == (2, 3)


def test_norms_may_stay():
    model, x = grown(CASES["convolutional"], 1).eval(), CASES["convolutional"].input()
    lowered = pbfx.lower(model, fold_norms=False)
    assert_near(run(lowered, x), run(model, x))
    assert "batch_norm" in ops(lowered)
    assert lowered.notes == {"conv1": "norms are not to be folded"}
    assert isinstance(lowered.get_submodule("conv1.packed_dendrites"), PackedDendrites)


class Rows(nn.Module):
    """A norm over the neurons or over the rows, whichever axis 1 is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


def test_a_norm_over_another_axis_is_never_folded_unnoticed():
    model = pbfx.transform(Rows())
    model.norm.running_mean.copy_(torch.arange(4.0))
    assert_lowers(pbfx.grow(model), torch.randn(5, 3))
    x = torch.randn(5, 4, 3)
    with pytest.raises(pbfx.ConfigError, match=r"'fc' for inputs of 2 axes.*\(5, 4, 3\).*fold_nor"):
        pbfx.lower(model)(x)
    assert_near(run(pbfx.lower(model, fold_norms=False), x), run(model.eval(), x))


def test_one_weight_before_two_norms():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.conv(x)) + self.two(self.conv(x)) + self.conv(x)

    model = pbfx.transform(Net())
    model.two.running_mean.fill_(2.0)
    randomise(pbfx.grow(model, 2))
    lowered = assert_lowers(model, torch.randn(2, 2, 6))
    assert sorted(n for n, m in lowered.named_modules() if isinstance(m, Neurons)) == [
        *("conv.neurons", "conv.neurons_1", "conv.neurons_2"),
    ]


def test_hooks_go_on_firing():
    model, heard = pbfx.transform(CASES["perceptron"].build()), []
    model.get_submodule("4").register_forward_hook(lambda *_: heard.append("layer"))
    model.register_forward_hook(lambda m, a, out: heard.append("model") or out * 2)
    randomise(pbfx.grow(model))
    lowered = assert_lowers(model, CASES["perceptron"].input())
    assert heard == ["layer", "model"] * 2
    assert lowered.notes == {"4": "it has hooks, which have to see its call"}


class Kept(nn.Module):
    """Runs its own forward, which asks about the layers that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.body.width = 4
        self.head = nn.Linear(4, 3)
        self.grouped = nn.Conv1d(4, 6, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.to(self.head.weight.dtype))
        if x.shape[0] > 1:
            x = x + self.body.width
        x = self.head(x) + self.head.bias * self.head.weight.sum()
        return x + self.grouped(torch.ones(4, 1, dtype=x.dtype)).sum() * self.grouped.weight.mean()


def test_a_model_of_parts_becomes_a_copy_with_lowered_parts():
    model = pbfx.transform(Kept())
    randomise(pbfx.grow(model, 2))
    x = torch.randn(5, 4)
    lowered = assert_lowers(model, x)
    assert type(lowered) is Kept
    parts = {n: m for n, m in lowered.named_modules() if isinstance(m, pbfx.LoweredModule)}
    assert sorted(parts) == ["body", "grouped", "head"]
    assert isinstance(lowered.body, nn.Sequential)
    assert lowered.body.width == 4
    assert isinstance(lowered.head, nn.Linear)
    for name in ("head", "grouped"):
        torch.testing.assert_close(
            getattr(lowered, name).weight, model.get_parameter(f"{name}.weight").detach()
        )
    for twin in (copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))):
        assert_equal(run(twin, x), run(lowered, x))
    # What the model was captured as, it still is.
    assert all(isinstance(model.get_submodule(name), pbfx.PerforatedModule) for name in parts)


def test_a_part_that_was_transformed_by_itself():
    model = Kept()
    model.head = pbfx.transform(model.head)
    randomise(pbfx.grow(model, 2))
    lowered = assert_lowers(model, torch.randn(5, 4))
    assert isinstance(lowered.head, nn.Linear)
    assert lowered.head.in_features == 4


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.shape[0] > 1 else self.block[0](x)


def test_containers_inside_of_a_lowered_part_do_not_leave_dendrites_out():
    model = pbfx.transform(Blocks())
    randomise(pbfx.grow(model, 2))
    assert_lowers(model, torch.randn(2, 3))
    lowered = pbfx.lower(model)
    with pytest.raises((NotImplementedError, AttributeError, TypeError)):
        lowered(torch.randn(1, 3))
    # Called once before, it is a graph of its own.
    model(torch.randn(1, 3))
    assert_lowers(model, torch.randn(1, 3))
    assert_lowers(model, torch.randn(2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moving_and_narrowing(dtype: torch.dtype):
    model, x = grown(CASES["convolutional"], 2).eval(), CASES["convolutional"].input()
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = wide(x.double())
        lowered = pbfx.lower(model).to(dtype)
        found = lowered(x.to(dtype))
        late = pbfx.lower(model.to(dtype))(x.to(dtype))
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for out in (found, late):
        assert (out.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*:DeprecationWarning")
def test_scripted_layers_keep_their_mode():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.drop = nn.Linear(3, 3), torch.jit.script(nn.Dropout(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.fc(x))

    model = pbfx.transform(Net()).train()
    randomise(pbfx.grow(model))
    lowered = pbfx.lower(model)
    assert model.drop.training
    assert not lowered.drop.training
    x = torch.randn(4, 3)
    assert_near(run(lowered, x), run(model.eval(), x))


def test_meta_models():
    with torch.device("meta"):
        model = pbfx.transform(perceptron())
        pbfx.grow(model, 2)
        lowered = pbfx.lower(model)
        assert lowered(torch.empty(7, 5)).shape == (7, 3)
    assert lowered.get_parameter("0.neurons.weight").is_meta


def test_an_exported_capture():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 4))
            self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)

        def forward(self, batch: dict[str, Tensor], skip: Tensor | None = None) -> Tensor:
            y = self.drop(F.linear(batch["x"], self.w))
            y = F.dropout(y if skip is None else y + skip, 0.5, self.training)
            mean, variance = self.norm.running_mean, self.norm.running_var
            return F.batch_norm(F.linear(y, self.v), mean, variance, training=self.training)

    batch = {"x": torch.randn(5, 3)}
    model = pbfx.transform(Net(), pbfx.Config(capture="export"), example_inputs=(batch,))
    randomise(pbfx.grow(model, 2))
    lowered = pbfx.lower(model.train())
    assert type(lowered).__mro__[1] is pbfx.LoweredModule
    assert not any("batch_norm" in name for name in ops(lowered))
    model.eval()
    with torch.no_grad():
        assert_near([lowered(batch)], [model(batch)])


def test_compiled_models():
    model, x = grown(CASES["convolutional"], 2), CASES["convolutional"].input()
    lowered = pbfx.lower(torch.compile(model))
    compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_near(run(compiled, x), run(lowered, x))
    torch._dynamo.reset()


def test_gradients_to_the_input_are_those_of_the_function():
    lowered = pbfx.lower(grown(CASES["perceptron"], 2)).double()
    x = CASES["perceptron"].input().double().requires_grad_()
    assert torch.autograd.gradcheck(lowered, (x,))


@pytest.mark.parametrize("wrong", [perceptron, 3, None])
def test_only_modules_can_be_lowered(wrong):
    with pytest.raises(pbfx.ConfigError, match=r"pbfx\.lower: model must be an nn\.Module"):
        pbfx.lower(wrong)


def test_only_transformed_models_can_be_lowered():
    with pytest.raises(pbfx.RestructureError, match="has no perforated parts"):
        pbfx.lower(perceptron())
    with pytest.raises(pbfx.RestructureError, match="has been lowered already; lower the model"):
        pbfx.lower(pbfx.lower(pbfx.transform(perceptron())))


def test_a_pass_that_fails_leaves_the_model(monkeypatch: pytest.MonkeyPatch):
    def fuse_neurons(gm, ctx):
        gm.graph.erase_node(next(iter(gm.graph.nodes)))

    model, x = grown(CASES["convolutional"], 1), CASES["convolutional"].input()
    state, code, expected = dict(model.state_dict()), model.code, run(model.eval(), x)
    monkeypatch.setattr(sys.modules["pbfx.lower"], "LOWERING", (LOWERING[0], fuse_neurons))
    with pytest.raises(pbfx.PassError, match="pass fuse_neurons failed"):
        pbfx.lower(model)
    assert model.code == code
    assert state.keys() == model.state_dict().keys()
    assert_equal(run(model, x), expected)
