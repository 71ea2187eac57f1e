"""Models as torch.export sees them: one graph, whatever forward asks, and the user's own still."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import pickle
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

import pbfx
from models import CASES, Case, Convolutional, Residual, assert_equal, each_case, randomise, run
from pbfx.kept import kept_modules
from pbfx.parts import parts_of
from pbfx.restructure import start_dendrite_phase

# torch traces its own tracing in detail when anything listens, as pytest does.
logging.getLogger("torch.__trace").disabled = True

EXPORT = pbfx.Config(capture="export")


def exported(model: nn.Module, *inputs: Any, shapes: Any = None, **named: Any) -> nn.Module:
    return pbfx.transform(model, EXPORT, example_inputs=named or inputs, dynamic_shapes=shapes)


@functools.cache
def exported_case(name: str) -> nn.Module:
    """Return the case of that name, exported, for tests to copy."""
    return exported(CASES[name].build(), CASES[name].input())


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors of an output of any class."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, (int, str, type(None))):
        return []
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in tensors(part)]


def same(model: nn.Module, ours: nn.Module, *inputs: Any, **named: Any) -> None:
    """Assert equal outputs, gradients and states in both modes, and the same class of output."""
    for training in (True, False):
        results = []
        for one in (model, ours):
            twin = copy.deepcopy(one).train(training)
            torch.manual_seed(4)
            out = twin(*copy.deepcopy(inputs), **copy.deepcopy(named))
            sum(t.float().sum() for t in tensors(out)).backward()
            grads = {k: p.grad for k, p in twin.named_parameters() if p.grad is not None}
            results.append((out, twin.state_dict(), grads))
        (expected, state, grads), (found, ours_state, ours_grads) = results
        assert type(found) is type(expected)
        assert_equal(tensors(found), tensors(expected))
        for one, other in ((state, ours_state), (grads, ours_grads)):
            assert list(one) == list(other)
            assert all(torch.equal(one[key], other[key]) for key in one)


@each_case
def test_every_model_is_one_graph(case: Case):
    model, x = case.build(), case.input()
    before = copy.deepcopy(model.state_dict()), model.training
    torch.manual_seed(0)
    stream, modes = torch.get_rng_state(), (random.getstate(), torch.is_grad_enabled())
    ours = exported(model, x)
    assert torch.equal(torch.get_rng_state(), stream)
    assert (random.getstate(), torch.is_grad_enabled()) == modes
    assert model.training is before[1]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before[0].items())
    assert {path: str(part.perforation.rung) for path, part in parts_of(ours).items()} == {
        "": "export"
    }
    assert isinstance(ours, type(model))
    assert list(ours.state_dict()) == list(model.state_dict())
    plain = dict(model.named_parameters(remove_duplicate=False))
    assert all(p is plain[k] for k, p in ours.named_parameters(remove_duplicate=False))
    assert tuple(site.name for site in ours.perforation.sites) == case.sites
    same(model, ours, x)
    # The batch may be another, of one sample too.
    for samples in (1, 5):
        if samples > 1 or not any("Norm1d" in type(m).__name__ for m in model.modules()):
            same(model, ours, x[:1].repeat(samples, *[1] * (x.dim() - 1)))


@pytest.mark.parametrize("name", CASES)
def test_growth_is_that_of_the_traced_model(name: str):
    """The same sites draw the same dendrites, and compute the same with them, in every phase."""
    case, x = CASES[name], CASES[name].input()
    traced, ours = pbfx.transform(case.build()), copy.deepcopy(exported_case(name))
    for model in (traced, ours):
        randomise(pbfx.grow(model, 2), scale=0.1)
    assert list(traced.state_dict()) == list(ours.state_dict())
    assert_equal(run(ours, x.clone()), run(traced, x.clone()))
    for model in (traced, ours):
        start_dendrite_phase(model)
        model.train()
    assert not [n for n in ours.graph.nodes if str(n.target).endswith("training")]
    state = copy.deepcopy(ours.state_dict())
    found = run(ours, x.clone(), seed=1)
    assert_equal(found, run(ours, x.clone(), seed=2))
    assert_equal(found, run(traced, x.clone()))
    ours_state = {k: v for k, v in ours.state_dict().items() if "dendrites" not in k}
    assert all(torch.equal(value, state[key]) for key, value in ours_state.items())


def test_saved_loaded_and_copied(tmp_path):
    case, x = CASES["convolutional"], CASES["convolutional"].input()
    ours, fresh, other = (copy.deepcopy(exported_case("convolutional")) for _ in range(3))
    randomise(pbfx.grow(ours, 2))
    pbfx.save(ours, tmp_path / "a.safetensors")
    assert pbfx.load(tmp_path / "a.safetensors", fresh) is fresh
    other.load_state_dict(ours.state_dict())
    for model in (fresh, other, copy.deepcopy(ours)):
        assert_equal(run(model.eval(), x.clone()), run(ours.eval(), x.clone()))
        assert_equal(run(model.train(), x.clone()), run(copy.deepcopy(ours).train(), x.clone()))
    with pytest.raises(pbfx.CheckpointError, match="holds a model that was exported"):
        pbfx.load(tmp_path / "a.safetensors", case.build())
    with pytest.raises(pbfx.CheckpointError, match=r"cannot be pickled.*save with\s+pbfx.save"):
        pickle.dumps(ours)


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor] | None = None
    size: int = 0


class Batch(dict):
    """A container of the user's own, which forward looks into."""


