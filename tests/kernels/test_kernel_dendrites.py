"""`pbfx::dendrites`: values and gradients against the oracle, bit identity, dtypes, layouts."""

import pytest
import torch
from kernel_cases import (
    BY_NAME,
    F64,
    Site,
    Tensors,
    make_dendrites,
    oracle_dendrites,
    sites,
)
from tolerances import assert_close, assert_no_worse_than_eager

from pbfx_kernels import (
    ACTIVATIONS,
    Geometry,
    dendrites,
    perforated_conv2d,
    perforated_linear,
    reference,
)

LOW = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("d", [0, 1, 3])
@sites
def test_matches_oracle(site: Site, d: int, dtype: torch.dtype) -> None:
    case = make_dendrites(site, d)
    args, expected = case.args(dtype), case.args()
    out, activations = dendrites(**args, activation="tanh", geometry=site.geometry)
    ref_out, ref_activations = oracle_dendrites(site, expected, "tanh")
    assert_close(out, ref_out)
    assert activations.shape == (d, *out.shape)
    assert activations.dtype == dtype
    for a, ref_a in zip(activations, ref_activations, strict=True):
        assert_close(a, ref_a)

    grad = torch.randn_like(ref_out)
    out.backward(grad.to(dtype))
    ref_out.backward(grad)
    assert torch.equal(args["soma"].grad, grad.to(dtype))
    if d:
        assert_close(args["to_soma"].grad, expected["to_soma"].grad)
    for name in ("x", "weight", "bias", "to_dendrite"):
        assert args[name].grad is None, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    site = BY_NAME["conv2d-form"]
    case = make_dendrites(site, 3, bias=False)
    out, _ = dendrites(**case.args(), activation=activation, geometry=site.geometry)
    assert_close(out, oracle_dendrites(site, case.args(), activation)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_derivative(activation: str) -> None:
    z = torch.linspace(-9, 9, 201, dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(reference.activate(activation, z).sum(), z)
    assert_close(reference.activation_derivative(activation, z.detach()), expected)


@pytest.mark.parametrize("site", [BY_NAME["linear-63-127"], BY_NAME["conv2d-form"]], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision(site: Site, dtype: torch.dtype) -> None:
    case = make_dendrites(site, 3)
    args = case.args(dtype)
    # The oracle sees the rounded inputs, upcast.
    upcast: Tensors = {name: t.detach().double().requires_grad_() for name, t in args.items()}
    eager_args = case.args(dtype)
    out, _ = dendrites(**args, activation="tanh", geometry=site.geometry)
    ref, _ = oracle_dendrites(site, upcast, "tanh")
    eager, _ = oracle_dendrites(site, eager_args, "tanh")
    assert out.dtype == dtype
    assert_close(out, ref)
    assert_no_worse_than_eager(out, eager, ref)

    grad = torch.randn_like(out)
    out.backward(grad)
    ref.backward(grad.double())
    eager.backward(grad)
    assert_close(args["to_soma"].grad, upcast["to_soma"].grad)
    assert_no_worse_than_eager(
        args["to_soma"].grad, eager_args["to_soma"].grad, upcast["to_soma"].grad
    )


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, F64], ids=str)
@sites
def test_untrained_dendrites_leave_every_bit(site: Site, dtype: torch.dtype) -> None:
    args = make_dendrites(site, 3).args(dtype)
    soma = args["soma"].detach().clone()
    # Signed zeros are bits too. (NaN stays NaN, but its payload may change where dtypes do.)
    special = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf], dtype=dtype)
    flat = soma.view(-1)
    flat[: len(special)] = special[: len(flat)]
    args |= {"soma": soma, "to_soma": torch.zeros_like(args["to_soma"])}
    out, _ = dendrites(**args, activation="tanh", geometry=site.geometry)
    assert torch.equal(out.view(torch.uint8), soma.view(torch.uint8))


def test_reads_strictly_lower_triangle() -> None:
    site = BY_NAME["linear"]
    args = make_dendrites(site, 3).args()
    out, _ = dendrites(**args)
    upper = torch.ones(3, 3, dtype=torch.bool).triu()
    args["to_dendrite"] = args["to_dendrite"].detach().clone()
    args["to_dendrite"][upper] = torch.nan
    assert torch.equal(dendrites(**args)[0], out)


