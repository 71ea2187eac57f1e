"""What cannot be captured faithfully keeps its own forward or is refused, with the reason."""

from __future__ import annotations

import collections
import copy
import random
import re
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pbfx
from models import perceptron
from pbfx.kept import kept_modules
from pbfx.parts import parts_of


class Base(nn.Module):
    """What the models below have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.seen, self.by_name, self.kinds = [], {"x": 1}, {1, 2}
        self.recent = collections.deque([1], maxlen=2)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


def forward(body):
    """Make a Base whose forward is `body`."""
    return type(body.__name__, (Base,), {"forward": body})()


def branches_on_values(self, x):
    return self.fc(x) if x.sum() > 0 else x


def branches_on_shapes(self, x):
    return self.fc(x) if x.shape[0] > 1 else x


def branches_on_training(self, x):
    return self.fc(x) if self.training else x


def branches_on_a_submodules_training(self, x):
    return self.fc(x) if self.fc.training else x


def makes_numbers(self, x):
    return self.fc(x) * float(x.mean())


def draws_from_torch(self, x):
    return self.fc(x) + torch.randn(4)


def draws_from_random(self, x):
    return self.fc(x) if random.random() < 0.5 else self.fc(x) * 2


def draws_from_numpy(self, x):
    return self.fc(x) * np.random.rand()


def assigns_an_attribute(self, x):
    self.hidden = self.fc(x)
    return self.hidden * 2


def counts_calls(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return self.fc(x)


def assigns_a_buffer(self, x):
    self.count = self.count + 1
    return self.fc(x)


def assigns_a_buffer_a_constant(self, x):
    self.count = torch.ones(())
    return self.fc(x)


def adds_a_module(self, x):
    self.late = nn.Identity()
    return self.fc(x)


def fills_a_list(self, x):
    self.seen.append(self.fc(x))
    return self.seen[-1]


def fills_a_dict(self, x):
    self.by_name["x"] = self.fc(x)
    return self.by_name["x"]


def fills_a_set(self, x):
    self.kinds.add(3)
    return self.fc(x)


def fills_a_deque(self, x):
    self.recent.append(2)
    return self.fc(x)


def leaves_gradients_out(self, x):
    with torch.no_grad():
        x = self.fc(x)
    return self.fc(x)


def changes_precision(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.fc(x)


def calls_a_function_with_a_backward(self, x):
    return Reverse.apply(self.fc(x))


def asks_whether_an_input_is_there(self, x, mask=None):
    x = self.fc(x)
    return x if mask is None else x * 2


def reads_parameters_in_bulk(self, x):
    return self.fc(x) + sum(p.sum() for p in self.parameters())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (branches_on_values, "symbolic tracing.*must not branch on values"),
        (branches_on_shapes, "symbolic tracing.*must not branch on values"),
        (branches_on_training, "symbolic tracing.*must not branch on values"),
        (branches_on_a_submodules_training, "symbolic tracing.*must not branch on values"),
        (makes_numbers, "symbolic tracing.*Python numbers"),
        (draws_from_torch, r"random numbers \(from torch\).*rand_like"),
        (draws_from_random, r"random numbers \(from random\)"),
        (draws_from_numpy, r"random numbers \(from numpy\)"),
        (assigns_an_attribute, r"writes to self\.hidden.*return the value"),
        (counts_calls, r"writes to self\.calls"),
        (assigns_a_buffer, r"writes to self\.count.*updated in place"),
        (assigns_a_buffer_a_constant, r"writes to self\.count"),
        (adds_a_module, r"writes to self\.late"),
        (fills_a_list, r"writes to self\.seen"),
        (fills_a_dict, r"writes to self\.by_name"),
        (fills_a_set, r"writes to self\.kinds"),
        (fills_a_deque, r"writes to self\.recent"),
        (leaves_gradients_out, "inside torch.no_grad.*detach"),
        (changes_precision, "torch.autocast.*around the whole model"),
        (calls_a_function_with_a_backward, "autograd.Function Reverse.*custom_op"),
        (asks_whether_an_input_is_there, "whether mask is None"),
        (reads_parameters_in_bulk, r"reads in bulk \(self.parameters\(\)\)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_forwards_that_are_kept(body, message: str):
    model = forward(body)
    keys = {key: list(value) for key, value in model.__dict__.items() if hasattr(value, "__iter__")}
    state = dict(model.state_dict())
    ours = pbfx.transform(model)
    # Neither the model nor torch remembers the attempt.
    assert {k: list(v) for k, v in model.__dict__.items() if hasattr(v, "__iter__")} == keys
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    x = torch.ones(1, requires_grad=True)
    Reverse.apply(x).backward()
    assert x.grad == -1
    assert nn.Linear(2, 2)(torch.ones(2)).shape == (2,)
    # The forward is the user's; its layer is a part of its own.
    assert type(ours) is type(model)
    assert re.search(f"(?s){body.__name__}.*{message}", kept_modules(ours)[""].reason)
    (path, part), *more = parts_of(ours).items()
    assert (path, part.perforation.rung, more) == ("fc", "op", [])
    assert part.perforation.reason == kept_modules(ours)[""].reason
    x = torch.randn(3, 4)
    for training in (True, False):
        expected = streams_fixed(copy.deepcopy(model).train(training), x)
        assert torch.equal(streams_fixed(copy.deepcopy(ours).train(training), x), expected)


def streams_fixed(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    return model(x)


def test_functions_without_stand_ins_may_run():
    class Net(Base):
        def forward(self, x):
            return self.fc(x) + Reverse.apply(torch.ones(4))

    model, x = Net(), torch.ones(2, 4)
    assert torch.equal(pbfx.transform(model)(x), model(x))


def test_a_branch_that_no_input_decides_is_fine():
    class Net(Base):
        def forward(self, x, scale=None):
            if isinstance(self.seen, list) and self.fc.out_features == 4:
                return self.fc(x)
            return x

    model, x = Net(), torch.ones(2, 4)
    assert torch.equal(pbfx.transform(model)(x), model(x))


def test_the_mode_of_the_caller_is_no_mode_of_the_model():
    model, x = forward(branches_on_nothing), torch.ones(2, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = pbfx.transform(model)
    assert ours(x).requires_grad
    assert ours(x).dtype == torch.float32


def branches_on_nothing(self, x):
    return self.fc(x)


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda module, args, out: out),
    "before": lambda m: m.register_forward_pre_hook(lambda module, args: None),
    "keywords": lambda m: m.register_forward_hook(lambda *a: None, with_kwargs=True),
    "backward": lambda m: m.register_full_backward_hook(lambda module, into, out: None),
    "before backward": lambda m: m.register_full_backward_pre_hook(lambda module, out: None),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_module_with_hooks_is_called_as_a_module(kind: str):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    handle = HOOKS[kind](model[0])
    rungs = {path: part.perforation.rung for path, part in parts_of(pbfx.transform(model)).items()}
    assert rungs == {"": "whole", "0": "submodule"}
    handle.remove()
    assert parts_of(pbfx.transform(model)).keys() == {""}


def test_hooks_go_on_firing_in_both_directions():
    seen = []
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    model[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    model[0].register_full_backward_hook(lambda module, into, out: seen.append("back"))
    ours, x = pbfx.transform(model), torch.randn(3, 4, requires_grad=True)
    assert torch.equal(ours(x), model(x))
    seen.clear()
    pbfx.grow(ours)(x).sum().backward()
    assert seen == ["before", "back"]


class Plain(nn.Module):
    def forward(self, x):
        return x


class HasMemory(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 2)

    def forward(self, x):
        return self.rnn(x)[0]


def test_nothing_to_grow_on():
    with pytest.raises(pbfx.CaptureError, match=r"Plain has no linear or conv operation"):
        pbfx.transform(Plain())
    with pytest.raises(pbfx.CaptureError, match=r"rnn \(LSTM\): it runs all its steps inside"):
        pbfx.transform(HasMemory())
    config = pbfx.Config(exclude="*")
    with pytest.raises(pbfx.ConfigError, match=r"'0' \(linear\): excluded by '\*'; '4'"):
        pbfx.transform(perceptron(), config)


@pytest.mark.gpu
def test_draws_on_the_gpu():
    class Noisy(Base):
        def forward(self, x):
            return self.fc(x) + torch.randn(4, device="cuda")

    model = Noisy().cuda()
    before = torch.cuda.get_rng_state_all()
    ours = pbfx.transform(model)
    assert "random numbers (from cuda)" in kept_modules(ours)[""].reason
    assert all(map(torch.equal, torch.cuda.get_rng_state_all(), before))


@pytest.mark.parametrize("layers", [1, 2])
def test_lazy_modules(layers: int):
    model = nn.Sequential(*[nn.Linear(4, 4), nn.LazyLinear(3)][-layers:])
    with pytest.raises(pbfx.CaptureError, match=r"LazyLinear has no shape yet.*run a batch"):
        pbfx.transform(model)
    x = torch.ones(2, 4)
    y = model(x)
    assert torch.equal(pbfx.transform(model)(x), y)


def test_lazy_norms():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d())
    with pytest.raises(pbfx.CaptureError, match="'1' in Sequential: LazyBatchNorm1d has no shape"):
        pbfx.transform(model)


def test_torchscript():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(pbfx.CaptureError, match="it is TorchScript"):
        pbfx.transform(scripted)
    model, x = nn.Sequential(nn.Linear(2, 2), scripted), torch.randn(3, 2)
    ours = pbfx.grow(pbfx.transform(model))
    assert [site.name for site in ours.perforation.sites] == ["0"]
    assert "TorchScript" in str(pbfx.explain(ours))
    assert ours[1] is scripted
    assert torch.equal(ours(x), model(x))


@pytest.mark.parametrize("path", ["", "0"])
def test_modules_compiled_in_place(path: str):
    model = perceptron()
    model.get_submodule(path).compile(backend="eager")
    with pytest.raises(pbfx.CaptureError, match=r"it is compiled.*transform first"):
        pbfx.transform(model)


def test_a_compiled_part():
    model = nn.Sequential(torch.compile(perceptron(), backend="eager"), nn.Linear(3, 2))
    with pytest.raises(pbfx.CaptureError, match=r"'0' in Sequential: it is compiled"):
        pbfx.transform(model)


def test_a_forward_replaced_on_the_instance():
    model = perceptron()
    model.forward = lambda x: x + 1
    with pytest.raises(pbfx.CaptureError, match="forward was replaced on the instance"):
        pbfx.transform(model)


def test_a_layer_whose_forward_was_replaced_is_kept_and_no_site():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].forward = types.MethodType(lambda self, x: F.linear(x, self.weight) + 7, model[0])
    x = torch.ones(2, 4)
    ours = pbfx.grow(pbfx.transform(model))
    assert [site.name for site in ours.perforation.sites] == ["1"]
    assert torch.equal(ours(x), model(x))


@pytest.mark.parametrize("name", ["graph", "code", "adopt", "rebuild", "perforation"])
def test_names_that_would_hide(name: str):
    class Net(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            setattr(self, name, value)

        def forward(self, x):
            return self.fc(x)

    for value in (nn.Linear(4, 4), nn.Parameter(torch.ones(2)), "text"):
        model = Net(value)
        ours = pbfx.transform(model)
        assert f"{name!r} would hide" in kept_modules(ours)[""].reason
        assert type(ours) is Net
        assert "fc" in parts_of(ours)
        if not isinstance(value, nn.Module):
            assert getattr(ours, name) is value


@pytest.mark.parametrize("given", [nn.Linear, perceptron, None, torch.ones(2), "model"])
def test_what_is_no_module(given: object):
    with pytest.raises(pbfx.ConfigError, match=r"model must be an nn.Module instance, got"):
        pbfx.transform(given)
    if given is nn.Linear:
        with pytest.raises(pbfx.ConfigError, match="got the class Linear"):
            pbfx.transform(given)


def test_what_is_no_config():
    with pytest.raises(pbfx.ConfigError, match=r"config must be a pbfx.Config, got \{'seed': 1\}"):
        pbfx.transform(perceptron(), {"seed": 1})


def test_what_is_perforated_already():
    ours = pbfx.transform(perceptron())
    with pytest.raises(pbfx.ConfigError, match=r"perforated already.*at 'its root'"):
        pbfx.transform(ours)
    with pytest.raises(pbfx.ConfigError, match=r"perforated already.*at '1'"):
        pbfx.transform(nn.Sequential(nn.Linear(4, 5), ours))


def test_wrappers_come_after():
    for wrapper in (torch.compile(perceptron()), nn.DataParallel(perceptron())):
        name = type(wrapper).__name__
        with pytest.raises(pbfx.ConfigError, match=f"apply it before {name} wraps the model"):
            pbfx.transform(wrapper)


def test_errors_of_pbfx_are_those_that_torch_users_catch():
    with pytest.raises(RuntimeError):
        pbfx.transform(Plain())
    with pytest.raises(ValueError, match="model must be"):
        pbfx.transform(None)
    assert issubclass(pbfx.CaptureError, pbfx.PbfxError)
    assert issubclass(pbfx.ConfigError, pbfx.PbfxError)
