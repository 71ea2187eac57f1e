"""The correctness gate: no time is reported for an output or a gradient that is wrong.

A result is judged by its distance from a more exact one, `‖found - exact‖ / ‖exact‖`. What distance
is right is in a table, per dtype. Where sums cancel, as in a convolution's weight gradient over a
large batch, rounding alone leads further than that, whoever computes. There the yardstick is what
eager torch, written from the equation, loses in the same dtype, at worst in a few batches: nobody
may lose more than `EAGER_FACTOR` times as much, and nobody a fifth.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.errors import GateError

# ‖out - ref‖ / ‖ref‖, the table of the tests.
TOLERANCES = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-2}
# A gradient has been through every layer twice, and a relu may fall on the other side of zero.
GRADIENT_FACTOR = 10.0
# A tensor whose gradient is all cancellation is judged by this share of the whole gradient's norm.
SMALL_SHARE = 1e-2
# Two ways to round a sum are two draws of one error: STYLE.md allows twice eager's.
EAGER_FACTOR = 2.0
# However far eager goes astray: beyond, an error is no rounding.
MOST = 0.2


def same_bits(out: Tensor, reference: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, signs of zeros included."""
    if out.shape != reference.shape or out.dtype != reference.dtype:
        return False
    return torch.equal(
        *(t.detach().contiguous().flatten().view(torch.uint8) for t in (out, reference))
    )


def output_fault(
    out: Tensor,
    reference: Tensor,
    dtype: str,
    depth: float = 1.0,
    lost: float = 0.0,
    most: float = MOST,
) -> str | None:
    """Return what is wrong with an output, or None.

    Args:
        out: what is judged.
        reference: what is right, or more exact.
        dtype: in which `out` was computed, of `TOLERANCES`.
        depth: widens the tolerance of one op.
        lost: how far eager torch is off in `dtype`, of `output_error`; widens the tolerance too.
        most: where that ends.
    """
    if out.shape != reference.shape:
        return f"output has shape {tuple(out.shape)}, not {tuple(reference.shape)}"
    error, tolerance = output_error(out, reference), allowed(depth * TOLERANCES[dtype], lost, most)
    # Written so that NaN fails.
    if error <= tolerance:
        return None
    return f"output is off by {error:.1e}, tolerance {tolerance:.0e} for {dtype}"


def gradient_fault(
    found: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    dtype: str,
    lost: Mapping[str, float] | None = None,
    most: float = MOST,
) -> str | None:
    """Return what is wrong with a model's gradients, or None. Empty tensors do not count.

    Args:
        found: what is judged, by names of parameters.
        reference: what is right, or more exact.
        dtype: in which `found` was computed, of `TOLERANCES`.
        lost: how far eager torch is off in `dtype`, of `gradient_errors`; widens the tolerance,
            tensor by tensor.
        most: where that ends.
    """
    found = {name: grad for name, grad in found.items() if grad.numel()}
    reference = {name: grad for name, grad in reference.items() if grad.numel()}
    if found.keys() != reference.keys():
        odd = sorted(found.keys() ^ reference.keys())
        return f"gradients arrive at other parameters, such as {odd[0]}"
    for name, error in gradient_errors(found, reference).items():
        widened = 0.0 if lost is None else lost[name]
        tolerance = allowed(TOLERANCES[dtype] * GRADIENT_FACTOR, widened, most)
        if not error <= tolerance:
            return f"gradient of {name} is off by {error:.1e}, tolerance {tolerance:.0e}"
    return None


def output_error(out: Tensor, reference: Tensor) -> float:
    """Return `‖out - ref‖ / ‖ref‖`."""
    return _error(out, reference, _norm(reference))


def gradient_errors(
    found: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return how far each gradient of a model is off, by names of parameters."""
    whole = sum(_norm(grad) ** 2 for grad in reference.values()) ** 0.5
    return {
        name: _error(found[name], grad, max(_norm(grad), SMALL_SHARE * whole))
        for name, grad in reference.items()
        if grad.numel()
    }


def allowed(table: float, lost: float, most: float) -> float:
    """Return the tolerance: the table's, or that of a result that eager torch rounds badly."""
    return max(table, min(EAGER_FACTOR * lost, most))


def require(faults: list[str]) -> None:
    """Stop the benchmark if there are faults.

    Raises:
        GateError: naming all of them.
    """
    if faults:
        raise GateError("outputs are wrong, nothing was timed:\n" + "\n".join(faults))


def _norm(tensor: Tensor) -> float:
    return tensor.detach().double().norm().item()


def _error(out: Tensor, reference: Tensor, scale: float) -> float:
    return _norm(out.double() - reference.double()) / (scale or 1.0)
