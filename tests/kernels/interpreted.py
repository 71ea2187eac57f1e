"""The kernels under Triton's interpreter, on the CPU, against the float64 oracle.

pytest collects this file only if it is named, with `TRITON_INTERPRET=1` set. Triton reads the
variable once, when it is first imported, so the suite runs this file in a process of its own:
`test_kernel_interpreter.py`.
"""

import functools

import pytest
import torch
from kernel_cases import (
    BY_NAME,
    DEPTHWISE,
    SITES,
    Site,
    Tensors,
    make_dendrites,
    make_neurons,
    oracle_dendrites,
)
from tolerances import assert_close, relative_error
from torch import Tensor

from pbfx_kernels import (
    ACTIVATIONS,
    Geometry,
    depthwise_backward_op,
    frozen,
    fused_convolution,
    neurons,
    nhwc,
    packed,
    reference,
)
from pbfx_kernels.conv_neuron_op import _empty
from pbfx_kernels.depthwise_configs import Strips
from pbfx_kernels.depthwise_gradient import (
    depthwise_gradients,
    depthwise_input_gradient,
    fused_depthwise_gradient,
)
from pbfx_kernels.depthwise_planes import transposes
from pbfx_kernels.dispatch import evaluate_dendrites, recompute_to_soma_gradient
from pbfx_kernels.fused_depthwise import depthwise_neuron, fused_depthwise
from pbfx_kernels.fused_neuron import fused_neuron, interleave
from pbfx_kernels.layout import stack_like
from pbfx_kernels.shares import added
from pbfx_kernels.strategy import Route, Strategy
from pbfx_kernels.to_soma_gradient import to_soma_gradient

# exp(-z) of a very negative z is infinite, and 0 * inf is NaN, which numpy reports.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)

FULL = [site for site in SITES if not ("empty" in site.name or site.geometry.transposed)]
SPLIT = [site for site in FULL if site.geometry.spatial in (0, 2)]
PAIRS = [
    *((Strategy.PACKED, site) for site in FULL),
    *((Strategy.SPLIT, site) for site in SPLIT),
    *((Strategy.DEPTHWISE, site) for site in DEPTHWISE),
]
pairs = pytest.mark.parametrize(
    ("strategy", "site"), PAIRS, ids=[f"{strategy.value}-{site.name}" for strategy, site in PAIRS]
)
# The interpreter multiplies bfloat16 matrices by their bit patterns; the `gpu` tests cover those.
LOW = [
    (strategy, site, torch.float16 if strategy is Strategy.SPLIT else torch.bfloat16)
    for strategy, site in PAIRS
]
low = pytest.mark.parametrize(
    ("strategy", "site", "dtype"), LOW, ids=[f"{s.value}-{site.name}-{t}" for s, site, t in LOW]
)
_form = functools.partial(Geometry.convolution, 2)
_CONV = _form(padding=1)
ORDER = ("soma", "x", "weight", "bias", "to_soma", "to_dendrite")


def evaluate(
    args: Tensors, site: Site, strategy: Strategy, activation: str = "tanh", keep: bool = True
) -> tuple[Tensor, Tensor]:
    tensors = [None if args[name] is None else args[name].detach() for name in ORDER]
    return evaluate_dendrites(*tensors, activation, site.geometry, keep, strategy)


def recompute(args: Tensors, grad: Tensor, site: Site, strategy: Strategy) -> Tensor:
    names = ("x", "weight", "bias", "to_dendrite")
    tensors = [None if args[name] is None else args[name].detach() for name in names]
    return recompute_to_soma_gradient(grad, *tensors, "tanh", site.geometry, strategy)


