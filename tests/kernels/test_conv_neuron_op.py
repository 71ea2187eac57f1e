"""`pbfx::perforated_conv2d` on the CPU: values, gradients, layouts, fakes, and what it refuses."""

import dataclasses
from typing import Any

import pytest
import torch
from kernel_cases import BY_NAME, Site
from neuron_cases import NAMES, Arguments, check_frozen_parts, check_neuron, make_arguments
from torch import Tensor

import pbfx_kernels.conv_neuron_op  # noqa: F401  registers the op
from pbfx_kernels import ArgumentError, Geometry, strategy
from pbfx_kernels.forms import Form, choose_form
from pbfx_kernels.problem import Problem
from pbfx_kernels.strategy import Route, fuses, route_of

SITES = [
    BY_NAME[name]
    for name in ("conv2d", "conv2d-form", "conv2d-depthwise", "conv2d-1x1", "conv2d-empty")
]
sites = pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)


def call(args: Arguments, site: Site, keep: bool = True) -> tuple[Tensor, Tensor]:
    op = torch.ops.pbfx.perforated_conv2d.default
    return op(*(args[name] for name in NAMES), "tanh", *site.op_geometry[:4], keep)


@sites
@pytest.mark.parametrize("d", [0, 1, 3])
@pytest.mark.parametrize("keep", [True, False])
def test_matches_oracle(site: Site, d: int, keep: bool) -> None:
    check_neuron(call, site, d, keep)


@pytest.mark.parametrize("site", [BY_NAME["conv2d-form"], BY_NAME["conv2d-1x1"]], ids=str)
@pytest.mark.parametrize("d", [0, 2])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_op(site: Site, d: int, keep: bool, last: bool) -> None:
    args = make_arguments(site, d, dtype=torch.float32)
    if last:
        x = args["x"].detach().contiguous(memory_format=torch.channels_last)
        args["x"] = x.requires_grad_()
    op = torch.ops.pbfx.perforated_conv2d.default
    form = ("tanh", *site.op_geometry[:4], keep)
    torch.library.opcheck(op, (*(args[name] for name in NAMES), *form))


def test_layout_is_that_of_the_input_or_of_the_weight() -> None:
    site = BY_NAME["conv2d"]
    for name in (None, "x", "weight"):
        args = {k: None if t is None else t.detach() for k, t in make_arguments(site, 2).items()}
        if name:
            args[name] = args[name].contiguous(memory_format=torch.channels_last)
        out, activations = call(args, site)
        last = name is not None
        assert out.is_contiguous(memory_format=torch.channels_last) is last
        assert activations[1].stride() == out.stride()


def test_frozen_parts_get_nothing() -> None:
    check_frozen_parts(call, BY_NAME["conv2d-form"])


def test_links_alone_learn() -> None:
    site = BY_NAME["conv2d-form"]
    args = make_arguments(site, 2)
    for name in ("x", "weight", "bias"):
        args[name].requires_grad_(False)
    for keep in (True, False):
        (found,) = torch.autograd.grad(call(args, site, keep)[0].sum(), args["to_soma"])
        assert found.shape == args["to_soma"].shape
        assert found.abs().min() > 0


def test_refuses_what_does_not_fit() -> None:
    site = BY_NAME["conv2d"]
    args = make_arguments(site, 2)
    args["to_soma"] = args["to_soma"].detach()[:, :-1]
    with pytest.raises(ArgumentError, match="to_soma"):
        call(args, site)
    args = make_arguments(site, 2)
    args["x"] = args["x"].detach()[0]
    with pytest.raises(ArgumentError, match="x, weight: expected 4 axes, got"):
        call(args, site)