class Asking(nn.Module):
    """A forward of the user's over a few layers."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.fc, self.norm, self.body = nn.Linear(4, 4), nn.BatchNorm1d(4), body
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


class Signed(Asking):
    """The same with a signature."""

    def forward(self, x, mask=None, *, scale=1.0, heads=(2, 2)):
        return self.body(self, x, mask, scale, heads)


def asks_for_shapes(self, x, mask, scale, heads):
    if x.dim() != 2 or x.shape[-1] != self.fc.in_features:
        raise ValueError("width")
    y = self.fc(x).view(len(x.shape) - 1, x.shape[0], *heads).flatten(2)
    return y[0] if x.shape[0] * x.shape[1] > 8 else y[0] * 2


def asks_for_types(self, x, mask, scale, heads):
    if not isinstance(x, Tensor) or not torch.is_tensor(x) or hasattr(x, "logits"):
        x = x.logits
    return {"y": self.norm(self.fc(x)), "size": x.size(0), "all": [x, (x, None)]}


def asks_for_none(self, x, mask, scale, heads):
    y = F.linear(x, self.weight) if mask is None else self.fc(x) * mask
    return Output(y, [y * scale], y.shape[0])


def takes_lengths(self, x, mask, scale, heads):
    parts = [F.linear(piece, self.weight) for piece in x]
    return Output(torch.cat(parts[: len(x)]) * len(heads), None, len(parts))


def computes_without_gradients(self, x, mask, scale, heads):
    with torch.no_grad():
        target = x * 2 + self.weight[0]
    with torch.autocast("cpu", enabled=False):
        table = torch.tensor([1.0, 2.0, 3.0, 4.0]).float() * 2
    y = self.fc(x).detach() + self.fc(x.to(torch.float32)) + torch.arange(4, device=x.device)
    y[0] = 0
    y += table
    return torch.nn.functional.silu(y, inplace=True) - target


ASKING = {
    asks_for_shapes: (torch.randn(3, 4),),
    asks_for_types: (torch.randn(3, 4),),
    asks_for_none: (torch.randn(3, 4), torch.rand(3, 1)),
    takes_lengths: ([torch.randn(3, 4), torch.randn(2, 4)],),
    computes_without_gradients: (torch.randn(3, 4),),
}


@pytest.mark.parametrize("body", ASKING, ids=lambda body: body.__name__)
def test_what_symbolic_tracing_refuses(body):
    model, inputs = Signed(body), ASKING[body]
    assert kept_modules(pbfx.transform(model)), "a graph can hold it without torch.export"
    ours = exported(model, *inputs)
    assert list(parts_of(ours)) == [""]
    same(model, ours, *inputs)
    randomise(pbfx.grow(ours, 2))
    grown = ours(*inputs)
    assert all(t.isfinite().all() for t in tensors(grown))
    assert len(tensors(grown)) == len(tensors(model(*inputs)))


def test_inputs_by_name_in_containers_and_left_out():
    model = Asking(lambda self, batch, **more: self.fc(batch["x"]) * more["scale"][0] + len(more))
    given = {"batch": {"x": torch.randn(3, 4), "y": [None, 3]}, "scale": (torch.rand(4),)}
    ours = exported(model, **given, kind="a")
    same(model, ours, **given, kind="a")
    # The order of names does not matter, other values do.
    same(model, ours, kind="a", **given | {"batch": {"y": [None, 3], "x": torch.randn(7, 4)}})
    for wrong, message in [
        (given | {"kind": "b"}, r"kwargs\['kind'\] being 'a', got 'b'"),
        (given, r"kwargs being dict of \['batch', 'scale', 'kind'\]"),
        (given | {"kind": "a", "batch": {"x": 1}}, r"kwargs\['batch'\] being dict of"),
    ]:
        with pytest.raises(pbfx.CaptureError, match=message):
            ours(**wrong)


def test_calls_unlike_the_example():
    model = Signed(asks_for_none)
    ours = exported(model, torch.randn(3, 4))
    x = torch.randn(3, 4)
    same(model, ours, x, heads=(2, 2), scale=1.0)
    for args, named, message in [
        ((x, x), {}, "mask being None, got a tensor"),
        ((x,), {"scale": 2.0}, r"scale being 1.0, got 2.0"),
        ((x[0],), {}, r"x.dim\(\) == 2 only, got x of \(4,\)"),
        ((x.double(),), {}, r"one dtype of x \(torch.float32, now torch.float64\)"),
    ]:
        with pytest.raises(pbfx.CaptureError, match=message):
            ours(*args, **named)
    with pytest.raises(pbfx.CaptureError, match=r"model's parameters .*float16.*cast the"):
        copy.deepcopy(ours).half()(x)
    # Nothing in this graph names a device.
    assert copy.deepcopy(ours).to("meta")(x.to("meta")).logits.is_meta


def test_a_graph_that_names_a_device_stays_there():
    ours = exported(Asking(lambda s, x: s.fc(x) + torch.arange(4)), torch.randn(2, 4))
    with pytest.raises(pbfx.CaptureError, match=r"one device of args\[0\] \(cpu, now meta\), the"):
        ours.to("meta")(torch.ones(2, 4, device="meta"))


def asks_for_one(self, x):
    return self.fc(x) if x.shape[0] != 1 else x


def asks_for_eight(self, x):
    return self.fc(x) * len([piece for piece in x.split(1) if x.shape[0] > 8])


@pytest.mark.parametrize(
    ("body", "shapes", "sizes", "wrong"),
    [
        # Nothing is asked, so everything goes.
        (lambda s, x: s.fc(x), None, (1, 2, 5), {}),
        (asks_for_one, None, (2, 5), {1: r"args\[0\].shape\[0\] != 1"}),
        # A length is a number to Python.
        (asks_for_eight, None, (3,), {4: r"args\[0\].shape\[0\] == 3"}),
        (
            lambda s, x: s.fc(x),
            (({0: Dim("batch", min=2, max=9)},),),
            (2, 9),
            {10: "<= 9", 1: ">= 2"},
        ),
        (lambda s, x: s.fc(x), ((None,),), (3,), {4: r"shape\[0\] == 3"}),
    ],
)
def test_sizes(body, shapes, sizes, wrong):
    model = Asking(body)
    ours = exported(model, torch.randn(3, 4), shapes=shapes)
    for size in sizes:
        same(model, ours, torch.randn(size, 4))
    for size, message in wrong.items():
        with pytest.raises(pbfx.CaptureError, match=message):
            ours(torch.randn(size, 4))
    with pytest.raises(pbfx.CaptureError, match=r"shape\[1\] == 4"):
        ours(torch.randn(3, 5))


def test_an_example_of_one_sample_is_no_limit():
    model = Signed(asks_for_none)
    ours = exported(model, torch.randn(1, 4), shapes={"x": {0: Dim.AUTO}})
    same(model, ours, torch.randn(6, 4))


MODES: dict[str, Callable[..., Tensor]] = {
    "dropout": lambda s, x: F.dropout(x, 0.5, s.training),
    "in place": lambda s, x: F.dropout(x * 1, 0.5, s.training, inplace=True),
    "alpha": lambda s, x: F.alpha_dropout(x, 0.5, s.training),
    "feature": lambda s, x: F.dropout1d(x[:, None], 0.5, s.training)[:, 0],
    "feature alpha": lambda s, x: F.feature_alpha_dropout(x, 0.5, s.training),
    "rrelu": lambda s, x: F.rrelu(x, training=s.training),
    "batch norm": lambda s, x: F.batch_norm(x, s.mean, s.variance, training=s.training),
    "instance norm": lambda s, x: (
        F.instance_norm(x[None].mT, s.mean, s.variance, use_input_stats=s.training)[0].mT
    ),
    "attention": lambda s, x: F.scaled_dot_product_attention(
        x[None], x[None], x[None], dropout_p=0.5 if s.training else 0.0
    )[0],
    "a number": lambda s, x: x * (3 if s.training else 2),
    "of a part": lambda s, x: F.dropout(s.fc(x), 0.5, s.training),
}


def counts(self, x):
    if self.training:
        self.steps.add_(1)
        self.steps.add_(3)
    return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("kind", [*MODES, "counts"])
def test_functions_follow_the_mode(kind: str):
    function = MODES.get(kind, counts)
    model, x = Asking(lambda s, x: s.fc(function(s, x))), torch.randn(6, 4)
    ours = exported(model, x)
    same(model, ours, x)
    expected = copy.deepcopy(model).eval()(x)
    pbfx.grow(ours)
    start_dendrite_phase(ours)
    state = copy.deepcopy(ours.state_dict())
    torch.manual_seed(3)
    assert torch.equal(ours.train()(x), expected)
    assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())


class Spelled(nn.Module):
    """Products by parameters, functional convolutions and norms, written in place into views."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(6, 6)) for _ in range(3))
        self.kernel, self.back = (nn.Parameter(torch.randn(6, 6, 3)) for _ in range(2))
        self.scale, self.shift = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))

    def forward(self, x):
        if x.shape[-1] != 6:
            return x
        y = torch.zeros_like(x)
        y[:, 1] = torch.addmm(self.shift, x[:, 1] @ self.a, self.b.t())
        y[:, 0].add_(torch.mm(x[:, 0], self.c.mT))
        y = F.layer_norm(F.conv1d(y.mT, self.kernel, padding="same").mT, (6,), self.scale)
        return F.conv_transpose1d(y.mT, self.back, self.shift, padding=1)


