"""Nested state as JSON beside a flat dict of tensors, and back.

State dicts of optimizers and schedulers hold what JSON has no word for: tensors, tuples, integer
keys, counters, infinities. Each gets an object with one marked key. Nothing here can name code, so
decoding cannot run any.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pbfx.errors import CheckpointError

_MARK = "pbfx:"


def encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """Return `value` as JSON; its tensors go into `tensors` under names that start with `path`.

    Raises:
        CheckpointError: naming the path, if something is neither data nor a tensor.
    """
    if isinstance(value, Tensor):
        # Two paths can read the same, {"a/b": t} and {"a": {"b": t}}.
        while path in tensors:
            path += "'"
        tensors[path] = value
        return {f"{_MARK}tensor": path}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    # Subclasses, enumerations among them, become what they are made of.
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {f"{_MARK}float": str(float(value))}
    if isinstance(value, (list, tuple)):
        items = [encode(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {f"{_MARK}tuple": items}
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, collections.Counter) else "dict"
        plain = kind == "dict" and all(type(k) is str and not k.startswith(_MARK) for k in value)
        if plain:
            return {k: encode(v, tensors, f"{path}/{k}") for k, v in value.items()}
        pairs = [
            [encode(k, tensors, path), encode(v, tensors, f"{path}/{k}")] for k, v in value.items()
        ]
        return {f"{_MARK}{kind}": pairs}
    raise CheckpointError(
        f"cannot save {path}: a {type(value).__name__} is neither a tensor nor plain data "
        f"({value!r})"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `encode` was given.

    Raises:
        CheckpointError: if a tensor is missing or a mark is unknown.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    marks = [key for key in value if key.startswith(_MARK)]
    if not marks:
        return {key: decode(item, tensors) for key, item in value.items()}
    mark, content = marks[0].removeprefix(_MARK), value[marks[0]]
    if mark == "tensor":
        if content not in tensors:
            raise CheckpointError(f"the file lacks the tensor {content!r}")
        return tensors[content]
    if mark == "float":
        return float(content)
    if mark == "tuple":
        return tuple(decode(item, tensors) for item in content)
    if mark in ("dict", "counter"):
        pairs = {decode(key, tensors): decode(item, tensors) for key, item in content}
        return collections.Counter(pairs) if mark == "counter" else pairs
    raise CheckpointError(f"unknown mark {mark!r}; the file may come from a newer pbfx")
