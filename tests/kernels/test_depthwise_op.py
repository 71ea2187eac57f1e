"""`pbfx::perforated_depthwise` on the CPU: values, gradients, fakes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BY_NAME, DEPTHWISE, Site
from neuron_cases import NAMES, Arguments, check_frozen_parts, check_neuron, make_arguments
from tolerances import assert_close
from torch import Tensor

import pbfx_kernels.depthwise_op  # noqa: F401  registers the op
from pbfx_kernels import ArgumentError, Geometry

sites = pytest.mark.parametrize("site", DEPTHWISE, ids=lambda site: site.name)


def form_of(site: Site) -> tuple[tuple[int, ...], ...]:
    geometry = site.geometry
    return geometry.stride, geometry.padding, geometry.dilation


def call(args: Arguments, site: Site, keep: bool = True) -> tuple[Tensor, Tensor]:
    op = torch.ops.pbfx.perforated_depthwise.default
    return op(*(args[name] for name in NAMES), "tanh", *form_of(site), keep)


@sites
@pytest.mark.parametrize("d", [0, 1, 3])
@pytest.mark.parametrize("keep", [True, False])
def test_matches_oracle(site: Site, d: int, keep: bool) -> None:
    check_neuron(call, site, d, keep)


@sites
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("d", [0, 2])
def test_op(site: Site, d: int, keep: bool) -> None:
    args = make_arguments(site, d)
    op = torch.ops.pbfx.perforated_depthwise.default
    tensors = [args[name] for name in NAMES]
    torch.library.opcheck(op, (*tensors, "tanh", *form_of(site), keep))


@sites
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
def test_backward_op(site: Site, needs: tuple[bool, bool, bool]) -> None:
    args = {name: None if t is None else t.detach() for name, t in make_arguments(site, 2).items()}
    grad = torch.randn_like(site.soma(args["x"], args["weight"], None))
    op = torch.ops.pbfx.perforated_depthwise_backward.default
    links = (args[name] for name in ("dendrite_weight", "dendrite_bias", "to_dendrite"))
    given = grad, args["x"], args["weight"], *links, "tanh", *form_of(site), *needs
    torch.library.opcheck(op, given)
    found = op(*given)
    assert [t.numel() > 0 for t in found] == [needs[0], needs[1], needs[1], needs[2]]


def test_gradients_can_be_differentiated() -> None:
    site = BY_NAME["conv2d-depthwise"]
    args = make_arguments(site, 2)
    args["to_soma"] = args["to_soma"].detach()
    learning = [args[name] for name in ("x", "weight")]

    def run(*tensors: Tensor) -> Tensor:
        return call(args | dict(zip(("x", "weight"), tensors, strict=True)), site)[0]

    small = [t.detach().requires_grad_() for t in learning]
    torch.autograd.gradgradcheck(run, small, nondet_tol=1e-12)


def test_channels_last_stays_so() -> None:
    site = BY_NAME["conv2d-depthwise"]
    args = make_arguments(site, 2)
    wanted, _ = call(args, site)
    args["x"] = args["x"].detach().to(memory_format=torch.channels_last).requires_grad_()
    out, activations = call(args, site)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert activations[1].is_contiguous(memory_format=torch.channels_last)
    assert_close(out, wanted)


def test_frozen_parts_get_nothing() -> None:
    check_frozen_parts(call, BY_NAME["conv2d-depthwise"])


def test_refuses_what_does_not_fit() -> None:
    site = BY_NAME["conv2d-depthwise"]
    args = make_arguments(site, 2)
    args["to_soma"] = args["to_soma"].detach()[:, :-1]
    with pytest.raises(ArgumentError, match="to_soma"):
        call(args, site)
    args = make_arguments(site, 2)
    args["dendrite_weight"] = args["dendrite_weight"][0]
    with pytest.raises(ArgumentError, match="weight"):
        call(args, site)


def test_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    import pbfx_kernels.flops  # noqa: F401  registers the formulas

    for site in DEPTHWISE:
        args = make_arguments(site, 2)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            out, _ = call(args, site)
        each = 2 * out.numel() * args["weight"][0].numel()
        assert counter.get_total_flops() == 3 * each
        for keep, products in ((True, 2), (False, 4)):
            out, _ = call(args, site, keep)
            with FlopCounterMode(display=False) as counter:
                out.sum().backward()
            assert counter.get_total_flops() == products * each


def test_one_channel_each() -> None:
    """What the strategy takes, and what it leaves to others."""
    from test_kernel_strategy import but

    from pbfx_kernels.strategy import is_depthwise

    def conv(groups: int, channels: int = 1, spatial: int = 2, transposed: bool = False) -> bool:
        form = Geometry.convolution(spatial, groups=groups, transposed=transposed)
        return is_depthwise(but(geometry=form, neurons=24, channels=channels, taps=9))

    assert conv(24)
    assert conv(24, spatial=1)
    assert not conv(24, spatial=3)
    assert not conv(12), "two neurons per channel"
    assert not conv(12, channels=2)
    assert not conv(1, channels=24)
    assert not conv(24, transposed=True)
    assert not is_depthwise(but(neurons=1, channels=1))
