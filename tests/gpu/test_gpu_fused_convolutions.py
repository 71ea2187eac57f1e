"""`pbfx::perforated_conv2d` on a GPU: each route of the fused kernel against the float64 oracle."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import Site, Tensors, make_dendrites, oracle_dendrites
from tolerances import TOLERANCES, assert_close, assert_no_worse_than_eager, relative_error
from torch import Tensor, nn

import pbfx
from pbfx.dendrites import Dendrites
from pbfx_kernels import Geometry, perforated_conv2d, strategy
from pbfx_kernels.dispatch import evaluate_dendrites, recompute_to_soma_gradient
from pbfx_kernels.strategy import Route, Strategy, route_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="the fused kernels run on Hopper",
    ),
]
TF32 = 1e-3
WALKED, POINTWISE, PATCHES = Route.WALKED, Route.POINTWISE, Route.PATCHES


def _site(name: str, x: tuple[int, ...], weight: tuple[int, ...], *form: object) -> Site:
    return Site(name, x, weight, Geometry.convolution(2, *form))


SITES = (
    (WALKED, _site("same", (6, 64, 17, 19), (48, 64, 3, 3), 1, 1)),
    (WALKED, _site("wide", (64, 256, 14, 14), (256, 256, 3, 3), 1, 1)),
    (WALKED, _site("strided", (5, 128, 28, 28), (96, 128, 3, 3), 2, 1)),
    (WALKED, _site("form", (3, 24, 19, 20), (33, 24, 3, 2), 1, (1, 3), (2, 1))),
    (WALKED, _site("steps", (4, 32, 12, 9), (16, 32, 3, 5), (2, 3), (2, 1), (1, 2))),
    (WALKED, _site("groups", (2, 64, 15, 15), (40, 32, 3, 3), 1, 1, 1, 2)),
    (WALKED, _site("downsampled", (3, 64, 28, 28), (130, 64, 1, 1), 2)),
    (WALKED, _site("small", (1, 512, 7, 7), (512, 512, 3, 3), 1, 1)),
    (POINTWISE, _site("pointwise", (3, 72, 15, 17), (136, 72, 1, 1))),
    (PATCHES, _site("image", (3, 3, 65, 64), (64, 3, 7, 7), 2, 3)),
    (PATCHES, _site("digit", (9, 1, 28, 28), (32, 1, 3, 3))),
    (PATCHES, _site("odd", (2, 20, 15, 17), (33, 20, 3, 3), 2, 1)),
)
TYPED = [
    (route, site, last, dtype, d)
    for route, site in SITES
    for last, dtype, d in (
        (True, torch.bfloat16, 3),
        (False, torch.bfloat16, 1),
        (False, torch.float16, 2),
        (True, torch.float32, 3),
        (False, torch.float32, 5),
    )
]


@pytest.fixture(autouse=True)
def _fused_and_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "_MOST_FUSED_MEASURED", 7)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


def _draw(site: Site, d: int, dtype: torch.dtype, last: bool) -> tuple[Tensors, Tensor, Tensor]:
    case = make_dendrites(site, d, bias=d != 2)
    args: Tensors = {
        name: None if t is None else t.detach().cuda() for name, t in case.args(dtype).items()
    }
    if last:
        args["x"] = args["x"].contiguous(memory_format=torch.channels_last)
    generator = torch.Generator("cuda").manual_seed(0)
    fan = args["weight"][0, 0].numel()
    weight = torch.randn(site.weight, device="cuda", generator=generator) / fan**0.5
    bias = torch.randn(site.weight[0], device="cuda", generator=generator)
    return args, weight.to(dtype), bias.to(dtype)


def _op(args: Tensors, weight: Tensor, bias: Tensor | None, site: Site, keep: bool) -> tuple:
    links = [args[name] for name in ("weight", "bias", "to_soma", "to_dendrite")]
    form = site.op_geometry[:4]
    return torch.ops.pbfx.perforated_conv2d.default(
        args["x"], weight, bias, *links, "tanh", *form, keep
    )


@pytest.mark.parametrize(
    ("route", "site", "last", "dtype", "d"),
    TYPED,
    ids=[f"{s.name}-{'NHWC' if last else 'NCHW'}-{t}-{d}" for _, s, last, t, d in TYPED],
)
def test_matches_oracle(route: Route, site: Site, last: bool, dtype: torch.dtype, d: int) -> None:
    args, weight, bias = _draw(site, d, dtype, last)
    assert route_of(args["x"], weight, args["weight"], site.geometry) is route
    bias = None if d == 2 else bias
    out, activations = _op(args, weight, bias, site, True)
    lean, none = _op(args, weight, bias, site, False)
    assert torch.equal(lean, out)
    assert none.shape == (0, *out.shape)
    expected = site.soma(args["x"], weight, bias)
    assert out.stride() == expected.stride()
    upcast: Tensors = {name: None if t is None else t.double() for name, t in args.items()}
    upcast["soma"] = site.soma(
        upcast["x"], weight.double(), None if bias is None else bias.double()
    )
    wanted, wanted_activations = oracle_dendrites(site, upcast, "tanh")
    if dtype is torch.float32:
        assert relative_error(out, wanted) <= TF32
        assert relative_error(activations, torch.stack(wanted_activations)) <= TF32
        return
    assert_close(out, wanted)
    assert_close(activations, torch.stack(wanted_activations))
    eager, _ = oracle_dendrites(site, {**args, "soma": expected}, "tanh")
    assert_no_worse_than_eager(out, eager, wanted)


@pytest.mark.parametrize(
    ("site", "last", "dtype", "d"),
    [typed[1:] for typed in TYPED],
    ids=[f"{s.name}-{'NHWC' if last else 'NCHW'}-{t}-{d}" for _, s, last, t, d in TYPED],
)
def test_dendrites_alone(site: Site, last: bool, dtype: torch.dtype, d: int) -> None:
    """The split strategy is the same kernel, and so is the gradient that computes them again."""
    args, *_ = _draw(site, d, dtype, last)
    if last:
        args["soma"] = args["soma"].contiguous(memory_format=torch.channels_last)
    upcast: Tensors = {name: None if t is None else t.double() for name, t in args.items()}
    upcast["to_soma"].requires_grad_()
    wanted, wanted_activations = oracle_dendrites(site, upcast, "tanh")
    names = ("soma", "x", "weight", "bias", "to_soma", "to_dendrite")
    tensors = [args[name] for name in names]
    out, activations = evaluate_dendrites(*tensors, "tanh", site.geometry, True, Strategy.SPLIT)
    tolerance = TF32 if dtype is torch.float32 else TOLERANCES[dtype]
    assert relative_error(out, wanted) <= tolerance
    assert relative_error(activations, torch.stack(wanted_activations)) <= tolerance
    grad = torch.randn_like(out)
    wanted.backward(grad.double())
    links = [args[name] for name in ("x", "weight", "bias", "to_dendrite")]
    found = recompute_to_soma_gradient(grad, *links, "tanh", site.geometry, Strategy.SPLIT)
    # Rounded activations in a sum that cancels: the scale is that of its terms.
    terms = (grad.double() * torch.stack(wanted_activations)).abs().sum((1, 3, 4))
    assert (found - upcast["to_soma"].grad).norm() <= tolerance * terms.norm()


@pytest.mark.parametrize("last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize(("route", "site"), SITES[::2], ids=lambda v: getattr(v, "name", ""))
def test_gradients(
    route: Route, site: Site, d: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the soma and `pbfx::dendrites`, whether activations are kept or computed again."""
    monkeypatch.setattr(strategy, "_LEAST_FUSED_POSITIONS", 1)
    args, weight, bias = _draw(site, d, torch.bfloat16, last)
    grad = torch.randn_like(site.soma(args["x"], weight, bias))

    def gradients(wide: bool) -> tuple[Tensor, ...]:
        kind = torch.float64 if wide else torch.bfloat16
        leaves = [
            t.to(kind).detach().requires_grad_() for t in (args["x"], weight, bias, args["to_soma"])
        ]
        v, c, u = (
            None if args[name] is None else args[name].to(kind)
            for name in ("weight", "bias", "to_dendrite")
        )
        g = site.geometry
        form = g.stride, g.padding, g.dilation, g.groups
        out = perforated_conv2d(*leaves[:3], v, c, leaves[3], u, "tanh", *form)
        assert wide or "perforated_conv2d" in type(out.grad_fn).__name__ + str(out.grad_fn)
        return torch.autograd.grad(out, leaves, grad.to(kind))

    for found, wanted in zip(gradients(False), gradients(True), strict=True):
        assert relative_error(found, wanted) <= 2e-2