def test_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    import pbfx_kernels.flops  # noqa: F401  registers the formulas

    site = BY_NAME["conv2d-form"]
    args = make_arguments(site, 2)
    with FlopCounterMode(display=False) as plain:
        soma = site.soma(args["x"], args["weight"], args["bias"])
    with FlopCounterMode(display=False) as counter:
        out, _ = call(args, site)
    assert counter.get_total_flops() == 3 * plain.get_total_flops()
    with FlopCounterMode(display=False) as plain:
        soma.sum().backward()
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # Perforated: the error reaches the input and the soma's weight, and no dendrite's.
    assert counter.get_total_flops() == plain.get_total_flops()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Describe tensors on the CPU as if they were on a Hopper GPU."""

    def problem(*args: Any) -> Problem:
        return Problem("cuda", (9, 0), *args[2:])

    monkeypatch.setattr("pbfx_kernels.problem.Problem", problem)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("x", "weight", "form", "expected"),
    [
        ((4, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}, Route.WALKED),
        ((4, 64, 56, 56), (64, 64, 3, 3), {"padding": 1, "stride": 2}, Route.WALKED),
        ((4, 64, 56, 55), (64, 64, 3, 3), {"padding": 1, "stride": 2}, None),
        ((4, 16, 56, 55), (64, 16, 3, 3), {"padding": 1, "stride": 2}, Route.PATCHES),
        ((4, 64, 56, 55), (64, 64, 3, 3), {"stride": (2, 1)}, Route.WALKED),
        ((4, 24, 56, 56), (64, 24, 3, 3), {"stride": (1, 2)}, Route.PATCHES),
        ((4, 64, 56, 56), (256, 64, 1, 1), {}, Route.POINTWISE),
        ((4, 64, 56, 56), (256, 64, 1, 1), {"stride": 2}, Route.WALKED),
        ((4, 64, 56, 56), (256, 64, 1, 1), {"padding": 1}, Route.WALKED),
        ((4, 60, 56, 56), (256, 60, 1, 1), {}, Route.PATCHES),
        ((4, 3, 56, 56), (64, 3, 7, 7), {"stride": 2}, Route.PATCHES),
        ((4, 36, 56, 56), (64, 36, 3, 3), {}, None),
        ((4, 64, 56, 56), (64, 32, 3, 3), {"groups": 2}, Route.WALKED),
        ((4, 64, 56, 56), (64, 8, 3, 3), {"groups": 8}, None),
        ((4, 64, 56, 56), (16, 32, 3, 3), {"groups": 2}, None),
        ((4, 64, 56, 56), (64, 1, 3, 3), {"groups": 64}, None),
        ((1, 64, 4096, 4096), (64, 64, 3, 3), {"padding": 1}, None),
        ((0, 64, 56, 56), (64, 64, 3, 3), {}, None),
    ],
)
def test_routes(x, weight, form, expected) -> None:
    geometry = Geometry.convolution(2, **form)
    kind = {"device": "meta", "dtype": torch.bfloat16}
    given, soma, dendrites = (torch.empty(shape, **kind) for shape in (x, weight, (3, *weight)))
    assert route_of(given, soma, dendrites, geometry) is expected


@pytest.mark.usefixtures("hopper")
def test_dtypes_and_dendrites(monkeypatch: pytest.MonkeyPatch) -> None:
    def route(dtype: torch.dtype, d: int) -> Route | None:
        x, weight, v = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((4, 64, 56, 56), (64, 64, 3, 3), (d, 64, 64, 3, 3))
        )
        return route_of(x, weight, v, Geometry.convolution(2))

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert [route(dtype, d) for d in (0, 1, 7, 8)] == [None, Route.WALKED, Route.WALKED, None]
    assert route(torch.float64, 1) is None
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert route(torch.float32, 1) is None


def test_what_fuses_can_be_run() -> None:
    for channels in (1, 3, 8, 20, 64, 512):
        for groups in (1, 4, channels):
            geometry = Geometry.convolution(2, padding=1, groups=groups)
            for d in (1, 3, 7, 8):
                problem = Problem(
                    *("cuda", (9, 0), torch.bfloat16, False, geometry, 200704),
                    *(64 * groups, channels // groups or 1, 9, d),
                )
                if fuses(problem):
                    assert d <= 7
                    assert strategy._walks(problem) or strategy._patched(problem)


TF32 = {"dtype": torch.float32, "tf32": True}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Form.FUSED),
        ({"geometry": Geometry.convolution(2, 2, 1)}, Form.FUSED),
        ({"taps": 1, "channels": 2048}, Form.FUSED),
        ({"channels": 3, "taps": 49}, Form.FUSED),
        ({"channels": 512}, Form.PACKED),
        ({"channels": 20}, Form.PACKED),
        ({"positions": 196}, Form.PACKED),
        ({"dendrites": 5}, Form.PACKED),
        (TF32, Form.PACKED),
        (TF32 | {"channels": 64, "channels_last": False}, Form.FUSED),
        (TF32 | {"channels": 64}, Form.PACKED),
        (TF32 | {"channels": 3}, Form.FUSED),
        (TF32 | {"taps": 1}, Form.FUSED),
        ({"dtype": torch.float32, "channels": 64}, Form.PACKED),
        ({"capability": (8, 0)}, Form.PACKED),
        ({"geometry": Geometry.convolution(2, groups=16)}, Form.FUSED),
        ({"geometry": Geometry.convolution(2, groups=32)}, Form.PACKED),
    ],
    ids=str,
)
def test_forms(changes: dict[str, Any], expected: Form) -> None:
    """What a compiled graph holds where nothing but the dendrites reads the soma."""
    conv = Geometry.convolution(2, padding=1)
    problem = Problem("cuda", (9, 0), torch.bfloat16, False, conv, 50176, 256, 256, 9, 3)
    assert choose_form(dataclasses.replace(problem, **changes), False, True, True) is expected
    assert choose_form(dataclasses.replace(problem, **changes), False, True) is not Form.FUSED


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # MNIST's two convolutions at batches of 64 and 32.
        ({"positions": 43264, "neurons": 32, "channels": 1}, Form.FUSED),
        ({"positions": 36864, "neurons": 64, "channels": 32}, Form.FUSED),
        ({"positions": 18432, "neurons": 64, "channels": 32}, Form.PACKED),
        (TF32 | {"positions": 43264, "neurons": 32, "channels": 1}, Form.FUSED),
        (TF32 | {"channels": 32, "channels_last": False}, Form.PACKED),
        (TF32 | {"taps": 1}, Form.FUSED),
    ],
    ids=str,
)
def test_forms_in_training(changes: dict[str, Any], expected: Form) -> None:
    conv = Geometry.convolution(2, padding=1)
    problem = Problem("cuda", (9, 0), torch.bfloat16, False, conv, 50176, 256, 256, 9, 3)
    assert choose_form(dataclasses.replace(problem, **changes), True, True, True) is expected
