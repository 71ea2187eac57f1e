"""Somas and dendrites in one product, against the float64 oracle."""

import pytest
import torch
from kernel_cases import BY_NAME, Site, make_neurons, sites
from tolerances import assert_close
from torch import Tensor, nn

from pbfx_kernels.neurons import joined, neurons

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    # cuDNN's default for float32 convolutions is TF32, which the float32 tolerance excludes.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on(device: str, tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def check(site: Site, d: int, bias: bool, dtype: torch.dtype, device: str = "cpu") -> None:
    case = make_neurons(site, d, bias, dtype)
    out = neurons(*on(device, case.together), "tanh", site.geometry)
    assert out.dtype == dtype
    assert_close(out.cpu(), case.expected)
    if d:
        soma = case.soma.to(device, dtype)
        before = soma.clone()
        out = joined(soma, *on(device, case.apart), "tanh", site.geometry)
        assert torch.equal(soma, before)
        assert out.dtype == dtype
        assert_close(out.cpu(), case.expected)


@pytest.mark.parametrize("d", [0, 1, 3])
@sites
def test_matches_the_oracle(site: Site, d: int) -> None:
    check(site, d, d != 1, torch.float64)


@DTYPES
@pytest.mark.parametrize("name", ["linear-63-127", "conv2d", "conv3d"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    check(BY_NAME[name], 3, True, dtype)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("bias", [True, False])
@sites
def test_on_a_gpu(site: Site, bias: bool, dtype: torch.dtype) -> None:
    check(site, 3, bias, dtype, "cuda")


@DEVICES
def test_gradients_are_those_of_the_function(device: str) -> None:
    site = BY_NAME["conv2d-form"]
    given, found = make_neurons(site, 2, dtype=torch.float32).together, []
    for dtype in (torch.float32, torch.float64):
        x, *rest = (t.to(device, dtype) for t in given)
        x.requires_grad_()
        out = neurons(x, *rest, "tanh", site.geometry)
        found += torch.autograd.grad(out.square().sum(), x)
    assert_close(found[0].cpu(), found[1].cpu())


@DEVICES
@pytest.mark.parametrize("name", ["linear", "conv2d-form"])
def test_autocast_decides_once(name: str, device: str) -> None:
    site = BY_NAME[name]
    case = make_neurons(site, 2, dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        out = neurons(*on(device, case.together), "tanh", site.geometry)
        # A norm between soma and dendrites has run in float32.
        wide = joined(case.soma.float().to(device), *on(device, case.apart), "tanh", site.geometry)
    assert (out.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert_close(out.cpu(), case.expected)
    assert_close(wide.cpu(), case.expected)


class Module(nn.Module):
    def __init__(self, site: Site, d: int) -> None:
        super().__init__()
        self.form = site.geometry
        x, *packed = make_neurons(site, d, dtype=torch.float32).together
        self.x, self.packed = x, nn.ParameterList(packed)

    def forward(self, x: Tensor) -> Tensor:
        return neurons(x, *self.packed, "gelu", self.form)


@DEVICES
@pytest.mark.parametrize("name", ["linear-sequence", "conv2d-form", "transposed2d-form"])
def test_exports_to_aten_alone(name: str, device: str) -> None:
    model = Module(BY_NAME[name], 2).to(device)
    x = model.x.to(device)
    program = torch.export.export(model, (x,))
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert all(getattr(op, "namespace", "aten") == "aten" for op in called), called
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_without_asking_what_dynamo_cannot_trace(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dynamo of torch 2.11 warns where it meets this query, and breaks the graph.
    def refuse(device: str) -> bool:
        raise AssertionError(device)

    site = BY_NAME["conv2d-form"]
    case = make_neurons(site, 2, dtype=torch.float32)
    soma = case.soma.float()
    calls = (
        lambda: neurons(*case.together, "tanh", site.geometry),
        lambda: joined(soma, *case.apart, "tanh", site.geometry),
    )
    for call, dtype in zip(calls, (torch.bfloat16, torch.float32), strict=True):
        torch._dynamo.reset()
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            with monkeypatch.context() as patch:
                patch.setattr(torch.amp, "is_autocast_available", refuse)
                found = compiled()
            assert found.dtype == (dtype if autocast else torch.float32)
            assert_close(found, case.expected)