@pytest.mark.parametrize("d", [1, 3])
@pairs
def test_matches_oracle(strategy: Strategy, site: Site, d: int) -> None:
    case = make_dendrites(site, d, bias=d != 1)
    args, expected = case.args(torch.float32), case.args()
    out, activations = evaluate(args, site, strategy)
    ref, ref_activations = oracle_dendrites(site, expected, "tanh")
    assert_close(out, ref)
    assert_close(activations, torch.stack(ref_activations))
    assert torch.equal(evaluate(args, site, strategy, keep=False)[0], out)

    grad = torch.randn_like(ref)
    ref.backward(grad)
    wanted = expected["to_soma"].grad
    given = to_soma_gradient(grad.float(), activations, site.geometry.channel_axis)
    assert_close(given, wanted, torch.float32)
    assert_close(recompute(args, grad.float(), site, strategy), wanted, torch.float32)


@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 1, 1), (63, 3, 10), (1500, 2, 7)], ids=str)
def test_shares_are_added(shape: tuple[int, int, int]) -> None:
    """One, fewer than a program loads at a time, and more; columns that fill no program."""
    partial = torch.randn(shape)
    total = added(partial)
    assert_close(total, partial.double().sum(0), torch.float32)
    assert torch.equal(added(partial), total)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("strategy", [Strategy.PACKED, Strategy.SPLIT], ids=lambda s: s.value)
def test_every_activation(strategy: Strategy, activation: str) -> None:
    site = BY_NAME["linear-63-127"]
    case = make_dendrites(site, 2)
    out, _ = evaluate(case.args(torch.float32), site, strategy, activation)
    assert_close(out, oracle_dendrites(site, case.args(), activation)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_close_everywhere(activation: str) -> None:
    """Element by element: a norm over all would hide the small ones."""
    site = Site("pass-through", (401, 1), (1, 1))
    z = torch.cat([torch.linspace(-30, 30, 301), torch.logspace(-6, 0, 100)])[:, None]
    z = torch.cat([z, torch.tensor([[torch.inf], [-torch.inf], [torch.nan]])])
    args = {
        "soma": torch.zeros_like(z),
        "x": z,
        "weight": torch.ones(1, 1, 1),
        "bias": None,
        "to_soma": torch.ones(1, 1),
        "to_dendrite": torch.zeros(1, 1, 1),
    }
    _, activations = evaluate(args, site, Strategy.PACKED, activation)
    wanted = reference.activate(activation, z.double())
    # 1 + erf(z) cancels for a negative z, in torch's float32 too.
    smallest = 1e-6 if activation == "gelu" else 1e-30
    torch.testing.assert_close(
        activations[0].double(), wanted, rtol=2e-6, atol=smallest, equal_nan=True
    )


@low
def test_low_precision(strategy: Strategy, site: Site, dtype: torch.dtype) -> None:
    args = make_dendrites(site, 2).args(dtype)
    upcast: Tensors = {name: t.detach().double() for name, t in args.items()}
    out, activations = evaluate(args, site, strategy)
    assert out.dtype == activations.dtype == dtype
    assert_close(out, oracle_dendrites(site, upcast, "tanh")[0])


@low
def test_untrained_dendrites_leave_every_bit(
    strategy: Strategy, site: Site, dtype: torch.dtype
) -> None:
    args = make_dendrites(site, 3).args(dtype)
    soma = args["soma"].detach().clone()
    special = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf], dtype=dtype)
    flat = soma.view(-1)
    flat[: len(special)] = special[: len(flat)]
    for sign in (1, -1):
        args |= {"soma": soma, "to_soma": sign * torch.zeros_like(args["to_soma"])}
        out, _ = evaluate(args, site, strategy)
        assert torch.equal(out.view(torch.uint8), soma.view(torch.uint8))


@pytest.mark.parametrize("strategy", [Strategy.PACKED, Strategy.SPLIT], ids=lambda s: s.value)
def test_reads_strictly_lower_triangle(strategy: Strategy) -> None:
    site = BY_NAME["conv2d-form"]
    args = make_dendrites(site, 3).args(torch.float32)
    out, _ = evaluate(args, site, strategy)
    upper = torch.ones(3, 3, dtype=torch.bool).triu()
    args["to_dendrite"] = args["to_dendrite"].detach().clone()
    args["to_dendrite"][upper] = torch.nan
    assert torch.equal(evaluate(args, site, strategy)[0], out)


