"""Dendrites that learn by backpropagation, on a CUDA device: the op, and who calls it."""

from __future__ import annotations

import pytest
import torch
from full_cases import NAMES, oracle_full, oracle_gradients
from kernel_cases import BY_NAME, SITES, Site, Tensors, make_dendrites
from tolerances import assert_close
from torch import Tensor, nn

import pbfx
from pbfx.dendrites import Dendrites
from pbfx_kernels import Geometry, full_dendrites
from pbfx_kernels.full_autograd import full_reference

pytestmark = pytest.mark.gpu
OP = torch.ops.pbfx.full_dendrites.default


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(tensors: Tensors) -> Tensors:
    return {
        name: None if t is None else t.detach().cuda().requires_grad_()
        for name, t in tensors.items()
    }


def flat(gradients: Tensors, names: list[str]) -> Tensor:
    """One vector: the sums of a small site alone may be all cancellation."""
    return torch.cat([gradients[name].cpu().flatten() for name in names])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_every_site(site: Site, dtype: torch.dtype) -> None:
    args = on_gpu(make_dendrites(site, 3).args(dtype))
    out, _ = full_dendrites(**args, geometry=site.geometry, keep=False)
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted = oracle_gradients(site, args, grad, "tanh")
    upcast = {name: t.detach().cpu().double() for name, t in args.items()}
    assert_close(out.cpu(), oracle_full(site, upcast, "tanh"))
    assert torch.equal(args["soma"].grad, grad)
    names = [name for name in NAMES if name != "soma"]
    found = {name: args[name].grad for name in names}
    assert_close(flat(found, names), flat(wanted, names))


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_images(last: bool) -> None:
    """16-bit convolutions of many channels run in NHWC, whatever the input is laid out as."""
    site = Site("images", (4, 16, 12, 12), (24, 16, 3, 3), Geometry.convolution(2, padding=1))
    args = on_gpu(make_dendrites(site, 3).args(torch.bfloat16))
    if last:
        for name in ("soma", "x"):
            laid = args[name].detach().to(memory_format=torch.channels_last)
            args[name] = laid.requires_grad_()
    out, _ = full_dendrites(**args, geometry=site.geometry, keep=False)
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted = oracle_gradients(site, args, grad, "tanh")
    for name in NAMES[1:]:
        assert_close(args[name].grad.cpu(), wanted[name])


@pytest.mark.parametrize("name", ["linear", "conv2d-form", "conv1d", "conv2d-empty"])
def test_opcheck(name: str) -> None:
    site = BY_NAME[name]
    args = on_gpu(make_dendrites(site, 2).args(torch.float32))
    torch.library.opcheck(OP, (*args.values(), "gelu", *site.op_geometry, 1, True))


def test_compile() -> None:
    torch._dynamo.reset()
    site = BY_NAME["linear-63-127"]
    args = on_gpu(make_dendrites(site, 3).args(torch.bfloat16))

    def run(*tensors: Tensor) -> Tensor:
        return torch.relu(full_dendrites(*tensors, "tanh", site.geometry, keep=False)[0])

    def gradients(function: object) -> tuple[Tensor, ...]:
        assert callable(function)
        return torch.autograd.grad(function(*args.values()).square().sum(), tuple(args.values()))

    compiled = torch.compile(run, fullgraph=True)
    for found, wanted in zip(gradients(compiled), gradients(run), strict=True):
        assert_close(found, wanted.double())


def test_peak_memory() -> None:
    """The stack of preactivations once, for a while one chunk of its error, never two stacks."""
    rows, neurons, d = 2**18, 512, 3
    x = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16)
    args = {
        "soma": torch.randn(rows, neurons, device="cuda", dtype=torch.bfloat16),
        "x": x,
        "weight": torch.randn(d, neurons, 64, device="cuda", dtype=torch.bfloat16),
        "bias": torch.randn(d, neurons, device="cuda"),
        "to_soma": torch.randn(d, neurons, device="cuda"),
        "to_dendrite": torch.randn(d, d, neurons, device="cuda"),
    }
    for tensor in args.values():
        tensor.requires_grad_()
    grad = torch.randn_like(args["soma"])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, _ = full_dendrites(**args, keep=False)
    out.backward(grad)
    peak = torch.cuda.max_memory_allocated() - before
    stack = d * grad.nbytes
    chunk = 256 * 2**20
    assert stack > 2 * chunk
    # Output, stack, chunk, and the error at x with its chunk.
    assert peak < grad.nbytes + stack + chunk + 3 * x.nbytes + 64 * 2**20


def network(settings: dict[str, str]) -> nn.Module:
    """Return a small network with two dendrites per neuron whose links are not zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    model = pbfx.grow(pbfx.transform(net, pbfx.Config(**settings)), 2).cuda()
    for module in model.modules():
        if isinstance(module, Dendrites):
            nn.init.normal_(module.to_soma, std=0.3)
    return model


def gradients_of(model: nn.Module) -> Tensors:
    grads = {name: p.grad for name, p in model.named_parameters()}
    # Moving a model moves its gradients.
    return {name: grad.clone() for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize(
    "settings",
    [{"learning": "gradient"}, *({"tuning": tuning} for tuning in ("full", "all", "newest"))],
    ids=str,
)
def test_networks_run_the_op(settings: dict[str, str]) -> None:
    model, x = network(settings), torch.randn(32, 8, device="cuda")
    out = model(x)
    assert _within(out.grad_fn, "FullDendrites")
    out.square().sum().backward()
    found = gradients_of(model)
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True)(x).square().sum().backward()
    compiled = gradients_of(model)
    wide = model.cpu().double()
    wide.zero_grad()
    wide(x.cpu().double()).square().sum().backward()
    wanted = gradients_of(wide)
    assert found.keys() == compiled.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name].cpu(), gradient)
        assert_close(compiled[name].cpu(), gradient)


def _within(node: object, name: str) -> bool:
    """Return whether a backward graph holds an op."""
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if name in node.name():
            return True
        waiting += [following for following, _ in node.next_functions]
    return False


def test_gradient_penalty() -> None:
    site = BY_NAME["linear-63-127"]
    found = []
    for evaluate in (full_dendrites, full_reference):
        torch.manual_seed(0)
        args = on_gpu(make_dendrites(site, 2).args(torch.float32))
        form = (site.geometry, False) if evaluate is full_dendrites else (site.geometry, 0)
        out = evaluate(*args.values(), "tanh", *form)[0]
        (grad,) = torch.autograd.grad(out.square().mean(), args["x"], create_graph=True)
        grad.square().sum().backward()
        found.append({name: t.grad for name, t in args.items()})
    for name, wanted in found[1].items():
        assert_close(found[0][name], wanted.double())
