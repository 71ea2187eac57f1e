"""Slots for dendrites to come: tensors of full size whose last rows are zero and masked.

With `Config(reserve=R)` a site's tensors have R rows from the start, of which the first D are its
dendrites. The others compute: they have weights of zero and cost what a dendrite costs. Their links
are multiplied by a mask that is no part of the graph, so they add nothing, get gradients of zero,
and a growth only writes numbers. State dicts hold the D rows, as without a reserve.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def padded(
    state_dict: dict[str, Any],
    prefix: str,
    tensors: Iterable[tuple[str, Tensor, tuple[int, ...]]],
) -> dict[str, Any]:
    """Return a state dict whose live rows fill up the reserved tensors that they belong to.

    Args:
        state_dict: left as it is.
        prefix: of the keys.
        tensors: the reserved tensors by name, and their axes along which dendrites lie.

    Returns:
        A new dict. What has other sizes beside its rows, or too many, stays as it is: it is for
        torch to say what does not fit.
    """
    result = dict(state_dict)
    # Its attributes carry the versions of modules.
    metadata = getattr(state_dict, "_metadata", None)
    for name, tensor, axes in tensors:
        value = state_dict.get(prefix + name)
        full = torch.zeros_like(tensor, device=None if value is None else value.device)
        if value is not None:
            fits = value.dim() == full.dim() and all(
                size <= slots if axis in axes else size == slots
                for axis, (size, slots) in enumerate(zip(value.shape, full.shape, strict=True))
            )
            if not fits:
                continue
            full[tuple(slice(0, size) for size in value.shape)] = value
        result[prefix + name] = full
    if metadata is not None:
        result = type(state_dict)(result)
        result._metadata = metadata  # pyright: ignore[reportAttributeAccessIssue]
    return result