def test_strided_inputs() -> None:
    site = BY_NAME["conv2d-form"]
    args = make_dendrites(site, 2).args()
    out, activations = dendrites(**args, geometry=site.geometry)
    strided: Tensors = {name: _strided(t.detach()) for name, t in args.items()}
    assert not strided["x"].is_contiguous()
    out_strided, activations_strided = dendrites(**strided, geometry=site.geometry)
    assert_close(out_strided, out.detach())
    assert_close(activations_strided, activations)


def test_keeps_channels_last() -> None:
    site = BY_NAME["conv2d"]
    args = make_dendrites(site, 2).args()
    args["soma"] = args["soma"].detach().to(memory_format=torch.channels_last)
    out, activations = dendrites(**args, geometry=site.geometry)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert activations[1].is_contiguous(memory_format=torch.channels_last)


def test_expanded_gradient() -> None:
    args = make_dendrites(BY_NAME["linear"], 2).args()
    out, activations = dendrites(**args)
    out.sum().backward()
    assert_close(args["to_soma"].grad, activations.sum(1))


def test_activations_carry_no_gradient() -> None:
    out, activations = dendrites(**make_dendrites(BY_NAME["linear"], 2).args())
    assert out.requires_grad
    assert not activations.requires_grad


def test_frozen_links_save_nothing() -> None:
    args = make_dendrites(BY_NAME["linear"], 2).args()
    args["to_soma"].requires_grad_(False)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, _ = dendrites(**args)
    assert saved == []
    out.sum().backward()
    assert torch.equal(args["soma"].grad, torch.ones_like(out))


def test_dtype_of_the_soma_rules() -> None:
    args = make_dendrites(BY_NAME["linear"], 2).args(torch.float32)
    args["soma"] = args["soma"].detach().to(torch.bfloat16).requires_grad_()
    out, activations = dendrites(**args)
    assert out.dtype == activations.dtype == torch.bfloat16
    out.sum().backward()
    assert args["to_soma"].grad.dtype == torch.float32


def test_autocast() -> None:
    args = make_dendrites(BY_NAME["linear"], 2).args(torch.float32)
    weight, bias = torch.randn(6, 4), torch.randn(6)
    links = (args["weight"], args["bias"], args["to_soma"], args["to_dendrite"])
    with torch.autocast("cpu", torch.bfloat16):
        low = perforated_linear(args["x"], weight, bias, *links)
        full = dendrites(**args)[0]
    assert low.dtype == torch.bfloat16
    # A soma that autocast left in float32 keeps its dendrites in float32.
    assert torch.equal(full, dendrites(**args)[0])
    low.float().sum().backward()
    assert args["to_soma"].grad.dtype == torch.float32


def test_perforated_linear() -> None:
    x, weight, bias = torch.randn(5, 4), torch.randn(6, 4), torch.randn(6)
    args = make_dendrites(BY_NAME["linear"], 2).args(torch.float32)
    links = (args["weight"], args["bias"], args["to_soma"], args["to_dendrite"])
    soma = torch.nn.functional.linear(x, weight, bias)
    expected = dendrites(soma, x, *links, activation="relu")[0]
    assert torch.equal(perforated_linear(x, weight, bias, *links, activation="relu"), expected)


def test_perforated_conv2d() -> None:
    site = BY_NAME["conv2d-depthwise"]
    args = make_dendrites(site, 2).args(torch.float32)
    x, weight = torch.randn(site.x), torch.randn(site.weight)
    links = (args["weight"], args["bias"], args["to_soma"], args["to_dendrite"])
    soma = torch.nn.functional.conv2d(x, weight, None, 1, 1, 1, 4)
    expected = dendrites(soma, x, *links, geometry=site.geometry)[0]
    out = perforated_conv2d(x, weight, None, *links, padding=1, groups=4)
    assert torch.equal(out, expected)


def test_geometry_is_hashable_and_linear_by_default() -> None:
    assert Geometry() == Geometry((), (), (), 1)
    assert len({Geometry.convolution(2), Geometry((1, 1), (0, 0), (1, 1))}) == 1


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """Copy into every second element of a larger buffer, axes reversed."""
    buffer = tensor.new_full((*reversed(tensor.shape), 2), torch.nan)[..., 0]
    view = buffer.permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)
