"""The cascade's gradient against the float64 oracle, on a GPU or in Triton's interpreter.

`test_full_kernels.py` runs this file in a process of its own: Triton reads TRITON_INTERPRET once,
and inductor's tests must not find it set.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from full_cases import NAMES, oracle_full, oracle_gradients, small_sites
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BY_NAME, SITES, Site, Tensors, make_dendrites
from tolerances import assert_close, relative_error
from torch import Tensor

from pbfx_kernels import ACTIVATIONS, LINEAR, full_gradient
from pbfx_kernels.cascade_gradient import cascade_gradient
from pbfx_kernels.full_gradient import (
    differentiate_full,
    evaluate_full,
    plain_cascade_gradient,
    saved_shape,
)
from pbfx_kernels.strategy import Strategy

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
F32 = torch.float32
DTYPES = (F32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FULL = [site for site in SITES if "empty" not in site.name]
sites = pytest.mark.parametrize("site", FULL, ids=lambda site: site.name)
# exp(-z) of a very negative z is infinite, and 0 * inf is NaN, which numpy reports.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def moved(tensors: Tensors) -> Tensors:
    return {name: None if t is None else t.detach().to(DEVICE) for name, t in tensors.items()}


def cascade(
    args: Tensors, z: Tensor, grad: Tensor, site: Site, activation: str, frozen: int, wide: bool
) -> tuple[Tensor, Tensor]:
    """Run the kernel, or the same in float64 plain torch."""
    links: list[Any] = [args[name] for name in ("bias", "to_soma", "to_dendrite")]
    if wide:
        z, grad, *links = (None if t is None else t.double().cpu() for t in (z, grad, *links))
    run = plain_cascade_gradient if wide else cascade_gradient
    return run(grad, z, *links, activation, site.geometry, frozen, True)


def check_cascade(
    site: Site, args: Tensors, grad: Tensor, activation: str = "tanh", frozen: int = 0
) -> None:
    """Compare the kernel with the float64 reference of the same preactivations."""
    d = len(args["to_soma"])
    shape = saved_shape(args["soma"].shape, d, site.geometry)
    z = torch.randn(shape, device=DEVICE).to(args["soma"].dtype)
    dz, sums = cascade(args, z, grad, site, activation, frozen, wide=False)
    wanted, wanted_sums = cascade(args, z, grad, site, activation, frozen, wide=True)
    assert dz.dtype == z.dtype
    assert_close(dz.cpu(), wanted)
    assert sums.dtype == F32
    # The hardware's tanh is made for results that are rounded to bfloat16.
    fast = not INTERPRETED and z.dtype == torch.bfloat16
    assert_close(sums.cpu(), wanted_sums, z.dtype if fast else F32)
    nothing = wanted_sums == 0
    assert torch.equal(sums.cpu()[nothing], torch.zeros(int(nothing.sum())))


@dtypes
@pytest.mark.parametrize(("d", "frozen"), [(1, 0), (3, 0), (3, 2), (4, 1)])
@sites
def test_site(site: Site, d: int, frozen: int, dtype: torch.dtype) -> None:
    args = moved(make_dendrites(site, d, bias=d != 3).args(dtype))
    check_cascade(site, args, torch.randn_like(args["soma"]), "tanh", frozen)


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    for name in ("linear-63-127", "conv2d-form"):
        args = moved(make_dendrites(BY_NAME[name], 2).args(dtype))
        check_cascade(BY_NAME[name], args, torch.randn_like(args["soma"]), activation)


def test_many_dendrites() -> None:
    args = moved(make_dendrites(BY_NAME["linear"], 8).args(F32))
    check_cascade(BY_NAME["linear"], args, torch.randn_like(args["soma"]), "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slope_is_close_everywhere(activation: str) -> None:
    """Element by element: a norm over all would hide the small ones."""
    z = torch.cat([torch.linspace(-12, 12, 241), torch.logspace(-6, 0, 100), torch.zeros(1)])
    z = torch.cat([z, torch.tensor([torch.nan])])[:, None].to(DEVICE)
    ones, none = torch.ones(1, 1, device=DEVICE), torch.zeros(1, 1, 1, device=DEVICE)
    run = cascade_gradient(torch.ones_like(z), z, None, ones, none, activation, LINEAR, 0, False)
    assert run[1].shape == (0, 1)
    exact = z.double().requires_grad_()
    # The oracle's own modules, by autograd.
    (wanted,) = torch.autograd.grad(
        oracle_full(
            Site("pass-through", tuple(z.shape), (1, 1)),
            {
                "soma": torch.zeros_like(exact),
                "x": exact,
                "weight": torch.ones(1, 1, 1, dtype=torch.float64, device=DEVICE),
                "bias": None,
                "to_soma": ones.double(),
                "to_dendrite": none.double(),
            },
            activation,
        ).sum(),
        exact,
    )
    # Slopes of gelu and silu cross zero; 1 - a² cancels, and a is off by a few ulps of 1.
    torch.testing.assert_close(run[0].double(), wanted, rtol=2e-6, atol=5e-7, equal_nan=True)


@dtypes
@pytest.mark.parametrize("wants_x", [True, False], ids=["x", "no x"])
@pytest.mark.parametrize(
    "name", ["linear-63-127", "conv2d-form", "conv1d", "conv3d", "conv2d", "transposed2d-form"]
)
def test_whole_gradient(name: str, wants_x: bool, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype is not F32 and name != "linear-63-127":
        # A CPU has no convolution in float16; the same kernels ran above.
        dtype = F32
    site, d, frozen = BY_NAME[name], 3, 0 if wants_x else 2
    args = moved(make_dendrites(site, d).args(dtype))
    for leaf in NAMES:
        args[leaf].requires_grad_(wants_x or leaf != "x")
    grad = torch.randn_like(args["soma"])
    wanted = oracle_gradients(site, args, grad, "tanh", frozen)
    plain = {name: t.detach() for name, t in args.items()}
    out, kept, z = evaluate_full(*plain.values(), "tanh", site.geometry, True, Strategy.PACKED)
    upcast = {name: t.double().cpu() for name, t in plain.items()}
    assert_close(out.cpu(), oracle_full(site, upcast, "tanh"))
    assert kept.shape == (d, *out.shape)
    rest = [plain[name] for name in NAMES[1:]]
    form = "tanh", site.geometry, frozen, (wants_x, True, True), Strategy.PACKED
    grad_x, grad_weight, sums = differentiate_full(grad, z, *rest, *form)
    assert grad_weight is not None
    assert sums is not None
    if wants_x:
        assert grad_x is not None
        assert_close(grad_x.cpu(), wanted["x"], dtype)
    assert_close(grad_weight.cpu(), wanted["weight"], dtype)
    assert_close(sums[:d].cpu(), wanted["to_soma"], dtype)
    assert_close(sums[d : 2 * d].cpu(), wanted["bias"], dtype)
    assert_close(sums[2 * d :].view(d, d, -1).cpu(), wanted["to_dendrite"], dtype)
    if frozen:
        assert torch.equal(grad_weight[:frozen], torch.zeros_like(grad_weight[:frozen]))


@settings(max_examples=40, deadline=None)
@given(
    site=st.booleans().flatmap(small_sites),
    d=st.integers(1, 4),
    frozen=st.integers(0, 3),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    wants_x=st.booleans(),
    seed=st.integers(0, 99),
)
def test_drawn_sites(
    site: Site, d: int, frozen: int, bias: bool, activation: str, wants_x: bool, seed: int
) -> None:
    """All gradients at once, as one vector: small sums alone may be all cancellation."""
    torch.manual_seed(seed)
    frozen = min(frozen, d)
    args = moved(make_dendrites(site, d, activation, bias).args(F32))
    for name, t in args.items():
        if t is not None:
            t.requires_grad_(wants_x or name != "x")
    grad = torch.randn_like(args["soma"])
    wanted = oracle_gradients(site, args, grad, activation, frozen)
    plain = {name: None if t is None else t.detach() for name, t in args.items()}
    form = site.geometry, False, Strategy.PACKED
    _, _, z = evaluate_full(*plain.values(), activation, *form)
    grad_x, grad_weight, sums = differentiate_full(
        grad,
        z,
        *(plain[name] for name in NAMES[1:]),
        *(activation, site.geometry, frozen, (wants_x, True, True), Strategy.PACKED),
    )
    assert grad_weight is not None
    assert sums is not None
    found = {
        "x": grad_x,
        "weight": grad_weight,
        "bias": sums[d : 2 * d],
        "to_soma": sums[:d],
        "to_dendrite": sums[2 * d :].view(d, d, -1),
    }
    learned = [name for name in found if name in wanted]
    flat = torch.cat([found[name].flatten().cpu() for name in learned])
    assert_close(flat, torch.cat([wanted[name].flatten() for name in learned]))


@sites
def test_strided_inputs(site: Site) -> None:
    args = moved(make_dendrites(site, 2).args(F32))
    grad = torch.randn_like(args["soma"])
    z = torch.randn(saved_shape(grad.shape, 2, site.geometry), device=DEVICE)
    dz, sums = cascade(args, z, grad, site, "tanh", 0, wide=False)
    strided: Tensors = {name: _strided(t) for name, t in args.items()}
    again = cascade(strided, _strided(z), _strided(grad), site, "tanh", 0, wide=False)
    assert relative_error(again[0], dz) < 1e-6
    assert relative_error(again[1], sums) < 1e-5


def test_channels_last() -> None:
    for name in ("conv2d-form", "conv2d-depthwise", "conv2d"):
        site = BY_NAME[name]
        args = moved(make_dendrites(site, 3).args(F32))
        grad = torch.randn_like(args["soma"])
        z = torch.randn(saved_shape(grad.shape, 3, site.geometry), device=DEVICE)
        for frozen in (0, 1):
            dz, sums = cascade(args, z, grad, site, "tanh", frozen, wide=False)
            last = torch.channels_last
            for g in (grad, grad.to(memory_format=last)):
                form = site, "tanh", frozen, False
                found = cascade(args, z.to(memory_format=last), g, *form)
                assert found[0].is_contiguous(memory_format=last)
                assert relative_error(found[0], dz) < 1e-6
                assert relative_error(found[1], sums) < 1e-5


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("conv2d", "linear-63-127"):
        site, frozen = BY_NAME[name], 1
        args = moved(make_dendrites(site, 3).args(F32))
        grad = torch.randn_like(args["soma"])
        z = evaluate_full(*args.values(), "tanh", site.geometry, False, Strategy.PACKED)[2]
        rest = [args[name] for name in NAMES[1:]]
        form = "tanh", site.geometry, frozen, (True, True, True), Strategy.PACKED
        whole = differentiate_full(grad, z, *rest, *form)
        with monkeypatch.context() as patch:
            patch.setattr("pbfx_kernels.packed.CHUNK_BYTES", 64)
            assert len(full_gradient.chunks(grad, 3, site.geometry)) == len(grad)
            parts = differentiate_full(grad, z, *rest, *form)
        for part, expected in zip(parts, whole, strict=True):
            assert part is not None
            assert expected is not None
            assert relative_error(part, expected) < 1e-6


def test_reads_strictly_lower_triangle() -> None:
    site = BY_NAME["conv2d-form"]
    args = moved(make_dendrites(site, 3).args(F32))
    grad = torch.randn_like(args["soma"])
    z = torch.randn(saved_shape(grad.shape, 3, site.geometry), device=DEVICE)
    expected = cascade(args, z, grad, site, "tanh", 0, wide=False)
    args["to_dendrite"] = args["to_dendrite"].clone()
    args["to_dendrite"][torch.ones(3, 3, dtype=torch.bool).triu()] = torch.nan
    for found, wanted in zip(cascade(args, z, grad, site, "tanh", 0, False), expected, strict=True):
        assert torch.equal(found, wanted)


def test_same_bits_every_time() -> None:
    site = Site("many", (700, 8), (40, 8))
    args = moved(make_dendrites(site, 3).args(F32))
    grad, z = torch.randn_like(args["soma"]), torch.randn(700, 120, device=DEVICE)
    first, again = (cascade(args, z, grad, site, "gelu", 0, False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def _strided(tensor: Tensor) -> Tensor:
    """Copy into every second element of a larger buffer, axes reversed."""
    buffer = tensor.new_full((*reversed(tensor.shape), 2), torch.nan)[..., 0]
    view = buffer.permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)
