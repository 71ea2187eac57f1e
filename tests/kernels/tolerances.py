"""How close an implementation has to come to the float64 oracle: one table, the same everywhere.

The metric is `‖out - ref‖ / ‖ref‖`, in float64. NaN never passes.
"""

import torch
from torch import Tensor

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}

# An implementation may err at most this many times as much as plain eager torch in the same dtype.
EAGER_FACTOR = 2.0


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Return `‖out - ref‖ / ‖ref‖`, or `‖out‖` where the reference is zero or empty."""
    assert out.shape == reference.shape, f"shape {tuple(out.shape)}, not {tuple(reference.shape)}"
    reference = reference.double()
    scale = reference.norm().item()
    return (out.double() - reference).norm().item() / (scale or 1.0)


def assert_close(out: Tensor, reference: Tensor, dtype: torch.dtype | None = None) -> None:
    """Assert that `out` is within the tolerance of `dtype`, by default its own."""
    error = relative_error(out, reference)
    tolerance = TOLERANCES[dtype or out.dtype]
    # Written so that NaN fails.
    assert error <= tolerance, f"relative error {error:.2e}, tolerance {tolerance:.0e}"


def assert_no_worse_than_eager(out: Tensor, eager: Tensor, reference: Tensor) -> None:
    """Assert that `out` errs at most `EAGER_FACTOR` times as much as `eager` in the same dtype."""
    error, allowed = relative_error(out, reference), EAGER_FACTOR * relative_error(eager, reference)
    assert error <= allowed, (
        f"relative error {error:.2e}, {EAGER_FACTOR} x eager's is {allowed:.2e}"
    )