def test_sites_of_functions():
    torch.manual_seed(0)
    model, x = Spelled(), torch.randn(3, 5, 6)
    ours = exported(model, x)
    found = {site.name: (site.op, site.input_first) for site in ours.perforation.sites}
    assert found == {
        "a": ("linear", True),
        "b": ("linear", False),
        "c": ("linear", False),
        "kernel": ("conv1d", False),
        "back": ("conv_transpose1d", False),
    }
    same(model, ours, x)
    randomise(pbfx.grow(ours, 2), scale=0.1)
    assert not torch.equal(ours(x), model(x))
    start_dendrite_phase(ours)
    ours(x).square().mean().backward()
    pools = [dendrites.candidates for dendrites in ours.grown().values()]
    assert all(pool.moments.grad.abs().sum() > 0 for pool in pools), "an error has not arrived"


def test_parts_follow_modes_of_their_own():
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(4, 6)
    ours = exported(model, x)
    for one in (model, ours):
        one.train()
        one.blocks[0].eval()
    assert_equal(run(ours, x), run(model, x))
    model = Convolutional()
    ours = exported(model, torch.randn(2, 2, 6, 5))
    for one in (model, ours):
        one.train()
        one.norm.eval()
    assert_equal(run(ours, torch.ones(3, 2, 6, 5)), run(model, torch.ones(3, 2, 6, 5)))
    assert model.norm.num_batches_tracked == 0


