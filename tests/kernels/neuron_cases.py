"""What ops that compute a soma and its dendrites are called with, and what they have to give."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_cases import Site, Tensors, make_dendrites, oracle_dendrites
from tolerances import assert_close
from torch import Tensor

NAMES = ("x", "weight", "bias", "dendrite_weight", "dendrite_bias", "to_soma", "to_dendrite")
_PERFORATED = ("dendrite_weight", "dendrite_bias", "to_dendrite")
Arguments = Tensors
# Of arguments, a site, and whether to return the activations.
Call = Callable[[Arguments, Site, bool], tuple[Tensor, Tensor]]


def make_arguments(
    site: Site, d: int, bias: bool = True, dtype: torch.dtype = torch.float64
) -> Arguments:
    """Draw a neuron with D dendrites; what learns when perforated requires a gradient."""
    case = make_dendrites(site, d, bias=bias).args(dtype)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()

    return {
        "x": case["x"].detach().requires_grad_(),
        "weight": normal(*site.weight),
        "bias": normal(site.weight[0]) if bias else None,
        "dendrite_weight": case["weight"].detach(),
        "dendrite_bias": None if case["bias"] is None else case["bias"].detach(),
        "to_soma": case["to_soma"].detach().requires_grad_(),
        "to_dendrite": case["to_dendrite"].detach(),
    }


def check_neuron(call: Call, site: Site, d: int, keep: bool) -> None:
    """Compare output, activations and gradients with the oracle's."""
    args = make_arguments(site, d, bias=d != 1)
    expected = {
        name: None if t is None else t.detach().clone().requires_grad_(t.requires_grad)
        for name, t in args.items()
    }
    out, activations = call(args, site, keep)
    given = {
        "soma": site.soma(expected["x"], expected["weight"], expected["bias"]),
        "x": expected["x"].detach(),
        "weight": expected["dendrite_weight"],
        "bias": expected["dendrite_bias"],
        "to_soma": expected["to_soma"],
        "to_dendrite": expected["to_dendrite"],
    }
    wanted, wanted_activations = oracle_dendrites(site, given, "tanh")
    assert_close(out, wanted)
    assert activations.shape == (d if keep else 0, *out.shape)
    if d and keep:
        assert_close(activations, torch.stack(wanted_activations))
    grad = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(2))
    out.backward(grad)
    wanted.backward(grad)
    for name, argument in args.items():
        if argument is None:
            continue
        if name in _PERFORATED:
            assert argument.grad is None, name
        elif argument.numel():
            assert_close(argument.grad, expected[name].grad)


def check_frozen_parts(call: Call, site: Site) -> None:
    """Let the input alone require a gradient: nothing else gets one."""
    args = make_arguments(site, 2)
    for name in ("weight", "bias", "to_soma"):
        args[name].requires_grad_(False)
    call(args, site, False)[0].sum().backward()
    assert {name for name, t in args.items() if t.grad is not None} == {"x"}