@pairs
def test_strided_inputs(strategy: Strategy, site: Site) -> None:
    args = make_dendrites(site, 2).args(torch.float32)
    out, activations = evaluate(args, site, strategy)
    strided: Tensors = {name: _strided(t.detach()) for name, t in args.items()}
    out_strided, activations_strided = evaluate(strided, site, strategy)
    assert relative_error(out_strided, out) < 1e-6
    assert relative_error(activations_strided, activations) < 1e-6
    grad = torch.randn_like(out)
    axis = site.geometry.channel_axis
    wanted = to_soma_gradient(grad, activations, axis)
    assert (
        relative_error(to_soma_gradient(_strided(grad), _strided(activations), axis), wanted) < 1e-6
    )
    assert relative_error(recompute(strided, _strided(grad), site, strategy), wanted) < 1e-5


@pytest.mark.parametrize(
    ("strategy", "site"),
    [pair for pair in PAIRS if pair[1].name.startswith("conv2d") and len(pair[1].x) == 4]
    + [(Strategy.DEPTHWISE, site) for site in DEPTHWISE if len(site.x) == 4],
    ids=lambda value: getattr(value, "name", None),
)
def test_channels_last(strategy: Strategy, site: Site) -> None:
    args = make_dendrites(site, 2).args(torch.float32)
    out, _ = evaluate(args, site, strategy)
    last = {name: t.detach() for name, t in args.items()}
    for name in ("soma", "x"):
        last[name] = last[name].to(memory_format=torch.channels_last)
    out_last, activations = evaluate(last, site, strategy)
    assert out_last.is_contiguous(memory_format=torch.channels_last)
    assert activations[1].is_contiguous(memory_format=torch.channels_last)
    assert relative_error(out_last, out) < 1e-6


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("conv2d", "linear-63-127"):
        site = BY_NAME[name]
        args = make_dendrites(site, 2).args(torch.float32)
        out, activations = evaluate(args, site, Strategy.PACKED)
        grad = torch.randn_like(out)
        whole = recompute(args, grad, site, Strategy.PACKED)
        with monkeypatch.context() as patch:
            patch.setattr(packed, "CHUNK_BYTES", 64)
            assert len(packed.chunks(out, 2, site.geometry)) == len(out)
            parts, kept = evaluate(args, site, Strategy.PACKED)
            assert relative_error(recompute(args, grad, site, Strategy.PACKED), whole) < 1e-6
        assert relative_error(parts, out) < 1e-6
        assert relative_error(kept, activations) < 1e-6


