"""Prepare a call once for all tensors of one form: what a training step repeats is looked up.

The form of tensors is their shapes, strides, dtypes and devices. Whatever an op derives from these
alone, the checks of its arguments included, is the same for every step.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")

# A training loop meets a handful of forms; past this many they are prepared again.
_MOST_FORMS = 4096


class Recall(Generic[T]):
    """Remember what `prepare` made of tensors of some form.

    Args:
        prepare: from tensors and hashable arguments; it reads the form of the tensors only.
    """

    __slots__ = ("_known", "_prepare")

    def __init__(self, prepare: Callable[..., T]) -> None:
        self._prepare = prepare
        self._known: dict[Any, T] = {}

    def __call__(self, tensors: Sequence[Tensor | None], *rest: Any) -> T:
        """Return `prepare(*tensors, *rest)`, or what it returned for equal forms and arguments."""
        seen: list[Any] = []
        for tensor in tensors:
            if tensor is None:
                seen.append(None)
            else:
                seen += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        key = (*seen, *rest)
        try:
            return self._known[key]
        except KeyError:
            pass
        prepared = self._prepare(*tensors, *rest)
        if len(self._known) >= _MOST_FORMS:
            self._known.clear()
        self._known[key] = prepared
        return prepared
