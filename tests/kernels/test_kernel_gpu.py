"""The ops on a CUDA device, against the float64 oracle on the CPU."""

import pytest
import torch
from kernel_cases import (
    BY_NAME,
    Site,
    Tensors,
    make_candidates,
    make_dendrites,
    oracle_candidates,
    oracle_dendrites,
    sites,
)
from tolerances import assert_close

from pbfx_kernels import candidates, dendrites

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    # cuDNN's default for float32 convolutions is TF32, which the float32 tolerance excludes.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _on_gpu(tensors: Tensors) -> Tensors:
    return {
        name: None
        if tensor is None
        else tensor.detach().cuda().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }


def _upcast(tensors: Tensors) -> Tensors:
    return {
        name: None
        if tensor is None
        else tensor.detach().cpu().double().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }


@DTYPES
@sites
def test_dendrites(site: Site, dtype: torch.dtype) -> None:
    args = _on_gpu(make_dendrites(site, 3).args(dtype))
    expected = _upcast(args)
    out, _ = dendrites(**args, activation="tanh", geometry=site.geometry)
    ref_out, _ = oracle_dendrites(site, expected, "tanh")
    assert_close(out.cpu(), ref_out)
    grad = torch.randn(ref_out.shape, dtype=torch.float64).to(dtype)
    out.backward(grad.cuda())
    ref_out.backward(grad.double())
    assert torch.equal(args["soma"].grad.cpu(), grad)
    assert_close(args["to_soma"].grad.cpu(), expected["to_soma"].grad)


@DTYPES
@pytest.mark.parametrize("op", [False, True], ids=["eager", "op"])
@pytest.mark.parametrize(("c", "d"), [(1, 0), (3, 1)])
@sites
def test_candidates(site: Site, c: int, d: int, op: bool, dtype: torch.dtype) -> None:
    case = make_candidates(site, c, d, regression=d != 0)
    args = _on_gpu(case.args(dtype))
    grad = case.grad.to(dtype)
    if op:
        call = torch.ops.pbfx.candidates.default
        args.setdefault("regression", None)
        out, _ = call(*args.values(), "tanh", *site.op_geometry)
    else:
        out, _ = candidates(**args, activation="tanh", geometry=site.geometry)
    out.backward(grad.cuda())
    assert torch.equal(out.detach().cpu(), args["neuron"].detach().cpu())
    gradients, moments = oracle_candidates(site, _upcast(args), grad.double(), "tanh")
    for name, expected in gradients.items():
        assert_close(args[name].grad.cpu(), expected)
    # The sums come from activations rounded to the op's dtype.
    assert_close(args["moments"].grad.cpu().view_as(moments), moments, dtype)


@pytest.mark.parametrize(("c", "d"), [(1, 0), (3, 2)])
@pytest.mark.parametrize("name", ["linear", "conv2d-form", "conv2d"])
def test_opcheck_candidates(name: str, c: int, d: int) -> None:
    site = BY_NAME[name]
    case = make_candidates(site, c, d, bias=d != 0, regression=d != 0)
    args = _on_gpu(case.args(torch.float32))
    args.setdefault("regression", None)
    torch.library.opcheck(
        torch.ops.pbfx.candidates.default, (*args.values(), "gelu", *site.op_geometry)
    )
    plain = {name: None if t is None else t.detach() for name, t in args.items()}
    z = torch.randn(c, *plain["neuron"].shape, device="cuda")
    names = ("x", "activations", "direction", "error_mean", "regression")
    torch.library.opcheck(
        torch.ops.pbfx.candidates_backward.default,
        (
            case.grad.float().cuda(),
            z,
            *(plain[name] for name in names),
            plain["weight"].shape,
            "gelu",
            *site.op_geometry,
            torch.float32,
        ),
    )
