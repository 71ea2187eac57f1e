"""The dendrite activations `f` and their derivatives, by name."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def _sigmoid_derivative(z: Tensor) -> Tensor:
    a = torch.sigmoid(z)
    return a * (1 - a)


def _tanh_derivative(z: Tensor) -> Tensor:
    a = torch.tanh(z)
    return 1 - a * a


def _relu_derivative(z: Tensor) -> Tensor:
    # Zero at the kink, as torch does.
    return (z > 0).to(z.dtype)


def _gelu_derivative(z: Tensor) -> Tensor:
    cumulative = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    density = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    return cumulative + z * density


def _silu_derivative(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sigmoid": (torch.sigmoid, _sigmoid_derivative),
    "tanh": (torch.tanh, _tanh_derivative),
    "relu": (torch.relu, _relu_derivative),
    "gelu": (F.gelu, _gelu_derivative),
    "silu": (F.silu, _silu_derivative),
}

ACTIVATIONS: tuple[str, ...] = tuple(_FUNCTIONS)


def activate(name: str, z: Tensor) -> Tensor:
    """Apply the activation `f` to a dendrite's preactivation.

    Args:
        name: one of `ACTIVATIONS`; `gelu` is the exact one, with erf.
        z: any shape, any float dtype.

    Returns:
        `f(z)`, shape and dtype of `z`.

    Raises:
        KeyError: `name` is not in `ACTIVATIONS`; the ops check it first and raise `ArgumentError`.
    """
    return _FUNCTIONS[name][0](z)


def activation_derivative(name: str, z: Tensor) -> Tensor:
    """Evaluate `f'(z)`.

    Args:
        name: one of `ACTIVATIONS`.
        z: any shape, any float dtype.

    Returns:
        `f'(z)`, shape and dtype of `z`.

    Raises:
        KeyError: `name` is not in `ACTIVATIONS`; the ops check it first and raise `ArgumentError`.
    """
    return _FUNCTIONS[name][1](z)
