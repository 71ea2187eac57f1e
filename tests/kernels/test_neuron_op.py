"""`pbfx::perforated_linear` on the CPU: values, gradients, fakes, and what it refuses."""

import pytest
import torch
from kernel_cases import BY_NAME, Site, make_dendrites, oracle_dendrites
from tolerances import assert_close
from torch import Tensor
from torch.nn import functional as F

import pbfx_kernels.neuron_op  # noqa: F401  registers the op
from pbfx_kernels import ArgumentError, neuron_autograd, perforated_linear

SITES = [BY_NAME[name] for name in ("linear", "linear-sequence", "linear-unbatched")]
sites = pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
NAMES = ("x", "weight", "bias", "dendrite_weight", "dendrite_bias", "to_soma", "to_dendrite")


def arguments(site: Site, d: int, bias: bool = True) -> dict[str, Tensor | None]:
    case = make_dendrites(site, d, bias=bias).args()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(site.weight, dtype=torch.float64, generator=generator)
    return {
        "x": case["x"].detach().requires_grad_(),
        "weight": weight.requires_grad_(),
        "bias": torch.randn(
            site.weight[0], dtype=torch.float64, generator=generator
        ).requires_grad_()
        if bias
        else None,
        "dendrite_weight": case["weight"].detach(),
        "dendrite_bias": None if case["bias"] is None else case["bias"].detach(),
        "to_soma": case["to_soma"].detach().requires_grad_(),
        "to_dendrite": case["to_dendrite"].detach(),
    }


def call(args: dict[str, Tensor | None], keep: bool = True) -> tuple[Tensor, Tensor]:
    op = torch.ops.pbfx.perforated_linear.default
    return op(*(args[name] for name in NAMES), "tanh", keep)


@sites
@pytest.mark.parametrize("d", [0, 1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_matches_oracle(site: Site, d: int, bias: bool) -> None:
    args = arguments(site, d, bias)
    expected = {
        name: None if t is None else t.detach().clone().requires_grad_(t.requires_grad)
        for name, t in args.items()
    }
    out, activations = call(args)
    soma = F.linear(expected["x"], expected["weight"], expected["bias"])
    given = {
        "soma": soma,
        "x": expected["x"].detach(),
        "weight": expected["dendrite_weight"],
        "bias": expected["dendrite_bias"],
        "to_soma": expected["to_soma"],
        "to_dendrite": expected["to_dendrite"],
    }
    wanted, wanted_activations = oracle_dendrites(site, given, "tanh")
    assert_close(out, wanted)
    if d:
        assert_close(activations, torch.stack(wanted_activations))
    grad = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(2))
    out.backward(grad)
    wanted.backward(grad)
    for name in ("x", "weight", "bias", "to_soma"):
        if args[name] is not None and args[name].numel():
            assert_close(args[name].grad, expected[name].grad)
    for name in ("dendrite_weight", "dendrite_bias", "to_dendrite"):
        assert args[name] is None or args[name].grad is None


@sites
@pytest.mark.parametrize("d", [0, 2])
def test_op(site: Site, d: int) -> None:
    args = arguments(site, d)
    op = torch.ops.pbfx.perforated_linear.default
    torch.library.opcheck(op, (*(args[name] for name in NAMES), "tanh", True))


@pytest.mark.parametrize("d", [0, 3])
def test_empty_batch(d: int) -> None:
    args = arguments(BY_NAME["linear-empty"], d)
    out, activations = call(args)
    assert out.shape == (0, 6)
    assert activations.shape == (d, 0, 6)
    out.sum().backward()
    for name in ("weight", "bias", "to_soma"):
        assert not args[name].grad.count_nonzero()


@pytest.mark.parametrize("d", [0, 1, 3])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,), (0, 6)], ids=str)
def test_both_sums(shape: tuple[int, ...], d: int) -> None:
    grad, activations = torch.randn(shape), torch.randn(d, *shape)
    op = torch.ops.pbfx.link_and_bias_gradients.default
    of_links, of_bias = op(grad, activations, torch.float64, torch.float32)
    assert (of_links.dtype, of_bias.dtype) == (torch.float64, torch.float32)
    assert_close(of_bias, grad.double().reshape(-1, 6).sum(0))
    products = grad.double() * activations.double()
    wanted = products.flatten(1, -2).sum(1) if len(shape) > 1 else products
    assert_close(of_links, wanted, torch.float32)
    torch.library.opcheck(op, (grad, activations, torch.float32, torch.float16))


