"""Dendrites on some channels compute what dendrites on all do whose other links are zero."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import pbfx
from models import CASES, randomise
from pbfx.sites import channels_together, on_channels, rows_of, why_no_subset
from selection.subsets import dendrites_of, grow_some, relative, restrict, sites_of
from zoo.member import tensors_of

F64 = torch.float64
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def check(plain: nn.Module, x: Tensor, dendrites: int = 2) -> None:
    """Compare outputs and gradients of the subset with those of the whole."""
    plain = plain.to(F64)
    whole = pbfx.grow(pbfx.transform(plain), dendrites)
    part = grow_some(pbfx.transform(plain), dendrites)
    sites = sites_of(part)
    randomise(whole)
    restrict(whole, part)
    ys = tensors_of(part(x))
    # Another order of sums is the only difference.
    for y, expected in zip(ys, tensors_of(whole(x)), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert max(map(relative, ys, tensors_of(plain(x)))) > 1e-3
    for model in (whole, part):
        model.zero_grad()
        # Not a plain sum: behind a softmax or a norm its gradient would vanish.
        loss = torch.zeros((), dtype=F64)
        for y in tensors_of(model(x)):
            loss = loss + (y * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum()
        loss.backward()
        model.gradients = {
            name: p.grad.clone()
            for name, p in model.named_parameters()
            if p.grad is not None and "dendrites" not in name
        }
    assert part.gradients.keys() == whole.gradients.keys()
    for name, gradient in part.gradients.items():
        torch.testing.assert_close(gradient, whole.gradients[name], rtol=1e-11, atol=1e-11)
    for name, some in dendrites_of(part).items():
        kept = range(sites[name].neurons) if some.site.channels is None else some.site.channels
        full = dendrites_of(whole)[name].to_soma.grad[:, list(kept)]
        torch.testing.assert_close(some.to_soma.grad, full, rtol=1e-11, atol=1e-11)


def inputs(dims: int, channels: int = 4, batch: tuple[int, ...] = (2,)) -> Tensor:
    sizes = (7, 6, 5)[:dims]
    generator = torch.Generator().manual_seed(dims)
    return torch.randn(*batch, channels, *sizes, dtype=F64, generator=generator)


@pytest.mark.parametrize("dims", CONVS)
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions(dims: int, transposed: bool):
    torch.manual_seed(0)
    kinds = TRANSPOSED if transposed else CONVS
    for stride, groups, bias in itertools.product((1, 2), (1, 2, 4), (True, False)):
        conv = kinds[dims](4, 8, 3, stride, padding=1, groups=groups, bias=bias)
        check(nn.Sequential(conv), inputs(dims))
        check(nn.Sequential(conv), inputs(dims, batch=()))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode: str):
    torch.manual_seed(0)
    for padding in (1, "same"):
        conv = nn.Conv2d(4, 6, 3, padding=padding, groups=2, padding_mode=mode)
        check(nn.Sequential(conv), inputs(2))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6)])
def test_dendrites_that_join_after_a_norm(norm: nn.Module):
    torch.manual_seed(0)
    check(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), norm, nn.ReLU()), inputs(2))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cases(case):
    torch.manual_seed(0)
    check(case.build().eval(), case.input().double())


class Products(nn.Module):
    """Weights stored (K, N), and what is not a batch of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5, 3))
        self.c, self.shift = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.a) @ self.b
        return torch.addmm(self.shift, x.flatten(0, -2), self.c)


def test_products():
    torch.manual_seed(0)
    check(Products(), torch.randn(2, 3, 4, dtype=F64))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cell):
    class Stepper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = cell(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = self.cell(x)
            return self.head(state[0] if isinstance(state, tuple) else state)

    torch.manual_seed(0)
    check(Stepper(), torch.randn(5, 4, dtype=F64))


def site_of(module: nn.Module):
    (site,) = pbfx.transform(nn.Sequential(module)).perforation.sites
    return site


def test_a_group_stays_whole():
    site = site_of(nn.Conv2d(4, 8, 3, groups=4))
    assert channels_together(site) == 2
    assert why_no_subset(site, [2, 3, 6, 7]) is None
    assert "groups" in (why_no_subset(site, [2, 3, 6]) or "")
    small = on_channels(site, [2, 3, 6, 7])
    assert (small.shape, small.geometry.groups) == ((4, 1, 3, 3), 2)
    assert small.subset is not None
    assert small.subset.inputs == (1, 3)
    # What a neuron reads is the same, so that fresh weights are drawn alike.
    assert small.fan_in == site.fan_in


def test_rows_of_a_grouped_transposed_convolution():
    site = site_of(nn.ConvTranspose1d(6, 4, 3, groups=2))
    small = on_channels(site, [2, 3])
    weight = torch.arange(6 * 2 * 3).view(6, 2, 3)
    assert (small.shape, small.geometry.groups) == ((3, 2, 3), 1)
    assert torch.equal(rows_of(site, weight, small), weight[3:])


def test_all_channels_are_no_subset():
    site = site_of(nn.Linear(3, 4))
    assert on_channels(site, range(4)) is site
    model = pbfx.grow(pbfx.transform(nn.Sequential(nn.Linear(3, 4))), channels=[3, 1, 0, 2])
    assert "0.dendrites.channels" not in model.state_dict()


def test_signed_zeros_outlive_an_untrained_dendrite():
    model = nn.Sequential(nn.Linear(3, 4))
    with torch.no_grad():
        model[0].weight.fill_(-0.0)
        model[0].bias.fill_(-0.0)
    grown = pbfx.grow(pbfx.transform(model), channels=[0, 3])
    x = torch.ones(2, 3)
    assert torch.equal(torch.signbit(grown(x)), torch.signbit(model(x)))