def test_padding_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 16-bit products are padded to 16 bytes, and 16-bit convolutions run in NHWC."""
    monkeypatch.setattr(packed, "_WORTH_COPYING", 1)
    for site in (BY_NAME["linear-63-127"], Site("wide", (2, 8, 5, 5), (5, 8, 3, 3), _CONV)):
        args = make_dendrites(site, 3).args(torch.float16)
        x, weight = args["x"].detach(), args["weight"].detach()
        prepared, stacked = packed.prepared(x, weight, site.geometry)
        assert not prepared.is_contiguous() or prepared.shape[-1] % 8 == stacked.shape[0] % 8 == 0
        upcast: Tensors = {name: t.detach().double().requires_grad_() for name, t in args.items()}
        out, activations = evaluate(args, site, Strategy.PACKED)
        ref, ref_activations = oracle_dendrites(site, upcast, "tanh")
        assert out.is_contiguous()
        assert_close(out, ref.detach())
        assert_close(activations, torch.stack(ref_activations))
        grad = torch.randn_like(out)
        ref.backward(grad.double())
        again = recompute(args, grad, site, Strategy.PACKED)
        assert_close(again, upcast["to_soma"].grad, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("form", [(64, 64, 64), (130, 37, 48), (3, 10, 128), (257, 66, 40)])
def test_fused_neuron(form: tuple[int, int, int], d: int, dtype: torch.dtype) -> None:
    positions, neurons, inputs = form
    site = Site("fused", (positions, inputs), (neurons, inputs))
    args = make_dendrites(site, d, bias=d != 2).args(dtype)
    given: Tensors = {name: None if t is None else t.detach() for name, t in args.items()}
    generator = torch.Generator().manual_seed(0)
    soma = torch.randn(neurons, inputs, generator=generator).to(dtype) / inputs**0.5
    soma_bias = torch.randn(neurons, generator=generator).to(dtype) if d != 2 else None
    out = torch.full((positions, neurons), torch.nan, dtype=dtype)
    kept = torch.full((d, positions, neurons), torch.nan, dtype=dtype)
    links = given["bias"], given["to_soma"], given["to_dendrite"], "tanh"
    fused_neuron(given["x"], interleave(soma, given["weight"]), soma_bias, *links, out, kept)
    upcast = {name: None if t is None else t.double() for name, t in given.items()}
    upcast["soma"] = torch.nn.functional.linear(
        upcast["x"], soma.double(), None if soma_bias is None else soma_bias.double()
    )
    wanted, wanted_activations = oracle_dendrites(site, upcast, "tanh")
    assert_close(out, wanted)
    assert_close(kept, torch.stack(wanted_activations))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("site", DEPTHWISE, ids=lambda site: site.name)
def test_depthwise_neuron(site: Site, last: bool) -> None:
    """The soma too, from the same read of the input; activations of all shapes and layouts."""
    for d, bias in ((1, True), (3, False)):
        case = make_dendrites(site, d, bias=bias)
        args: Tensors = {n: None if t is None else t.detach() for n, t in case.args().items()}
        weight, offset = torch.randn_like(args["weight"][0]), torch.randn(site.neurons).double()
        wanted = dict(args, soma=site.soma(args["x"], weight, offset if bias else None))
        ref, ref_activations = oracle_dendrites(site, wanted, "tanh")
        low: Tensors = {n: None if t is None else t.float() for n, t in args.items()}
        axis = len(site.x) + site.geometry.channel_axis
        x = low["x"].movedim(axis, -1).contiguous().movedim(-1, axis) if last else low["x"]
        out = torch.full(ref.shape, torch.nan)
        kept = torch.full((d, *ref.shape), torch.nan)
        links = low["bias"], low["to_soma"], low["to_dendrite"], "tanh", site.geometry
        own = weight.float(), offset.float() if bias else None, low["weight"]
        depthwise_neuron(x, *own, *links, out, kept)
        assert_close(out, ref)
        assert_close(kept, torch.stack(ref_activations))


PATCHED = (
    Site("patches", (2, 5, 7, 8), (5, 1, 3, 3), _form(padding=1, groups=5)),
    Site("patches-stride", (2, 3, 8, 16), (3, 1, 3, 3), _form(2, 1, groups=3)),
    Site("patches-form", (1, 3, 8, 8), (3, 1, 3, 2), _form(1, (2, 3), (1, 2), groups=3)),
    Site("patches-odd", (2, 3, 6, 7), (3, 1, 3, 3), _form((2, 1), (1, 1), groups=3)),
)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("site", PATCHED, ids=lambda site: site.name)
def test_strips_do_not_show(site: Site, last: bool) -> None:
    """Outputs, activations and all gradients, whatever a thread computes of them."""
    case = make_dendrites(site, 2).args(torch.float32)
    given = {name: t.detach() for name, t in case.items()}
    weight, grad = torch.randn(site.weight), torch.randn_like(given["soma"])
    if last:
        for name in ("soma", "x"):
            given[name] = given[name].contiguous(memory_format=torch.channels_last)
        grad = grad.contiguous(memory_format=torch.channels_last)
    wide = {name: t.double() for name, t in given.items()}
    wanted, wanted_activations = oracle_dendrites(site, wide, "tanh")
    wanted_links = (grad.double() * torch.stack(wanted_activations)).sum((1, 3, 4))
    soma = [t.double().requires_grad_() for t in (given["x"], weight, torch.zeros(site.neurons))]
    site.soma(*soma).backward(grad.double())
    wanted_x, wanted_weight, wanted_bias = (t.grad for t in soma)
    geometry = site.geometry
    dendrites = [given[name] for name in ("weight", "bias", "to_dendrite")]
    width, from_width = wanted.shape[-1], given["x"].shape[-1]
    for columns in (2, 4, 8, 7):
        strips = Strips(4 if columns == 2 else 2, 8, 4 if last else 1, 3, columns)
        if width % columns == 0:
            out, kept = torch.full_like(wanted, torch.nan), stack_like(given["soma"], 2)
            out, kept = out.float(), kept.fill_(torch.nan)
            links = [given[name] for name in ORDER]
            fused_depthwise(*links, "tanh", geometry, out, kept, strips)
            assert_close(out, wanted)
            assert_close(kept, torch.stack(wanted_activations))
            args = grad, given["x"], *dendrites, "tanh", geometry, strips
            assert_close(fused_depthwise_gradient(*args), wanted_links)
            found = depthwise_gradients(*args)
            for sums, right in zip(found, (wanted_links, wanted_weight, wanted_bias), strict=True):
                assert_close(sums, right)
        stepped = transposes(geometry, site.x, site.weight[2:]) and from_width % columns == 0
        if stepped and columns % geometry.stride[1] == 0:
            grad_x = torch.full_like(given["x"], torch.nan)
            depthwise_input_gradient(grad, weight, geometry, grad_x, strips)
            assert_close(grad_x, wanted_x)


@pytest.mark.parametrize("site", DEPTHWISE, ids=lambda site: site.name)
def test_depthwise_backward(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's choice of kernels, against torch's own ops."""
    case = make_dendrites(site, 2).args(torch.float32)
    given = {name: t.detach() for name, t in case.items()}
    weight, grad = torch.randn(site.weight), torch.randn_like(given["soma"])
    g = site.geometry
    args = grad, given["x"], weight, given["weight"], given["bias"], given["to_dendrite"], "tanh"
    op = torch.ops.pbfx.perforated_depthwise_backward.default
    form = g.stride, g.padding, g.dilation, True, True, True
    wanted = op(*(t.double() if isinstance(t, Tensor) else t for t in args), *form)
    monkeypatch.setattr(depthwise_backward_op, "choose", lambda _: Strategy.DEPTHWISE)
    for found, right in zip(op(*args, *form), wanted, strict=True):
        assert_close(found, right)


