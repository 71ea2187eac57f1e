"""Check that the arguments of an op fit together, before anything is computed.

The checks run inside the ops and their fakes, so on real calls, under FakeTensorMode and in Dynamo,
but not on the proxies of a symbolic trace. They compare shapes, dtypes and devices only: no host
synchronisation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pbfx_kernels.activations import ACTIVATIONS
from pbfx_kernels.errors import ArgumentError
from pbfx_kernels.geometry import Geometry

_MOMENT_DTYPES = (torch.float32, torch.float64)
# A training loop meets a handful of shapes; past this many the checks run again.
_MOST_CHECKED = 4096

_checked: set[Any] = set()


def check_once(check: Callable[..., None], tensors: Sequence[Tensor | None], *form: object) -> None:
    """Call `check(*tensors, *form)`, unless it has passed tensors of these shapes before.

    Args:
        check: one of this package's, which reads shapes, dtypes and devices only.
        tensors: what it checks.
        form: what else it is given; hashable.
    """
    seen = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
    key = (check, *seen, *form)
    if key not in _checked:
        check(*tensors, *form)
        if len(_checked) >= _MOST_CHECKED:
            _checked.clear()
        _checked.add(key)


def check_dendrites(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    geometry: Geometry,
) -> None:
    """Check the arguments of `pbfx::dendrites`.

    Raises:
        ArgumentError: names every argument that does not fit, with what was expected and what was
            got.
    """
    tensors = {
        "soma": soma,
        "x": x,
        "weight": weight,
        "bias": bias,
        "to_soma": to_soma,
        "to_dendrite": to_dendrite,
    }
    faults = _common_faults(tensors, soma, x, weight, activation, geometry)
    if not faults:
        d, n = weight.shape[0], geometry.neurons(weight.shape[1:])
        faults += _shape_faults(
            ("bias", "(D, N)", bias, (d, n)),
            ("to_soma", "(D, N)", to_soma, (d, n)),
            ("to_dendrite", "(D, D, N)", to_dendrite, (d, d, n)),
        )
    if faults:
        raise ArgumentError("pbfx::dendrites", faults)


def check_candidates(
    neuron: Tensor,
    x: Tensor,
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    moments: Tensor,
    direction: Tensor,
    error_mean: Tensor,
    regression: Tensor | None,
    activation: str,
    geometry: Geometry,
) -> None:
    """Check the arguments of `pbfx::candidates`.

    Raises:
        ArgumentError: names every argument that does not fit, with what was expected and what was
            got.
    """
    tensors = {
        "neuron": neuron,
        "x": x,
        "activations": activations,
        "weight": weight,
        "bias": bias,
        "to_dendrite": to_dendrite,
        "moments": moments,
        "direction": direction,
        "error_mean": error_mean,
        "regression": regression,
    }
    faults = _common_faults(tensors, neuron, x, weight, activation, geometry)
    if not faults:
        c, n = weight.shape[0], geometry.neurons(weight.shape[1:])
        d = activations.shape[0] if activations.dim() else 0
        faults += _shape_faults(
            ("activations", "(D, *neuron)", activations, (d, *neuron.shape)),
            ("bias", "(C, N)", bias, (c, n)),
            ("to_dendrite", "(C, D, N)", to_dendrite, (c, d, n)),
            ("moments", "(6 * C, N)", moments, (6 * c, n)),
            ("direction", "(C, N)", direction, (c, n)),
            ("error_mean", "(N,)", error_mean, (n,)),
            ("regression", "(2, C, N)", regression, (2, c, n)),
        )
    if moments.dtype not in _MOMENT_DTYPES:
        # A count has to survive, and Σaa/P - (Σa/P)² has to cancel.
        faults.append(
            f"moments: expected torch.float32 or torch.float64, got {moments.dtype}; "
            "keep this parameter out of model.half() and model.bfloat16()"
        )
    if faults:
        raise ArgumentError("pbfx::candidates", faults)


def _common_faults(
    tensors: Mapping[str, Tensor | None],
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    activation: str,
    geometry: Geometry,
) -> list[str]:
    faults: list[str] = []
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            faults.append(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
        if tensor.device != soma.device:
            faults.append(f"{name}: expected on {soma.device}, got {tensor.device}")
    if activation not in ACTIVATIONS:
        faults.append(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return faults + _form_faults(next(iter(tensors)), soma, x, weight, geometry)


def _form_faults(
    soma_name: str, soma: Tensor, x: Tensor, weight: Tensor, geometry: Geometry
) -> list[str]:
    """Check that weight, input and output are those of one linear op or convolution."""
    spatial = geometry.spatial
    # (D, N, K), (D, N, channels / groups, *kernel) or (D, channels, N / groups, *kernel).
    if weight.dim() != spatial + 3:
        return [f"weight: expected {spatial + 3} dimensions, got shape {_show(weight.shape)}"]
    # What the groups divide among themselves on the weight's first axis.
    divided, whose = weight.shape[1], "channels" if geometry.transposed else "neurons"
    if divided % geometry.groups:
        return [f"weight: expected {whose} in {geometry.groups} equal groups, got {divided}"]
    batch_dims = "1 or more" if spatial == 0 else f"{spatial + 1} or {spatial + 2}"
    if x.dim() < spatial + 1 or (spatial > 0 and x.dim() > spatial + 2):
        return [f"x: expected {batch_dims} dimensions, got shape {_show(x.shape)}"]
    channels, expected = x.shape[geometry.channel_axis], geometry.channels(weight.shape[1:])
    if channels != expected:
        return [
            f"x: expected {expected} channels on axis {geometry.channel_axis}, "
            f"got {channels} in shape {_show(x.shape)}"
        ]
    form = geometry.output_shape(x.shape, weight.shape[1:])
    return _shape_faults((soma_name, "of the op's output", soma, form))


def _shape_faults(
    *expectations: tuple[str, str, Tensor | None, Sequence[int]],
) -> list[str]:
    return [
        f"{name}: expected shape {words} = {_show(shape)}, got {_show(tensor.shape)}"
        for name, words, tensor, shape in expectations
        if tensor is not None and tuple(tensor.shape) != tuple(shape)
    ]


def _show(shape: Sequence[int]) -> str:
    return str(tuple(shape))