class Inner(nn.Module):
    """A module that does something else when it trains."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) if self.training else self.layer(x) * 2 + 1


def test_what_has_two_forms_keeps_its_forward():
    model = nn.Sequential(nn.Linear(4, 4), Inner(nn.Linear(4, 4)), Inner(nn.Identity()))
    ours, x = exported(model, torch.randn(3, 4)), torch.randn(5, 4)
    rungs = {path: str(part.perforation.rung) for path, part in parts_of(ours).items()}
    assert rungs == {"": "export", "1.layer": "op"}
    same(model, ours, x)
    assert [n.target for n in ours.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    randomise(pbfx.grow(ours))
    assert ours(x).shape == (5, 4)


def branches(self, x):
    return self.fc(x) if self.training else self.norm(self.fc(x))


def reads_the_flag_of_another(self, x):
    return self.fc(F.dropout(x, 0.5, self.norm.training))


def hands_out_another_structure(self, x):
    return (self.fc(x),) if self.training else self.fc(x)


def draws(self, x):
    return self.fc(x) * random.random()


def writes(self, x):
    self.seen = x.shape[0]
    return self.fc(x)


def collects(self, x):
    self.norm.features.append(x)
    return self.fc(x)


def asks_whether_gradients_are_on(self, x):
    return self.fc(x) if torch.is_grad_enabled() else x


def calls_a_layer_without_gradients(self, x):
    with torch.no_grad():
        x = self.norm(x)
    return self.fc(x)


def looks_at_values(self, x):
    return self.fc(x) if x.sum() > 0 else x


def saves_memory(self, x):
    return checkpoint(self.fc, x, use_reentrant=False)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def has_a_backward_of_its_own(self, x):
    return self.fc(Twice.apply(x))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (branches, r"forward computes something else in train than in eval \(what is returned and"),
        (reads_the_flag_of_another, "dropout.default in 'the root'|flag of another module"),
        (hands_out_another_structure, "returns different structures"),
        (draws, "draws random numbers .from random."),
        (writes, "writes to self.seen"),
        (collects, "writes to self.features"),
        (asks_whether_gradients_are_on, r"asks torch.is_grad_enabled\(\)"),
        (calls_a_layer_without_gradients, "'norm' is called inside torch.no_grad"),
        (looks_at_values, "cannot capture Asking by torch.export: .*data-dependent"),
        (saves_memory, "inside torch.utils.checkpoint"),
        (has_a_backward_of_its_own, "calls the autograd.Function Twice"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refusals_say_why_and_change_nothing(body, message: str):
    model = Asking(body)
    model.norm.features = []
    before, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    stream = random.getstate()
    with pytest.raises(pbfx.CaptureError, match=message):
        exported(model, torch.randn(3, 4))
    assert random.getstate() == stream
    assert set(vars(model)) == attributes
    assert not model.norm.features
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_hooks_and_attributes_live_on():
    model, x = CASES["convolutional"].build(), CASES["convolutional"].input()
    ours, seen = copy.deepcopy(exported_case("convolutional")), []
    ours.conv1.register_forward_hook(lambda *_: seen.append("conv1"))
    ours.register_forward_hook(lambda *_: seen.append("root"))
    ours(x)
    assert seen == ["conv1", "root"]
    # What forward read of `self` is read again.
    ours.load_state_dict(model.state_dict())
    ours.p = model.p = 0.25
    same(model, ours, x)


def test_hooks_on_a_module_inside_make_it_a_graph_of_its_own():
    seen, x = [], torch.randn(5, 4)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    model[1].register_forward_hook(lambda *_: seen.append("before"))
    ours = exported(model, x)
    assert list(parts_of(ours)) == ["", "1"]
    assert not seen, "no hook sees the tensors of torch.export"
    randomise(pbfx.grow(ours))
    expected = ours(x)
    assert seen == ["before"]
    ours[2].register_forward_hook(lambda *_: seen.append("after"))
    assert torch.equal(ours(x), expected)
    assert seen == ["before"] * 2 + ["after"]
    rungs = {path: str(part.perforation.rung) for path, part in parts_of(ours).items()}
    assert rungs == {"": "export", "1": "submodule", "2": "submodule"}
    # By itself, a module inside computes with its dendrites.
    assert torch.equal(ours[2](ours[1](ours[0](x))), expected)


def test_torchs_own_layers_are_taken_apart_below():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.Sequential(nn.Linear(4, 8), layer), torch.randn(2, 5, 4)
    ours = exported(model, x)
    assert [site.name for site in pbfx.explain(ours).sites] == ["0", "1.linear1", "1.linear2"]
    same(model, ours, x)
    with torch.no_grad():
        assert_equal([ours.eval()(x)], [model.eval()(x)])


def test_compiled():
    model = exported(Signed(asks_for_none), torch.randn(3, 4))
    randomise(pbfx.grow(model, 1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in (3, 5, 7):
        x = torch.randn(size, 4)
        assert torch.allclose(compiled(x).logits, model(x).logits)


def test_the_request_is_checked():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    with pytest.raises(pbfx.ConfigError, match=r"ask for it with pbfx.Config\(capture="):
        pbfx.transform(model, example_inputs=(x,))
    with pytest.raises(pbfx.ConfigError, match=r"such as \(x,\), .*got a tensor"):
        pbfx.transform(model, EXPORT, example_inputs=x)
    with pytest.raises(pbfx.ConfigError, match=r"needs example_inputs.*got None"):
        pbfx.transform(model, EXPORT)
    with pytest.raises(pbfx.ConfigError, match=r"do not fit Sequential.forward\(input\)"):
        pbfx.transform(model, EXPORT, example_inputs=(x, x))
    with pytest.raises(pbfx.ConfigError, match="names no input 'y'; valid: 'input'"):
        exported(model, x, shapes={"y": None})
    with pytest.raises(pbfx.ConfigError, match="capture is unknown, got 'dynamo'"):
        pbfx.Config(capture="dynamo")


def test_the_rung_is_explained(caplog):
    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def encode(self, x):
            return self.fc(x)

        def forward(self, x):
            return self.encode(x)

    ours = exported(Coder(), torch.randn(2, 4))
    assert "layers that encode calls by itself compute without dendrites" in caplog.text
    assert ours.perforation.rung == "export"
    assert re.search(r"fc +linear", str(pbfx.explain(ours)))
