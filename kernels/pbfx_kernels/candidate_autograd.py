"""How candidates are computed: by which kernels, and in eager mode without the dispatcher.

A graph holds `pbfx::candidates`, which has to copy the neuron's output, since a custom op may not
return its input. Eager code needs no node, so there an `autograd.Function` does the same work: the
output shares the neuron's memory and version counter, as if nothing stood in the path, and Python
crosses the dispatcher twice less per site. Both call `preactivate` and `differentiate`, which
choose the Triton kernels where they can run and the reference everywhere else.
"""

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pbfx_kernels import reference
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.moments import parted
from pbfx_kernels.tape import Taped, float32_precision
from pbfx_kernels.validation import check_candidates, check_once

# What the kernels compute in; float64 runs the reference.
_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})


def preactivate(
    x: Tensor,
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    geometry: Geometry,
) -> Tensor:
    """Compute what `reference.candidate_preactivations` does, strides aside."""
    tensors = x, activations, weight, bias, to_dendrite
    return _preactivated(tensors, geometry, float32_precision(activations))


def _preactivate(
    x: Tensor,
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    geometry: Geometry,
    _: object,
) -> Tensor:
    dtype = activations.dtype
    if not activations.shape[0]:
        bias = None if bias is None else bias.to(dtype)
        return reference.preactivations(x.to(dtype), weight.to(dtype), bias, geometry)
    if not fused(activations):
        return reference.candidate_preactivations(
            x, activations, weight, bias, to_dendrite, geometry
        )
    from pbfx_kernels.candidate_cascade import add_cascade_

    z = reference.preactivations(x.to(dtype), weight.to(dtype), None, geometry)
    return add_cascade_(z, activations, bias, to_dendrite, geometry.channel_axis)


_preactivated = Taped(_preactivate)


def differentiate(
    grad: Tensor,
    z: Tensor,
    x: Tensor,
    activations: Tensor,
    direction: Tensor,
    error_mean: Tensor,
    regression: Tensor | None,
    weight_shape: Sequence[int],
    activation: str,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Compute what `reference.candidates_backward` does.

    Returns:
        The weight's gradient, which kernels leave in the dtype of the computation, and the sums
        whose parts `parted` tells.
    """
    tensors = grad, z, x, activations, direction, error_mean, regression
    return _differentiated(tensors, tuple(weight_shape), activation, geometry, float32_precision(z))


def _differentiate(
    grad: Tensor,
    z: Tensor,
    x: Tensor,
    activations: Tensor,
    direction: Tensor,
    error_mean: Tensor,
    regression: Tensor | None,
    weight_shape: tuple[int, ...],
    activation: str,
    geometry: Geometry,
    _: object,
) -> tuple[Tensor, Tensor]:
    if not fused(z):
        weight, bias, to_dendrite, moments = reference.candidates_backward(
            grad,
            z,
            x,
            activations,
            direction,
            error_mean,
            regression,
            weight_shape,
            activation,
            geometry,
        )
        return weight, torch.cat([moments, bias, to_dendrite.flatten(0, 1)])
    from pbfx_kernels.candidate_moments import candidate_moments

    signal = candidate_moments(
        grad, z, activations, direction, error_mean, regression, activation, geometry.channel_axis
    )
    weight = reference.weight_gradient(signal.dz, x.to(z.dtype), weight_shape, geometry)
    if signal.weight_scale != 1:
        weight = weight.float() * signal.weight_scale
    return weight, signal.sums


_differentiated = Taped(_differentiate)


def fused(tensor: Tensor) -> bool:
    """Return whether Triton kernels compute on `tensor`'s device and in its dtype."""
    return tensor.is_cuda and tensor.dtype in _FUSED_DTYPES and triton_is_there()


@functools.cache
def triton_is_there() -> bool:
    """Return whether Triton is installed; where it is not, say once what that costs."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn(
            "pbfx: triton is not installed, so candidates run the reference on this GPU, several "
            "times slower and not capturable in a CUDA graph; pip install triton",
            stacklevel=2,
        )
    return found


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Return whether a call with `tensors` is plain eager execution, and nobody records ops.

    Tracers, compilers, dispatch modes, tensor subclasses and function transforms must see the op.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def apply(
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
) -> tuple[Tensor, Tensor]:
    """Do what `pbfx::candidates` does; call it where `runs_eagerly` only.

    Returns:
        out: the neuron's output, in the same memory.
        z: as the op.
    """
    tensors = (
        *(neuron, x, activations, weight, bias),
        *(to_dendrite, moments, direction, error_mean, regression),
    )
    check_once(check_candidates, tensors, activation, geometry)
    return _cxx_apply(*tensors, activation, geometry)


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Hold autocast off inside an op: the dtype of the soma's output, already autocast, decides."""
    device = tensor.device.type
    if not autocasts(device):
        return nullcontext()
    if torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)
    # Takes its keys from the dispatcher, for a quarter of the time.
    return torch._C._DisableAutocast()


def autocasts(device: str) -> bool:
    """Return whether autocast is on for devices of a type, some of which do not know it."""
    # Dynamo of torch 2.11 cannot trace `is_autocast_available`. Of the devices that compilers see,
    # meta alone has no autocast.
    compiling = torch.compiler.is_compiling()
    known = device != "meta" if compiling else torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def _no_grad() -> AbstractContextManager[object]:
    """Hold gradients off, which they are already unless somebody differentiates twice."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


class _Candidates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> tuple[Tensor, Tensor]:
        with no_autocast(neuron):
            # The cast copies are what the backward needs, as autocast keeps them for the soma.
            x, activations = x.to(neuron.dtype), activations.to(neuron.dtype)
            z = preactivate(x, activations, weight, bias, to_dendrite, geometry)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(z)
        learners = weight, bias, to_dendrite, moments
        ctx.learns = any(ctx.needs_input_grad[3:7])
        if ctx.learns:
            ctx.save_for_backward(z, x, activations, direction, error_mean, regression)
            ctx.form = weight.shape, activation, geometry
            ctx.dtypes = [
                learner.dtype if learner is not None and needed else None
                for learner, needed in zip(learners, ctx.needs_input_grad[3:7], strict=True)
            ]
        # Not a view for autograd, so a module that works in place may follow, as it may follow the
        # soma.
        return neuron.detach(), z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, learned = grads[0], [None] * 4
        if ctx.learns and grad is not None:
            # Under `create_graph` the error stays differentiable; what candidates learn is not.
            with _no_grad(), no_autocast(grad):
                weight, sums = differentiate(grad, *ctx.saved_tensors, *ctx.form)
                gradients = weight, *parted(sums, len(weight))
                learned = [
                    None if dtype is None else gradient.to(dtype)
                    for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
                ]
        return grad, None, None, *learned, *(None,) * 5


# The C++ half of `Function.apply`; the Python half looks for function transforms once more.
_cxx_apply: Any = super(torch.autograd.Function, _Candidates).apply  # pyright: ignore[reportAttributeAccessIssue]
