"""The correctness gate: no time is reported for an output that is wrong."""

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


def same_bits(out: Tensor, reference: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, signs of zeros included."""
    if out.shape != reference.shape or out.dtype != reference.dtype:
        return False
    return torch.equal(
        *(t.detach().contiguous().flatten().view(torch.uint8) for t in (out, reference))
    )


def output_fault(out: Tensor, reference: Tensor, dtype: str, depth: float = 1.0) -> str | None:
    """Return what is wrong with an output, or None; `depth` widens the tolerance of one op."""
    if out.shape != reference.shape:
        return f"output has shape {tuple(out.shape)}, not {tuple(reference.shape)}"
    error, tolerance = _error(out, reference, _norm(reference)), depth * TOLERANCES[dtype]
    # Written so that NaN fails.
    if error <= tolerance:
        return None
    return f"output is off by {error:.1e}, tolerance {tolerance:.0e} for {dtype}"


def gradient_fault(
    found: Mapping[str, Tensor], reference: Mapping[str, Tensor], dtype: str
) -> str | None:
    """Return what is wrong with a model's gradients, or None. Empty tensors do not count."""
    found = {name: grad for name, grad in found.items() if grad.numel()}
    reference = {name: grad for name, grad in reference.items() if grad.numel()}
    if found.keys() != reference.keys():
        odd = sorted(found.keys() ^ reference.keys())
        return f"gradients arrive at other parameters, such as {odd[0]}"
    whole = sum(_norm(grad) ** 2 for grad in reference.values()) ** 0.5
    tolerance = TOLERANCES[dtype] * GRADIENT_FACTOR
    for name, expected in reference.items():
        scale = max(_norm(expected), SMALL_SHARE * whole)
        error = _error(found[name], expected, scale)
        if not error <= tolerance:
            return f"gradient of {name} is off by {error:.1e}, tolerance {tolerance:.0e}"
    return None


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