@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (1, 70, 9, 9), (3, 32, 8, 16)], ids=str)
def test_images_are_transposed(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    out = nhwc.transposed(x)
    assert torch.equal(out, x)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_strips_of_long_kernels_do_not_show() -> None:
    site = DEPTHWISE[1]
    args = make_dendrites(site, 2).args(torch.float32)
    tensors = [args[name].detach() for name in ORDER]
    wanted, _ = evaluate(args, site, Strategy.DEPTHWISE)
    for strips in (Strips(1, 16, 4, 0), Strips(4, 4, 8, 0), Strips(8, 2, 16)):
        out = torch.full_like(wanted, torch.nan)
        fused_depthwise(*tensors, "tanh", site.geometry, out, None, strips)
        assert relative_error(out, wanted) < 1e-6


WALKED, POINTWISE, PATCHES = Route.WALKED, Route.POINTWISE, Route.PATCHES
CONVOLUTIONS = (
    (WALKED, Site("same", (2, 16, 7, 6), (20, 16, 3, 3), _CONV)),
    (WALKED, Site("strided", (2, 32, 8, 6), (18, 32, 3, 3), _form(stride=2, padding=1))),
    (WALKED, Site("form", (3, 24, 9, 10), (33, 24, 3, 2), _form(1, (1, 3), (2, 1)))),
    (WALKED, Site("steps", (1, 16, 12, 9), (16, 16, 3, 5), _form((2, 3), (2, 1), (1, 2)))),
    (WALKED, Site("groups", (2, 64, 5, 5), (40, 32, 3, 3), _form(padding=1, groups=2))),
    (WALKED, Site("downsampled", (2, 32, 6, 6), (24, 32, 1, 1), _form(2))),
    (POINTWISE, Site("pointwise", (2, 24, 5, 7), (40, 24, 1, 1), _form())),
    (PATCHES, Site("image", (2, 3, 11, 9), (20, 3, 5, 3), _form(2, (2, 1)))),
    (PATCHES, Site("digit", (3, 1, 8, 8), (32, 1, 3, 3), _form(dilation=(1, 2)))),
    (PATCHES, Site("odd", (2, 20, 5, 7), (9, 20, 3, 3), _form(2, 1))),
)


@pytest.mark.parametrize(
    ("d", "dtype"),
    [(1, torch.float32), (2, torch.float16), (3, torch.float32), (5, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("route", "site"), CONVOLUTIONS, ids=lambda v: getattr(v, "name", None))
def test_fused_convolution(
    route: Route, site: Site, channels_last: bool, d: int, dtype: torch.dtype
) -> None:
    args = make_dendrites(site, d, bias=d != 2).args(dtype)
    given: Tensors = {name: None if t is None else t.detach() for name, t in args.items()}
    generator = torch.Generator().manual_seed(0)
    soma = torch.randn(site.weight, generator=generator).to(dtype) / given["weight"][0, 0].numel()
    soma_bias = torch.randn(site.weight[0], generator=generator).to(dtype) if d != 2 else None
    if channels_last:
        given["x"] = given["x"].contiguous(memory_format=torch.channels_last)
    out = _empty(given["x"], soma, site.geometry).fill_(torch.nan)
    assert (out.stride(1) == 1) is (channels_last and given["x"].stride(1) == 1)
    kept = stack_like(out, d).fill_(torch.nan)
    lean = torch.full_like(out, torch.nan)
    _convolve(route, given, soma, soma_bias, site, out, kept)
    _convolve(route, given, soma, soma_bias, site, lean, None)
    assert torch.equal(lean, out)
    upcast = {name: None if t is None else t.double() for name, t in given.items()}
    upcast["soma"] = site.soma(
        upcast["x"], soma.double(), None if soma_bias is None else soma_bias.double()
    )
    wanted, wanted_activations = oracle_dendrites(site, upcast, "tanh")
    assert_close(out, wanted)
    assert_close(kept, torch.stack(wanted_activations))


@pytest.mark.parametrize(("d", "dtype"), [(1, torch.float16), (3, torch.float32)], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("route", "site"), CONVOLUTIONS, ids=lambda v: getattr(v, "name", None))
def test_split_convolution(
    route: Route, site: Site, channels_last: bool, d: int, dtype: torch.dtype
) -> None:
    """The same kernel, where the soma is computed elsewhere, and as a sum in the backward."""
    args = make_dendrites(site, d, bias=d != 2).args(dtype)
    given: Tensors = {name: None if t is None else t.detach() for name, t in args.items()}
    if channels_last:
        for name in ("x", "soma"):
            given[name] = given[name].contiguous(memory_format=torch.channels_last)
    upcast = {name: None if t is None else t.double() for name, t in given.items()}
    upcast["to_soma"].requires_grad_()
    wanted, wanted_activations = oracle_dendrites(site, upcast, "tanh")
    out = torch.full_like(given["soma"], torch.nan)
    kept = stack_like(out, d).fill_(torch.nan)
    _convolve(route, given, None, given["soma"], site, out, kept)
    assert_close(out, wanted)
    assert_close(kept, torch.stack(wanted_activations))
    grad = torch.randn_like(out)
    wanted.backward(grad.double())
    weights = fused_convolution.laid_out(route, None, given["weight"])
    links = given["bias"], given["to_dendrite"], "tanh", site.geometry
    call = fused_convolution.fused_convolution_gradient
    found = call(route, grad, given["x"], weights, site.weight[2:], *links)
    assert_close(found, upcast["to_soma"].grad, dtype)


def _convolve(
    route: Route,
    given: Tensors,
    weight: Tensor | None,
    soma: Tensor | None,
    site: Site,
    out: Tensor,
    kept: Tensor | None,
) -> None:
    weights = fused_convolution.laid_out(route, weight, given["weight"])
    links = soma, given["bias"], given["to_soma"], given["to_dendrite"], "tanh"
    call = fused_convolution.fused_convolution
    call(route, given["x"], weights, site.weight[2:], *links, site.geometry, out, kept)


@pytest.mark.parametrize("channels_last", [True, False])
def test_patches_in_chunks(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site("image", (5, 3, 9, 9), (20, 3, 3, 3), _CONV)
    args = make_dendrites(site, 2).args(torch.float32)
    given = {name: t.detach() for name, t in args.items()}
    if channels_last:
        given["x"] = given["x"].contiguous(memory_format=torch.channels_last)
    weight = torch.randn(site.weight)
    found = []
    for size in (2**20, 2 * 81 * 32 * 4):
        monkeypatch.setattr(fused_convolution, "PATCHES_BYTES", size)
        out = _empty(given["x"], weight, site.geometry).fill_(torch.nan)
        kept = stack_like(out, 2).fill_(torch.nan)
        _convolve(PATCHES, given, weight, None, site, out, kept)
        found.append((out, kept))
    for whole, parts in zip(*found, strict=True):
        assert relative_error(parts, whole) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_frozen_neurons(d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is laid out in plain torch for good is what the kernel lays out at every call."""
    site = Site("frozen", (3, 5, 48), (37, 48))
    case = make_neurons(site, d, d != 2, dtype)
    x, packed, *links = case.together
    stacked = packed.unflatten(0, (1 + d, -1))
    rows = frozen.lay(stacked)
    assert torch.equal(rows, interleave(stacked[0], stacked[1:]))
    plain = frozen.frozen_neurons(x, rows, *links, "tanh")
    monkeypatch.setattr(frozen, "_on_gpu", lambda x: True)
    monkeypatch.setattr(frozen, "fuses_frozen", lambda problem: True)
    monkeypatch.setattr(frozen, "_plain", None)
    # Rows that start anywhere have to be copied for the descriptors.
    for given in (x, torch.cat([x[..., :1], x], -1)[..., 1:]):
        out = frozen.frozen_neurons(given, rows, *links, "tanh")
        assert out.dtype == dtype
        assert_close(out, case.expected)
        assert_close(out, plain.double(), dtype)


def test_many_dendrites() -> None:
    site = BY_NAME["linear"]
    case = make_dendrites(site, 8)
    out, activations = evaluate(case.args(torch.float32), site, Strategy.PACKED)
    ref, _ = oracle_dendrites(site, case.args(), "tanh")
    assert_close(out, ref)
    grad = torch.randn_like(out)
    wanted = reference.dendrites_backward(grad, activations, -1)
    assert_close(to_soma_gradient(grad, activations, -1), wanted)


def _strided(tensor: Tensor) -> Tensor:
    """Copy into every second element of a larger buffer, axes reversed."""
    buffer = tensor.new_full((*reversed(tensor.shape), 2), torch.nan)[..., 0]
    view = buffer.permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("site", FULL, ids=lambda site: site.name)
def test_packed_neurons(site: Site, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, which only its device decides."""
    monkeypatch.setattr(neurons, "_runs_kernel", lambda *_: True)
    case, form = make_neurons(site, 3, bias, torch.float32), site.geometry
    assert_close(neurons.neurons(*case.together, "tanh", form), case.expected)
    soma = case.soma.float()
    before = soma.clone()
    assert_close(neurons.joined(soma, *case.apart, "tanh", form), case.expected)
    assert torch.equal(soma, before)
