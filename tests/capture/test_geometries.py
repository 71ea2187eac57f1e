"""A dendrite reads what its soma reads: same stride, padding, dilation, groups, same extra axes.

The check: give each dendrite its soma's own weights, relu, and a link of 1. Then the site must give
`y + relu(y)`, whatever its geometry is.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx
from models import assert_lowers

# torch's own remark about its 'same' padding, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

F64 = torch.float64
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MODES = ("zeros", "reflect", "replicate", "circular")


def echo(model: nn.Module) -> nn.Module:
    """Perforate `model`; its one site then adds relu of itself."""
    plain = dict(model.named_parameters())
    ours = pbfx.grow(pbfx.transform(model, pbfx.Config(activation="relu")))
    (site,) = ours.perforation.sites
    (dendrites,) = ours.grown().values()
    with torch.no_grad():
        dendrites.weight[0] = plain[site.weight]
        if site.bias is not None:
            dendrites.bias[0] = plain[site.bias]
        dendrites.to_soma.fill_(1.0)
    return ours


def check(model: nn.Module, x: Tensor) -> None:
    """Check `model` as a layer of another one; a layer that is the whole model is traced into."""
    model = nn.Sequential(model)
    y = model(x)
    assert y.abs().sum() > 0 or not y.numel()
    # Another order of sums is the only difference.
    ours = echo(model)
    torch.testing.assert_close(ours(x), y + F.relu(y), rtol=1e-12, atol=1e-12)
    assert_lowers(ours, x)


def inputs(dims: int, channels: int = 4, batch: tuple[int, ...] = (2,)) -> Tensor:
    sizes = (7, 6, 8)[:dims]
    generator = torch.Generator().manual_seed(dims)
    return torch.randn(*batch, channels, *sizes, dtype=F64, generator=generator)


# Torch's own, about "same" with an even kernel.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", CONVS)
@pytest.mark.parametrize("padding", [0, 1, 2, "each", "same", "valid"])
def test_padding(dims: int, padding: int | str, mode: str):
    torch.manual_seed(0)
    width = tuple(range(dims)) if padding == "each" else padding
    # An even kernel makes "same" pad one more at the end than at the start.
    for kernel, dilation in ((3, 1), (2, 1), (2, 3)):
        conv = CONVS[dims](4, 6, kernel, padding=width, dilation=dilation, padding_mode=mode)
        check(conv.to(F64), inputs(dims))


@pytest.mark.parametrize("dims", CONVS)
@pytest.mark.parametrize(
    ("stride", "dilation", "groups", "bias"),
    list(itertools.product((1, 2), (1, 2), (1, 2, 4), (True, False))),
)
def test_stride_dilation_groups(dims: int, stride: int, dilation: int, groups: int, bias: bool):
    torch.manual_seed(0)
    conv = CONVS[dims](4, 8, 2, stride, 1, dilation, groups, bias, dtype=F64)
    check(conv, inputs(dims))


def test_different_numbers_for_each_axis():
    torch.manual_seed(0)
    conv = nn.Conv3d(4, 2, (1, 2, 3), (3, 1, 2), (0, 1, 2), (1, 2, 1), padding_mode="reflect")
    check(conv.to(F64), inputs(3))


@pytest.mark.parametrize("dims", TRANSPOSED)
@pytest.mark.parametrize(
    ("stride", "dilation", "groups", "bias"),
    list(itertools.product((1, 2, 3), (1, 2), (1, 2, 4), (True, False))),
)
def test_transposed(dims: int, stride: int, dilation: int, groups: int, bias: bool):
    torch.manual_seed(0)
    for padding, more in ((0, 0), (1, 0), (1, max(stride, dilation) - 1)):
        conv = TRANSPOSED[dims](4, 8, 2, stride, padding, more, groups, bias, dilation, dtype=F64)
        check(conv, inputs(dims))


def test_transposed_with_different_numbers_for_each_axis():
    torch.manual_seed(0)
    conv = nn.ConvTranspose3d(4, 2, (1, 2, 3), (3, 1, 2), (0, 1, 2), (2, 0, 1), 2, True, (1, 2, 1))
    for x in (inputs(3), inputs(3, batch=())):
        check(conv.to(F64), x)


def test_transposed_of_an_empty_batch():
    x = inputs(2, batch=(0,)).requires_grad_()
    ours = echo(nn.Sequential(nn.ConvTranspose2d(4, 3, 2, 2, dtype=F64)))
    y = ours(x)
    assert y.shape == (0, 3, 14, 12)
    y.sum().backward()
    assert ours.get_parameter("0.dendrites.to_soma").grad.eq(0).all()


@pytest.mark.parametrize("traced", [True, False], ids=["in a graph", "by itself"])
@pytest.mark.parametrize("extra", [0, 1])
def test_transposed_with_a_given_output_size(traced: bool, extra: int):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose1d(4, 3, 3, stride=2, dtype=F64)

        def forward(self, x):
            size = (x.shape[-1] - 1) * 2 + 3 + extra if traced else 2 * len(x[0][0]) + 1 + extra
            return self.up(x, output_size=(size,))

    model, x = Net(), torch.randn(2, 4, 5, dtype=F64)
    ours = pbfx.transform(model)
    assert torch.equal(ours(x), model(x))
    assert ours(x).shape[-1] == 11 + extra
    # A dendrite with the soma's weight on a linear stretch of its activation doubles the soma.
    pbfx.grow(ours)
    dendrites = ours.up.dendrites
    with torch.no_grad():
        dendrites.weight.copy_(model.up.weight * 1e-4)
        dendrites.bias.copy_(model.up.bias * 1e-4)
        dendrites.to_soma.fill_(1e4)
    torch.testing.assert_close(ours(x), 2 * model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_dendrites_learn(groups: int):
    """Each neuron gets the best candidate of its own, whose weights lie in its group's rows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(4, 8, 2, 2, groups=groups, bias=False))
    model = pbfx.transform(net, pbfx.Config(measure_every=2, candidates=5, priming_batches=0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 3), max_dendrites=1)
    x, y = torch.randn(6, 4, 3, 3), torch.randn(6, 8, 6, 6)
    tracker.step(0.0)
    ((_, learner),) = tracker._learners.items()
    for _ in range(2):
        F.mse_loss(model(x), y).backward()
    learner.measure()
    weight, bias, links = learner.chosen()
    pool, winner = learner.candidates, learner.candidates.best_score.argmax(0)
    assert (weight.shape, bias, links.shape) == ((4, 8 // groups, 2, 2), None, (0, 8))
    assert len(set(winner.tolist())) > 1
    # A neuron's output says where its weights are: run each candidate whole, and take its channel.
    layer = net[0]
    whole = [
        torch.func.functional_call(layer, {"weight": candidate}, (x,))
        for candidate in pool.best_weight
    ]
    expected = torch.stack([whole[c][:, n] for n, c in enumerate(winner.tolist())], 1)
    torch.testing.assert_close(
        torch.func.functional_call(layer, {"weight": weight}, (x,)), expected
    )
    while tracker.phase is pbfx.Phase.DENDRITE:
        F.mse_loss(model(x), y).backward()
        tracker.step(0.0)
    assert model.grown()["0"].weight.shape == (1, 4, 8 // groups, 2, 2)
    before = F.mse_loss(model(x), y)
    before.backward()
    optimizer.step()
    assert F.mse_loss(model(x), y) < before
    assert model.grown()["0"].to_soma.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", CONVS)
@pytest.mark.parametrize("padding", [1, "same"])
def test_without_a_batch(dims: int, mode: str, padding: int | str):
    torch.manual_seed(0)
    conv = CONVS[dims](4, 3, 2, padding=padding, padding_mode=mode, dtype=F64)
    check(conv, inputs(dims, batch=()))


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
@pytest.mark.parametrize("dims", CONVS)
def test_of_an_empty_batch(dims: int, mode: str):
    conv = CONVS[dims](4, 3, 2, padding=1, padding_mode=mode, dtype=F64)
    x = inputs(dims, batch=(0,)).requires_grad_()
    ours = echo(nn.Sequential(conv))
    y = ours(x)
    assert y.shape == conv(x).shape
    y.sum().backward()
    assert ours.get_parameter("0.dendrites.to_soma").grad.eq(0).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_is_the_whole_model(mode: str):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 3, 2, padding="same", padding_mode=mode, dtype=F64)
    for model, x in ((conv, inputs(2)), (nn.Linear(4, 3, dtype=F64), inputs(1).mT)):
        y, ours = model(x), echo(model)
        assert [name for name in ours.state_dict() if "." not in name] == ["weight", "bias"]
        torch.testing.assert_close(ours(x), y + F.relu(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axes", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_over_any_axes(axes: tuple[int, ...], bias: bool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias, dtype=F64))
    check(model, torch.randn(*axes, 4, dtype=F64))


class Call(nn.Module):
    """One functional op over parameters, called with the arguments given."""

    def __init__(self, op, weight: tuple[int, ...], bias: bool, args: tuple, kwargs: dict):
        super().__init__()
        self.op, self.args, self.kwargs = op, args, kwargs
        self.w = nn.Parameter(torch.randn(weight, dtype=F64))
        self.b = nn.Parameter(torch.randn(weight[0], dtype=F64)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kwargs.get("named"):
            rest = {key: value for key, value in self.kwargs.items() if key != "named"}
            return self.op(weight=self.w, bias=self.b, input=x, **rest)
        return self.op(x, self.w, self.b, *self.args, **self.kwargs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_functional_linear(bias: bool, named: bool):
    torch.manual_seed(0)
    check(
        Call(F.linear, (3, 4), bias, (), {"named": True} if named else {}),
        torch.randn(5, 4, dtype=F64),
    )


@pytest.mark.parametrize("dims", CONVS)
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((2, 1), {}),
        ((), {"named": True, "stride": 2, "padding": 1, "dilation": 2}),
        ((1, "same"), {}),
        ((), {"padding": "same", "dilation": 3}),
        ((), {"padding": "valid", "groups": 2}),
        (([2], (1,), [2], 2), {}),
    ],
)
def test_functional_convolutions(dims: int, args: tuple, kwargs: dict):
    torch.manual_seed(0)
    groups = 2 if kwargs.get("groups") == 2 or len(args) == 4 else 1
    op = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    check(Call(op, (6, 4 // groups, *[2] * dims), True, args, kwargs), inputs(dims))


@pytest.mark.parametrize("dims", TRANSPOSED)
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((3, 1, 2), {}),
        (([3], (1,), [1], 2, 2), {}),
        ((), {"named": True, "stride": 2, "padding": 1, "dilation": 2, "output_padding": 1}),
    ],
)
def test_functional_transposed_convolutions(dims: int, args: tuple, kwargs: dict):
    torch.manual_seed(0)
    groups = 2 if len(args) == 5 else 1
    op = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    model = Call(op, (4, 6 // groups, *[2] * dims), False, args, kwargs)
    model.b = nn.Parameter(torch.randn(6, dtype=F64))
    check(model, inputs(dims))


def test_torch_names_of_the_same_functions_count():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4, 2, 2, dtype=F64))

        def forward(self, x):
            return torch.conv2d(x, self.w, stride=2)

    torch.manual_seed(0)
    check(Net(), inputs(2))


@pytest.mark.parametrize("dims", CONVS)
def test_a_computed_geometry_is_no_site(dims: int):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4, *[1] * dims))
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            op = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
            y = op(x, self.w, stride=x.size(1))
            return self.fc(y.flatten(2).mean(-1))

    ours = pbfx.transform(Net())
    assert [site.name for site in ours.perforation.sites] == ["fc"]
    assert "computed from the input" in ours.perforation.skipped[0].reason
