"""`pbfx::candidates`: gradients and moments against the oracle, and what passes through."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import (
    ACTIVATION_MODULES,
    BY_NAME,
    F64,
    Site,
    Tensors,
    make_candidates,
    oracle_candidates,
    sites,
)
from tolerances import assert_close
from torch import Tensor
from torch.nn import functional as F

from pbfx_kernels import ACTIVATIONS, LINEAR, Moment, candidates, reference

Call = Callable[..., tuple[Tensor, Tensor]]


def as_op(
    activation: str = "tanh", geometry: Any = LINEAR, **tensors: Any
) -> tuple[Tensor, Tensor]:
    """Call what a graph holds; the function takes another way where nobody records ops."""
    g = geometry
    form = g.stride, g.padding, g.dilation, g.groups, g.transposed, g.output_padding
    tensors.setdefault("regression", None)
    return torch.ops.pbfx.candidates.default(*tensors.values(), activation, *form)


ways = pytest.mark.parametrize("call", [candidates, as_op], ids=["eager", "op"])


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize(
    ("c", "d", "regression"),
    [(1, 0, False), (3, 0, False), (1, 3, False), (3, 1, False), (3, 1, True)],
)
@ways
@sites
def test_matches_oracle(
    site: Site, call: Call, c: int, d: int, regression: bool, dtype: torch.dtype
) -> None:
    case = make_candidates(site, c, d, regression=regression)
    args = case.args(dtype)
    out, z = call(**args, activation="tanh", geometry=site.geometry)
    out.backward(case.grad.to(dtype))
    gradients, moments = oracle_candidates(site, case.tensors, case.grad, "tanh")
    assert z.shape == (c, *out.shape)
    assert z.dtype == dtype
    for name, expected in gradients.items():
        assert_close(args[name].grad, expected)
    batch = args["moments"].grad.view(6, c, -1)
    for row in Moment:
        assert_close(batch[row], moments[row], dtype)
    assert args["moments"].grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
@ways
@sites
def test_output_and_error_pass_bit_for_bit(site: Site, call: Call, dtype: torch.dtype) -> None:
    case = make_candidates(site, 3, 1)
    args, grad = case.args(dtype), case.grad.to(dtype)
    out, z = call(**args, geometry=site.geometry)
    out.backward(grad)
    assert torch.equal(out.detach().view(torch.uint8), args["neuron"].detach().view(torch.uint8))
    assert torch.equal(args["neuron"].grad, grad)
    # An op may not return its input.
    shared = call is candidates
    assert (out.data_ptr() == args["neuron"].data_ptr()) == shared or out.numel() == 0
    assert not z.requires_grad


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    site = BY_NAME["conv2d-form"]
    case = make_candidates(site, 2, 1, bias=False)
    args = case.args()
    candidates(**args, activation=activation, geometry=site.geometry)[0].backward(case.grad)
    gradients, moments = oracle_candidates(site, case.tensors, case.grad, activation)
    assert_close(args["weight"].grad, gradients["weight"])
    assert_close(args["to_dendrite"].grad, gradients["to_dendrite"])
    assert_close(args["moments"].grad, moments.flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [63, 70_000])
def test_low_precision(rows: int, dtype: torch.dtype) -> None:
    # 1/70,000 is a subnormal of fp16, and a sum of 70,000 ones is beyond its range.
    site = Site("rows", (rows, 3), (2, 3))
    case = make_candidates(site, 2, 1)
    args = case.args(dtype)
    upcast = {n: t.detach().double() for n, t in args.items()}
    grad = case.grad.to(dtype)
    candidates(**args)[0].backward(grad)
    gradients, moments = oracle_candidates(site, upcast, grad.double(), "tanh")
    for name, expected in gradients.items():
        assert args[name].grad.dtype == dtype
        assert_close(args[name].grad, expected)
    assert args["moments"].grad.dtype == torch.float32
    batch = args["moments"].grad.view(6, 2, -1)
    for row in Moment:
        assert_close(batch[row], moments[row], dtype)
    # What does not depend on rounded preactivations is exact to float32.
    for row in (Moment.COUNT, Moment.G, Moment.GG):
        assert_close(batch[row], moments[row], torch.float32)


def test_descent_raises_the_covariance() -> None:
    site = BY_NAME["linear-63-127"]
    case = make_candidates(site, 1, 0)
    case.tensors["bias"] = None
    args = case.args()
    step = 0.1

    def covariance() -> torch.Tensor:
        a = torch.tanh(torch.nn.functional.linear(args["x"], args["weight"][0]))
        return ((a - a.mean(0)) * (case.grad - case.grad.mean(0))).mean(0).detach()

    before = covariance()
    args["direction"] = before.sign()[None]
    args["error_mean"] = case.grad.mean(0)
    candidates(**args)[0].backward(case.grad)
    args["weight"].data.sub_(step * args["weight"].grad)
    assert (covariance().abs() > before.abs()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_regression_makes_it_the_gradient_of_the_correlation(activation: str) -> None:
    """Autograd of |Cov| / (σ_a σ_g) as it is written, times σ_a of each candidate."""
    site = BY_NAME["conv2d-form"]
    case = make_candidates(site, 2, 1, activation)
    args, wanted = case.args(), case.args()

    def moments(weight: Tensor, bias: Tensor, to_dendrite: Tensor) -> tuple[Tensor, ...]:
        z = reference.candidate_preactivations(
            wanted["x"], wanted["activations"], weight, bias, to_dendrite, site.geometry
        )
        a = ACTIVATION_MODULES[activation](z).movedim(2, -1).flatten(1, -2)
        g = case.grad.movedim(1, -1).flatten(0, -2)
        mean_a, mean_g = a.mean(1, keepdim=True), g.mean(0)
        covariance = ((a - mean_a) * (g - mean_g)).mean(1)
        return covariance, a.var(1, correction=0), mean_a[:, 0], g.var(0, correction=0), mean_g

    learnt = [wanted[name] for name in ("weight", "bias", "to_dendrite")]
    covariance, variance_a, mean_a, variance_g, mean_g = moments(*learnt)
    spread_a = variance_a.detach().sqrt()
    correlation = covariance.abs() / (variance_a * variance_g).sqrt()
    expected = torch.autograd.grad(-(spread_a * correlation).sum(), learnt)

    args["direction"] = covariance.detach().sign() / variance_g.sqrt()
    args["error_mean"] = mean_g
    line = torch.stack([covariance / variance_a, mean_a]).detach()
    call = candidates(**args, activation=activation, geometry=site.geometry, regression=line)
    call[0].backward(case.grad)
    for name, gradient in zip(("weight", "bias", "to_dendrite"), expected, strict=True):
        assert_close(args[name].grad, gradient)


@ways
@pytest.mark.parametrize("learner", ["weight", "bias", "to_dendrite", "moments", "neuron"])
def test_any_one_learner_is_enough(learner: str, call: Call) -> None:
    case = make_candidates(BY_NAME["conv2d"], 2, 1)
    whole = case.args()
    call(**whole, geometry=case.site.geometry)[0].backward(case.grad)
    alone: Tensors = {n: t.detach() for n, t in case.args().items()}
    alone[learner].requires_grad_()
    call(**alone, geometry=case.site.geometry)[0].backward(case.grad)
    assert torch.equal(alone[learner].grad, whole[learner].grad)
    assert all(t.grad is None for n, t in alone.items() if n != learner)


@ways
def test_nothing_else_gets_a_gradient(call: Call) -> None:
    case = make_candidates(BY_NAME["linear"], 2, 1, regression=True)
    args, names = case.args(), ("x", "activations", "direction", "error_mean", "regression")
    for name in names:
        args[name] = args[name].clone().requires_grad_()
    call(**args)[0].backward(case.grad)
    assert all(args[name].grad is None for name in names)


def test_buffers_may_change_before_the_backward() -> None:
    case = make_candidates(BY_NAME["linear"], 2, 0)
    args = case.args()
    out, _ = candidates(**args)
    args["direction"].data.zero_()
    args["error_mean"].data.fill_(3.0)
    out.backward(case.grad)
    assert torch.count_nonzero(args["weight"].grad) == 0


def test_weight_may_change_before_the_backward() -> None:
    case = make_candidates(BY_NAME["linear"], 2, 0)
    args = case.args()
    out, _ = candidates(**args)
    with torch.no_grad():
        args["weight"].zero_()
    out.backward(case.grad)
    assert torch.count_nonzero(args["weight"].grad)


def test_no_candidate_learns_when_no_error_arrives() -> None:
    args = make_candidates(BY_NAME["linear"], 2, 0).args()
    out, z = candidates(**args)
    with pytest.raises(RuntimeError, match="does not require grad"):
        z.sum().backward()
    (out.detach() + args["neuron"]).sum().backward()
    assert args["weight"].grad is None


def test_strided_inputs_and_expanded_error() -> None:
    site = BY_NAME["conv2d-form"]
    case = make_candidates(site, 2, 1)
    dense, strided = case.args(), case.args()
    strided["x"] = strided["x"].to(memory_format=torch.channels_last)
    strided["activations"] = strided["activations"].transpose(3, 4).contiguous().transpose(3, 4)
    leaf = strided["weight"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    strided["weight"] = leaf
    for args in (dense, strided):
        candidates(**args, geometry=site.geometry)[0].sum().backward()
    for name in case.LEARN:
        assert_close(strided[name].grad, dense[name].grad)


def test_autocast() -> None:
    case = make_candidates(BY_NAME["linear"], 2, 1)
    args = case.args(torch.float32)
    plain = case.args(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, z = candidates(**args)
    expected, z_expected = candidates(**plain)
    assert torch.equal(z, z_expected)
    out.backward(case.grad.float())
    expected.backward(case.grad.float())
    assert torch.equal(args["weight"].grad, plain["weight"].grad)


def test_bfloat16_neuron_with_float32_parameters() -> None:
    case = make_candidates(BY_NAME["linear"], 2, 1)
    args = case.args(torch.float32)
    args["neuron"] = args["neuron"].detach().bfloat16()
    args["activations"] = args["activations"].bfloat16()
    out, z = candidates(**args)
    assert out.dtype == z.dtype == torch.bfloat16
    out.backward(case.grad.bfloat16())
    gradients, _ = oracle_candidates(case.site, case.tensors, case.grad, "tanh")
    assert args["weight"].grad.dtype == torch.float32
    assert_close(args["weight"].grad, gradients["weight"], torch.bfloat16)


def test_work_in_place_may_follow() -> None:
    """As after the soma itself, whose output a relu of torchvision's models overwrites."""
    case = make_candidates(BY_NAME["conv2d"], 2, 1)
    gradients = []
    for inplace in (False, True):
        args = case.args()
        soma = args["neuron"]
        out, _ = candidates(**args | {"neuron": soma * 1}, geometry=case.site.geometry)
        F.relu(out, inplace=inplace).backward(case.grad)
        gradients.append([soma.grad, *(args[name].grad for name in case.LEARN)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_work_in_place_on_what_is_still_needed_is_an_error() -> None:
    case = make_candidates(BY_NAME["linear"], 1, 0)
    args = case.args()
    # Its backward needs its output, which is the memory that `add_` writes to.
    neuron = args["neuron"].exp()
    out, _ = candidates(**args | {"neuron": neuron})
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(case.grad)


@ways
def test_the_error_stays_differentiable(call: Call) -> None:
    """A penalty on the gradient of the input differentiates twice, and candidates let it."""
    case = make_candidates(BY_NAME["linear"], 2, 1)
    seconds = []
    for through in (False, True):
        args = case.args()
        soma = args["neuron"]
        out = call(**args | {"neuron": soma.sin()})[0] if through else soma.sin()
        (first,) = torch.autograd.grad(out.square().sum(), soma, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), soma)[0])
    assert_close(seconds[1], seconds[0])


def test_op_where_somebody_records() -> None:
    """Modes, subclasses, compilers and tracers see the op; plain calls do without."""
    from torch.utils.flop_counter import FlopCounterMode

    args = make_candidates(BY_NAME["linear"], 2, 1).args(torch.float32)
    plain = candidates(**args)[0]
    assert plain.data_ptr() == args["neuron"].data_ptr()
    with FlopCounterMode(display=False):
        assert candidates(**args)[0].data_ptr() != args["neuron"].data_ptr()