@pytest.mark.parametrize("learns", [("bias",), ("to_soma",), ("bias", "to_soma")], ids=str)
def test_sums_of_what_learns_alone(learns: tuple[str, ...]) -> None:
    args = arguments(SITES[0], 2)
    expected = {name: None if t is None else t.detach().clone() for name, t in args.items()}
    for name in ("bias", "to_soma"):
        args[name].requires_grad_(name in learns)
        expected[name].requires_grad_()
    call(args)[0].square().sum().backward()
    call(expected)[0].square().sum().backward()
    for name in ("bias", "to_soma"):
        found = args[name].grad
        assert (found is None) if name not in learns else torch.equal(found, expected[name].grad)


def test_frozen_parts_get_nothing() -> None:
    args = arguments(SITES[0], 2)
    for name in ("weight", "bias", "to_soma"):
        args[name].requires_grad_(False)
    out, activations = call(args, keep=False)
    assert activations.shape == (0, *out.shape)
    out.sum().backward()
    assert args["x"].grad is not None
    assert all(args[name].grad is None for name in ("weight", "bias", "to_soma"))


def test_links_that_learn_need_the_activations() -> None:
    with pytest.raises(RuntimeError, match="keep=True"):
        call(arguments(SITES[0], 2), keep=False)


def test_refuses_what_does_not_fit() -> None:
    args = arguments(SITES[0], 2)
    args["to_soma"] = args["to_soma"].detach()[:, :-1]
    with pytest.raises(ArgumentError, match="to_soma"):
        call(args)


def test_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    import pbfx_kernels.flops  # noqa: F401  registers the formulas

    site = BY_NAME["linear-sequence"]
    args = arguments(site, 2)
    with FlopCounterMode(display=False) as counter:
        out, _ = call(args)
    neurons, inputs = site.weight
    product = 2 * out.numel() // neurons * neurons * inputs
    assert counter.get_total_flops() == 3 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # Perforated: the error reaches the input and the soma's weight, and no dendrite's.
    assert counter.get_total_flops() == 2 * product


def test_refuses_weights_of_another_rank() -> None:
    args = arguments(SITES[0], 2)
    args["dendrite_weight"] = args["dendrite_weight"][0]
    with pytest.raises(ArgumentError, match="weight"):
        call(args)


@sites
@pytest.mark.parametrize("d", [1, 3])
def test_eager_calls_give_bit_for_bit_what_the_op_gives(site: Site, d: int) -> None:
    found, args = [], arguments(site, d)
    for run in (neuron_autograd.apply, torch.ops.pbfx.perforated_linear.default):
        learning = [args[name] for name in ("x", "weight", "bias", "to_soma")]
        out, activations = run(*(args[name] for name in NAMES), "tanh", True)
        assert not activations.requires_grad
        found.append((out, activations, *torch.autograd.grad(out.square().sum(), learning)))
    for eager, op in zip(*found, strict=True):
        assert torch.equal(eager, op)
        assert eager.stride() == op.stride()


def test_eager_calls_refuse_what_the_op_refuses() -> None:
    args = arguments(SITES[0], 2)
    given = [args[name] for name in NAMES]
    with pytest.raises(RuntimeError, match="keep=True"):
        neuron_autograd.apply(*given, "tanh", False)
    with torch.no_grad():
        out, activations = neuron_autograd.apply(*given, "tanh", False)
    assert not out.requires_grad
    assert not len(activations)
    with pytest.raises(ArgumentError, match="activation"):
        neuron_autograd.apply(*given, "step", True)


def test_links_have_no_second_derivative_and_say_so() -> None:
    args = arguments(SITES[0], 2)
    out, _ = neuron_autograd.apply(*(args[name] for name in NAMES), "tanh", True)
    (grad,) = torch.autograd.grad(out.square().sum(), args["to_soma"], create_graph=True)
    with pytest.raises(RuntimeError, match="link_and_bias_gradients"):
        grad.sum().backward()


def test_without_dendrites_there_is_the_soma_alone() -> None:
    args = arguments(SITES[0], 0)
    out = perforated_linear(*(args[name] for name in NAMES))
    assert torch.equal(out, F.linear(args["x"], args["weight"], args["bias"]))
    # Nothing of ours stands between it and autograd.
    wanted = F.linear(args["x"], args["weight"], args["bias"])
    assert type(out.grad_fn) is type(wanted.grad_fn)
