"""Nested state survives JSON, whatever its keys and numbers are."""

from __future__ import annotations

import collections
import enum
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pbfx
from pbfx import CheckpointError
from pbfx.encoding import decode, encode


def round_trip(value: Any) -> Any:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(value, tensors, "root"))
    return decode(json.loads(text), tensors)


def equal(a: Any, b: Any) -> bool:
    """Compare types, too: a tuple is no list, True is no 1, nan is nan."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and a.dtype == b.dtype
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (
            a == b and math.copysign(1, a) == math.copysign(1, b)
        )
    if isinstance(a, dict):
        # Order counts: optimizers number parameters by it.
        pairs = zip(a.items(), b.items(), strict=False)
        return len(a) == len(b) and all(
            equal(x, y) for pair in pairs for x, y in zip(*pair, strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


KEYS = (
    st.text(max_size=4)
    | st.sampled_from(["pbfx:tensor", "pbfx:", "a/b", "a", "b", "1", "0"])
    | st.integers(-3, 3)
    | st.none()
    | st.booleans()
    | st.tuples(st.integers(), st.text(max_size=2))
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.builds(lambda values: torch.tensor(values), st.lists(st.floats(width=32), max_size=3))
    | st.builds(lambda value: torch.tensor(value), st.integers(-9, 9))
)


VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.integers(0, 9), st.integers(0, 5), max_size=3).map(collections.Counter)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_round_trip(value: Any) -> None:
    assert equal(round_trip(value), value)


@given(VALUES)
def test_encoding_is_json_without_tensors_and_leaves_the_value_alone(value: Any) -> None:
    tensors: dict[str, Tensor] = {}
    before = repr(value)
    encode(value, tensors, "root")
    assert repr(value) == before
    assert all(name.startswith("root") for name in tensors)


def test_tensors_whose_paths_read_the_same_are_kept_apart() -> None:
    values = [torch.tensor(float(i)) for i in range(6)]
    state = {
        "a/b": values[0],
        "a": {"b": values[1]},
        1: values[2],
        "1": values[3],
        "list": [values[4]],
        "list/0": values[5],
    }
    found = round_trip(state)
    assert equal(found, state)


class Colour(enum.StrEnum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Text(str, enum.Enum):  # noqa: UP042
    ONE = "one"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (Colour.RED, "red"),
        (Text.ONE, "one"),
        (Number.ONE, 1),
        (pbfx.Phase.NEURON, "neuron"),
        (np.float32(0.5), 0.5),
        (np.float64(0.1), 0.1),
        (np.float64("inf"), math.inf),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.defaultdict(dict, {0: {}}), {0: {}}),
    ],
    ids=repr,
)
def test_what_only_dresses_up_as_data_becomes_data(value: Any, wanted: Any) -> None:
    assert equal(round_trip(value), wanted)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", torch.float32, np.zeros(2), len])
def test_what_is_no_data_is_refused_by_its_path(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"cannot save root/scheduler/0: a \w+ is neither a"):
        encode({"scheduler": [value]}, {}, "root")


def test_a_missing_tensor_is_named() -> None:
    encoded = encode({"a": torch.zeros(1)}, {}, "root")
    with pytest.raises(CheckpointError, match="the file lacks the tensor 'root/a'"):
        decode(encoded, {})


def test_an_unknown_mark_is_named() -> None:
    with pytest.raises(
        CheckpointError, match="unknown mark 'pickle'; the file may come from a newer"
    ):
        decode({"pbfx:pickle": "os.system"}, {})