class Net(nn.Module):
    """Convolutions of each route, and no norms: those would stand between soma and dendrites."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 32, 5, 2)
        self.walked = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.pointwise = nn.Conv2d(64, 40, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(F.relu(self.walked(F.relu(self.image(x)))))


@pytest.mark.parametrize("dendrites", [1, 2])
@pytest.mark.parametrize("last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("autocast", [True, False])
def test_compiled(
    autocast: bool, last: bool, dendrites: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soma and dendrites are one op in a compiled graph, and train as they do eagerly."""
    monkeypatch.setattr(strategy, "_LEAST_FUSED_POSITIONS", 1)
    torch.manual_seed(0)
    model = pbfx.grow(pbfx.transform(Net()), dendrites).cuda()
    for module in model.modules():
        if isinstance(module, Dendrites):
            nn.init.normal_(module.to_soma, std=0.1)
    x = torch.randn(8, 3, 67, 67, device="cuda")
    if last:
        model, x = (each.to(memory_format=torch.channels_last) for each in (model, x))
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    compiled = torch.compile(model, backend="pbfx", fullgraph=True, options={"strategy": "fused"})

    def both(call: nn.Module, wide: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        given = x.double() if wide else x
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast and not wide):
            out = call(given)
        out.float().pow(2).mean().backward()
        grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return out.detach().double(), grads

    both(compiled)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        found, grads = both(compiled)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["pbfx::perforated_conv2d"] == 3
    eager, eager_grads = both(model)
    model.double()
    wanted, wanted_grads = both(model, wide=True)
    assert relative_error(found, wanted) <= max(1e-2, 2 * relative_error(eager, wanted))
    assert grads.keys() == wanted_grads.keys()
    for name, exact in wanted_grads.items():
        allowed = max(2e-2, 2 * relative_error(eager_grads[name], exact))
        assert relative_error(grads[name], exact) <= allowed, name
