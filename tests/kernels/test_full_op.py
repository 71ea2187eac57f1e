"""`pbfx::full_dendrites`: gradients, graphs, double backward, what it costs and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from full_cases import NAMES, oracle_full, oracle_gradients, small_sites
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BY_NAME, F64, Site, Tensors, make_dendrites, sites
from tolerances import assert_close, assert_no_worse_than_eager
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pbfx_kernels.flops
from pbfx_kernels import ACTIVATIONS, ArgumentError, full_autograd, full_dendrites, reference
from pbfx_kernels.full_autograd import full_reference

OP = torch.ops.pbfx.full_dendrites.default
BACKWARD = torch.ops.pbfx.full_dendrites_backward.default
FORMS = [
    BY_NAME[name]
    for name in (
        "linear",
        "linear-unbatched",
        "conv1d",
        "conv2d-form",
        "conv2d-unbatched",
        "transposed2d-form",
        "linear-empty",
    )
]
forms = pytest.mark.parametrize("site", FORMS, ids=lambda site: site.name)


ways = pytest.mark.parametrize("eager", [False, True], ids=["op", "eager"])


def call(
    site: Site,
    args: Tensors,
    activation: str = "tanh",
    frozen: int = 0,
    keep: bool = False,
    eager: bool = False,
) -> tuple[Tensor, Tensor]:
    """Evaluate a site by the op of graphs, or as eager code does on a GPU."""
    tensors: list[Any] = [args[name] for name in NAMES]
    if eager:
        return full_autograd.apply(*tensors, activation, site.geometry, frozen, keep)[:2]
    return OP(*tensors, activation, *site.op_geometry, frozen, keep)[:2]


def gradients(out: Tensor, args: Tensors, grad: Tensor) -> Tensors:
    learning = {n: t for n, t in args.items() if t is not None and t.requires_grad}
    found = torch.autograd.grad(out, learning.values(), grad)
    return dict(zip(learning, found, strict=True))


@pytest.mark.parametrize(("d", "frozen"), [(0, 0), (1, 0), (3, 0), (3, 2), (2, 2)])
@ways
@sites
def test_matches_oracle(site: Site, eager: bool, d: int, frozen: int) -> None:
    activation = ACTIVATIONS[len(site.name) % len(ACTIVATIONS)]
    args = make_dendrites(site, d, bias=d != 1).args()
    out, activations = call(site, args, activation, frozen, True, eager)
    assert_close(out, oracle_full(site, args, activation))
    links = args["to_soma"], args["to_dendrite"], activation, site.geometry
    rest = args["soma"], args["x"], args["weight"], args["bias"], *links
    assert_close(activations, reference.dendrites(*rest)[1])
    grad = torch.randn_like(out)
    found = gradients(out, args, grad)
    assert torch.equal(found.pop("soma"), grad)
    for name, wanted in oracle_gradients(site, args, grad, activation, frozen).items():
        if name != "soma":
            assert_close(found[name], wanted)


@settings(max_examples=60, deadline=None)
@given(
    site=st.booleans().flatmap(small_sites),
    d=st.integers(1, 4),
    frozen=st.integers(0, 4),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    learns=st.sets(st.sampled_from(NAMES[1:]), min_size=1),
    eager=st.booleans(),
    seed=st.integers(0, 99),
)
def test_drawn_sites(
    site: Site,
    d: int,
    frozen: int,
    bias: bool,
    activation: str,
    learns: set[str],
    eager: bool,
    seed: int,
) -> None:
    """Whatever learns gets its gradient, and nothing else does."""
    torch.manual_seed(seed)
    args = make_dendrites(site, d, activation, bias).args()
    for name, t in args.items():
        if t is not None:
            t.requires_grad_(name == "soma" or name in learns)
    frozen = min(frozen, d)
    out = call(site, args, activation, frozen, eager=eager)[0]
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted = oracle_gradients(site, args, grad, activation, frozen)
    for name, t in args.items():
        if name in wanted:
            assert_close(t.grad, wanted[name])
        elif t is not None:
            assert t.grad is None, name


def test_frozen_dendrites_get_zeros() -> None:
    for wants_x in (True, False):
        args = make_dendrites(BY_NAME["conv2d"], 3).args(torch.float32)
        args["x"].requires_grad_(wants_x)
        call(BY_NAME["conv2d"], args, frozen=2)[0].square().sum().backward()
        for name in ("weight", "bias", "to_dendrite"):
            assert torch.equal(args[name].grad[:2], torch.zeros_like(args[name][:2])), name
            assert args[name].grad[2].any(), name
        assert args["to_soma"].grad.any(1).all()
        assert (args["x"].grad is not None) is wants_x


@ways
def test_saves_the_stack_once(eager: bool) -> None:
    """D times the output, and what is there anyway."""
    args = make_dendrites(BY_NAME["linear-63-127"], 3).args(torch.float32)
    there = {t.data_ptr() for t in args.values()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call(BY_NAME["linear-63-127"], args, eager=eager)[0]
    new = [t for pointer, t in saved.items() if pointer not in there]
    assert [t.numel() for t in new] == [3 * out.numel()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "site", [BY_NAME["linear-63-127"], Site("sequence", (2, 31, 63), (127, 63))], ids=str
)
def test_low_precision(site: Site, dtype: torch.dtype) -> None:
    """Of enough sums that the norm says how far they are off.

    Those of "linear-sequence" are nine numbers, which may all but cancel: in 200 draws its `dc` was
    off by 1.5e-2 at worst in bfloat16, and plain torch's by 3.4e-2. Here the worst is 5e-3.
    """
    case = make_dendrites(site, 3)
    args, eager = case.args(dtype), case.args(dtype)
    out, plain = call(site, args)[0], oracle_full(site, eager, "tanh")
    assert_close(out, oracle_full(site, _upcast(args), "tanh"))
    grad = torch.randn_like(out)
    found, loop = gradients(out, args, grad), gradients(plain, eager, grad)
    for name, wanted in oracle_gradients(site, args, grad, "tanh").items():
        assert found[name].dtype == dtype
        if name != "soma":
            assert_close(found[name], wanted)
            assert_no_worse_than_eager(found[name], loop[name], wanted)


@ways
def test_autocast_is_decided_at_the_soma(eager: bool) -> None:
    args = make_dendrites(BY_NAME["linear-63-127"], 2).args(torch.float32)
    args["soma"] = args["soma"].detach().bfloat16().requires_grad_()
    expected = call(BY_NAME["linear-63-127"], args, eager=eager)[0]
    with torch.autocast("cpu", torch.float16):
        out, activations = call(BY_NAME["linear-63-127"], args, keep=True, eager=eager)
    assert out.dtype == activations.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    with torch.autocast("cpu", torch.float16):
        found = gradients(out, args, torch.ones_like(out))
    assert {name for name, t in found.items() if t.dtype != torch.float32} == {"soma"}


@ways
@pytest.mark.parametrize("name", ["linear", "conv2d-form", "transposed2d"])
def test_double_backward(name: str, eager: bool) -> None:
    """By finite differences of the gradients."""
    site = BY_NAME[name]
    args = make_dendrites(site, 2).args()
    names = [name for name in NAMES if args[name] is not None]

    def run(*tensors: Tensor) -> Tensor:
        return call(site, dict(zip(names, tensors, strict=True)), eager=eager)[0]

    small = [args[name].detach()[:1] if name in ("soma", "x") else args[name] for name in names]
    inputs = [t.detach().requires_grad_() for t in small]
    torch.autograd.gradgradcheck(run, inputs, nondet_tol=1e-12)


def test_gradient_penalty_is_that_of_the_reference() -> None:
    site, found = BY_NAME["conv2d-form"], []
    for evaluate in (
        lambda args: call(site, args, frozen=1)[0],
        lambda args: call(site, args, frozen=1, eager=True)[0],
        lambda args: full_reference(*args.values(), "tanh", site.geometry, 1)[0],
    ):
        torch.manual_seed(0)
        args = make_dendrites(site, 3).args()
        (grad,) = torch.autograd.grad(evaluate(args).square().sum(), args["x"], create_graph=True)
        grad.square().sum().backward()
        found.append({name: t.grad for name, t in args.items()})
    for name, wanted in found.pop().items():
        for gradients in found:
            assert_close(gradients[name], wanted)


@pytest.mark.parametrize(("d", "frozen", "keep"), [(0, 0, True), (1, 0, False), (3, 1, True)])
@forms
def test_opcheck(site: Site, d: int, frozen: int, keep: bool) -> None:
    args = make_dendrites(site, d, bias=d != 1).args(torch.float32)
    form = ("silu", *site.op_geometry, frozen)
    torch.library.opcheck(OP, (*args.values(), *form, keep))
    plain = {name: None if t is None else t.detach() for name, t in args.items()}
    out, _, z = OP(*plain.values(), *form, keep)
    tensors = (torch.randn_like(out), z, *(plain[name] for name in NAMES[1:]))
    for wants in ((True, True, True), (False, True, True), (True, False, False)):
        torch.library.opcheck(BACKWARD, (*tensors, *form, *wants))


def test_opcheck_channels_last() -> None:
    site = BY_NAME["conv2d"]
    args = make_dendrites(site, 2).args(torch.float32)
    args["soma"] = args["soma"].detach().to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(OP, (*args.values(), "tanh", *site.op_geometry, 0, False))
    out, _, z = OP(*args.values(), "tanh", *site.op_geometry, 0, False)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert z.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    site = BY_NAME["conv2d-form"]

    def run(*tensors: Tensor) -> Tensor:
        return torch.relu(OP(*tensors, "tanh", *site.op_geometry, 0, False)[0])

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for batch in (2, 3, 5):
        shaped = Site("batch", (batch, *site.x[1:]), site.weight, site.geometry)
        args = make_dendrites(shaped, 2).args(torch.float32)
        out, expected = compiled(*args.values()), run(*args.values())
        assert_close(out, expected.detach())
        grad = torch.randn_like(out)
        found, wanted = gradients(out, args, grad), gradients(expected, args, grad)
        for name, gradient in wanted.items():
            assert_close(found[name], gradient)


def test_the_function_is_the_reference_where_there_is_no_gpu() -> None:
    site = BY_NAME["conv2d-form"]
    args = make_dendrites(site, 3).args()
    out, activations = full_dendrites(**args, geometry=site.geometry, frozen=2)
    expected = full_reference(*args.values(), "tanh", site.geometry, 2)
    assert torch.equal(out, expected[0])
    assert torch.equal(activations, expected[1])
    compiled = torch.compile(full_dendrites, backend="aot_eager", fullgraph=True)
    assert_close(compiled(**args, geometry=site.geometry, frozen=2)[0], out.detach())


def test_flops() -> None:
    site, d = BY_NAME["conv2d-form"], 3
    product = pbfx_kernels.flops.stacked_flops(
        site.geometry.output_shape(site.x, site.weight), site.x, (d, *site.weight)
    )
    args = make_dendrites(site, d).args(torch.float32)
    with FlopCounterMode(display=False) as forward:
        out = call(site, args)[0]
    assert forward.get_total_flops() == product
    with FlopCounterMode(display=False) as both:
        out.sum().backward()
    assert both.get_total_flops() == 2 * product
    args["x"].requires_grad_(False)
    out = call(site, args, frozen=2)[0]
    with FlopCounterMode(display=False) as newest:
        out.sum().backward()
    assert newest.get_total_flops() == product // d


@ways
def test_says_what_does_not_fit(eager: bool) -> None:
    args = make_dendrites(BY_NAME["linear"], 2).args(torch.float32)
    with pytest.raises(ArgumentError, match="frozen: expected 0 to D = 2 dendrites, got 3"):
        call(BY_NAME["linear"], args, frozen=3, eager=eager)
    args["to_soma"] = torch.zeros(2, 5)
    with pytest.raises(ArgumentError, match="to_soma: expected shape"):
        call(BY_NAME["linear"], args, eager=eager)


def _upcast(tensors: Tensors) -> Tensors:
    return {name: None if t is None else t.detach().to(F64) for name, t in tensors.items()}
