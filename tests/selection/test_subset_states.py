"""Dendrites on some channels in state dicts, files, copies, averages, compiled and moved models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pbfx
from models import randomise
from pbfx.parts import parameter_count
from pbfx.restructure import restructuring
from selection.subsets import dendrites_of, grow_some

KEY = "conv.dendrites.channels"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((-2, -1)))


def make(n: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = pbfx.grow(
        pbfx.transform(Net()), n, channels={"conv": [3, 4, 5], "head": [4, 0, 2]}
    ).eval()
    randomise(model)
    return model


def fresh(seed: int = 9) -> nn.Module:
    torch.manual_seed(seed)
    return pbfx.transform(Net()).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 5, 6, generator=torch.Generator().manual_seed(1))


def test_keys_shapes_and_counts():
    model = make()
    state = model.state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items() if "dendrites" in k}
    assert shapes == {
        "conv.dendrites.weight": (2, 3, 1, 3, 3),
        "conv.dendrites.bias": (2, 3),
        "conv.dendrites.to_soma": (2, 3),
        "conv.dendrites.to_dendrite": (2, 2, 3),
        "conv.dendrites.channels": (3,),
        "head.dendrites.weight": (2, 3, 6),
        "head.dendrites.bias": (2, 3),
        "head.dendrites.to_soma": (2, 3),
        "head.dendrites.to_dendrite": (2, 2, 3),
        "head.dendrites.channels": (3,),
    }
    assert state["head.dendrites.channels"].tolist() == [0, 2, 4]
    # No parameter and no buffer: nobody averages it, steps it or halves it.
    assert "channels" not in str([*dict(model.named_buffers()), *dict(model.named_parameters())])
    conv, head = pbfx.explain(model).sites
    assert (conv.channels, conv.neurons, conv.dendrites) == (3, 6, 2)
    plain = sum(p.numel() for p in Net().parameters())
    # Weight, bias, a link to the soma, and one link to the second dendrite for each channel.
    grown = 2 * 3 * (9 + 2) + 3 + 2 * 3 * (6 + 2) + 3
    assert parameter_count(model) == plain + grown
    assert conv.parameters + head.parameters == 54 + 35 + grown
    assert conv.next_dendrite == 3 * (9 + 1 + 3)
    assert "3 of 6" in str(pbfx.explain(model))


def test_a_state_dict_grows_a_fresh_model(x: Tensor):
    model, other = make(), fresh()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    # And from there to all channels, and to others.
    for source in (pbfx.grow(fresh(4)), pbfx.grow(fresh(5), channels={"head": [1]})):
        other.load_state_dict(source.state_dict())
        assert other.structure() == source.structure()
        assert torch.equal(other(x), source(x))


def test_files(x: Tensor, tmp_path):
    model = make()
    pbfx.save(model, tmp_path / "net.safetensors")
    assert torch.equal(pbfx.load(tmp_path / "net.safetensors", Net()).eval()(x), model(x))
    other = pbfx.grow(fresh(), channels={"head": [1]})
    assert torch.equal(pbfx.load(tmp_path / "net.safetensors", other)(x), model(x))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor([3, 4, 6]), "channels 0 to 5, got"),
        (torch.tensor([0, 1, 3]), "2 groups, whose 3 channels each"),
        (torch.tensor([4, 3, 5]), "increasing whole numbers"),
        (torch.tensor([3, 3, 5]), "increasing whole numbers"),
        (torch.tensor([3.0, 4.4, 5.0]), "increasing whole numbers"),
        (torch.arange(6), "absent where dendrites are on all channels"),
        (torch.tensor([]), "increasing whole numbers"),
        ("conv", "increasing whole numbers"),
    ],
)
def test_channels_that_do_not_fit_are_refused(value, words: str):
    state, other = make().state_dict(), fresh()
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(pbfx.CheckpointError, match=words):
        other.load_state_dict(state | {KEY: value})
    after = other.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_rows_that_do_not_match_the_channels_are_refused():
    state, other = make().state_dict(), fresh()
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({name: t for name, t in state.items() if name != KEY})
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(state | {"head.dendrites.channels": torch.tensor([0, 2])})


def test_a_module_by_itself_loads_its_own_channels_only():
    head = make().head
    state = head.state_dict()
    head.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*dendrites\.channels"):
        head.load_state_dict({k: v for k, v in state.items() if not k.endswith("channels")})
    with pytest.raises(RuntimeError, match=r"these dendrites' is \[0, 2, 4\]"):
        head.load_state_dict(state | {"dendrites.channels": torch.tensor([0, 1, 4])})
    whole = pbfx.grow(fresh(), 2).head
    with pytest.raises(RuntimeError, match="on all of them"):
        whole.load_state_dict(state)


def test_state_dicts_that_were_averaged_or_widened(x: Tensor):
    model, other = make(), fresh()
    for dtype in (torch.float64, torch.float32, torch.float16):
        state = model.state_dict()
        other.load_state_dict(state | {KEY: state[KEY].to(dtype) * 0.999999})
        assert torch.equal(other(x), model(x))


def test_copies_and_pickles(x: Tensor):
    model = make()
    for twin in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert twin.structure() == model.structure()
    assert torch.equal(DataParallel(model)(x), model(x))


def test_conversions_keep_the_channels(x: Tensor):
    model = make()
    expected = copy.deepcopy(model).double()(x.double())
    half = copy.deepcopy(model).bfloat16()
    assert dendrites_of(half)["head"].channels.tolist() == [0, 2, 4]
    assert half(x.bfloat16()).dtype is torch.bfloat16
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    moved = copy.deepcopy(model).to("meta")
    assert moved(x.to("meta")).shape == expected.shape
    back = moved.to_empty(device="cpu")
    back.load_state_dict(model.state_dict())
    assert torch.equal(back(x), model(x))
    last = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        last(x.to(memory_format=torch.channels_last)).double(), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_follow_and_keep_the_channels(x: Tensor, use_buffers: bool):
    model = fresh()
    ema = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers
    ).eval()
    pbfx.grow(model, channels={"head": [1, 3], "conv": [0, 1, 2]})
    randomise(model)
    for _ in range(40):
        ema.update_parameters(model)
    assert dendrites_of(ema.module)["head"].channels.tolist() == [1, 3]
    torch.testing.assert_close(ema(x), model.eval()(x))
    # To other channels.
    model.load_state_dict(make().state_dict())
    assert ema.module.structure() == model.structure()
    for _ in range(40):
        ema.update_parameters(model)
    torch.testing.assert_close(ema(x), model(x))


def test_a_failed_growth_is_undone(x: Tensor):
    model = make()
    wanted, structure = model(x), model.structure()

    def adopt_and_fail() -> None:
        with restructuring(model):
            model.adopt(pbfx.grow(fresh()).structure())
            raise ValueError("no")

    with pytest.raises(pbfx.RestructureError, match="undone: ValueError"):
        adopt_and_fail()
    assert model.structure() == structure
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(x: Tensor, backend: str):
    model = make()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    compiled(x).square().sum().backward()
    found = dendrites_of(model)["conv"].to_soma.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(
        found, dendrites_of(model)["conv"].to_soma.grad, rtol=1e-4, atol=1e-5
    )
    # Other channels of the same number: the compiled code must not go on with the old ones.
    other = pbfx.grow(fresh(), 2, channels={"conv": [0, 1, 2], "head": [1, 2, 3]})
    randomise(other)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other(x), rtol=1e-5, atol=1e-6)


def test_exported(x: Tensor):
    model = make()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)


def test_torch_func(x: Tensor):
    model = make()
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters, x)
    model.zero_grad()
    loss(parameters, x).backward()
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
    batched = torch.func.vmap(lambda one: model(one[None])[0])(x)
    torch.testing.assert_close(batched, model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learning", ["perforated", "gradient", "sham"])
def test_what_learns(x: Tensor, learning: str):
    torch.manual_seed(0)
    model = grow_some(pbfx.transform(Net(), pbfx.Config(learning=learning)))
    if learning != "sham":
        randomise(model)
    model(x).square().sum().backward()
    head = dendrites_of(model)["head"]
    assert (head.weight.grad is not None) == (learning == "gradient")
    assert (head.to_soma.grad is not None) == (learning != "sham")


def test_hands_are_told_what_cannot_be(x: Tensor):
    model = make()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for arguments, words in (
        ({"channels": [0, 1], "sites": "head"}, r"'head'.*dendrites on the channels \[0, 2, 4\]"),
        ({"channels": {"head": [5]}}, "channels 0 to 4, got \\[5\\]"),
        ({"channels": {"conv": [3], "head": []}}, "'conv': .*together.*; the site 'head': "),
        ({"channels": {"head": [0, 0, 2, 4]}}, "named once"),
        ({"channels": {"head": ["a"]}}, "whole numbers"),
        ({"channels": {"tail": [0]}}, "no site 'tail'"),
        ({"channels": {"head": [0]}, "sites": ["conv"]}, "sites leaves it out"),
    ):
        with pytest.raises(pbfx.ConfigError, match=words):
            pbfx.grow(model, **arguments)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in state.items())
    pbfx.grow(model, channels={"head": [4, 2, 0]})
    assert [(s.name, s.dendrites) for s in pbfx.explain(model).sites] == [("conv", 2), ("head", 3)]
    pbfx.grow(model)
    assert [s.channels for s in pbfx.explain(model).sites] == [3, 3]
    whole = pbfx.grow(fresh())
    with pytest.raises(pbfx.ConfigError, match="dendrites on all channels"):
        pbfx.grow(whole, sites="head", channels=[1])
