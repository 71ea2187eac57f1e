"""Repeated layers are one path, and the path stands for exactly those layers."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbfx.explain.collapse import collapse, collapse_alike, names, write


def expand(text: str) -> set[str]:
    """Return the paths for which a written pattern stands, by reading it as a shell would."""
    pieces = re.split(r"(\{[^}]*\})", text)
    choices = []
    for piece in pieces:
        if not piece.startswith("{"):
            choices.append([piece])
            continue
        numbers: list[str] = []
        for entry in piece[1:-1].split(","):
            first, _, last = entry.partition("..")
            numbers += map(str, range(int(first), int(last or first) + 1))
        choices.append(numbers)
    return {"".join(path) for path in itertools.product(*choices)}


def texts(*paths: str) -> list[str]:
    return [write(pattern) for pattern, _ in collapse(paths)]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([f"encoder.layer.{i}.query" for i in range(12)], ["encoder.layer.{0..11}.query"]),
        (["a.0", "a.1"], ["a.{0,1}"]),
        (["a.0", "a.2", "a.3", "a.4", "a.7"], ["a.{0,2..4,7}"]),
        (["a.5"], ["a.5"]),
        ([f"s.{i}.b.{j}.fc" for i in range(3) for j in range(4)], ["s.{0..2}.b.{0..3}.fc"]),
        # A grid with a hole: no pattern stands for what is not there.
        (["l.0.0", "l.0.1", "l.1.0"], ["l.0.{0,1}", "l.1.0"]),
        (
            ["block1.layer1", "block1.layer2", "block2.layer1"],
            ["block1.layer{1,2}", "block2.layer1"],
        ),
        (["head", "body.0", "body.1", "tail"], ["head", "body.{0,1}", "tail"]),
        (["a.00", "a.01", "a.1"], ["a.00", "a.01", "a.1"]),
        (["conv2d", "conv3d"], ["conv{2,3}d"]),
        (["a", "a", "b"], ["a", "b"]),
        ([""], [""]),
        ([], []),
    ],
)
def test_patterns(paths: list[str], expected: list[str]):
    assert texts(*paths) == expected


@given(
    st.lists(
        st.lists(
            st.sampled_from(["a", "0", "1", "2", "b1", "b2", "01", "x3y"]), min_size=1, max_size=4
        ),
        max_size=25,
    )
)
def test_patterns_stand_for_exactly_the_given_paths(lists: list[list[str]]):
    paths = [".".join(path) for path in lists]
    found = collapse(paths)
    for pattern, members in found:
        assert expand(write(pattern)) == set(members)
        assert ".".join(write(name) for name in names(pattern)) == write(pattern)
    covered = [path for _, members in found for path in members]
    assert sorted(covered) == sorted(set(paths))
    firsts = [paths.index(members[0]) for _, members in found]
    assert firsts == sorted(firsts)


def test_only_what_is_alike_shares_a_pattern():
    entries = [("a.0", "conv"), ("b", "conv"), ("a.1", "linear"), ("a.2", "conv")]
    found = [(write(pattern), kind, paths) for pattern, kind, paths in collapse_alike(entries)]
    assert found == [
        ("a.{0,2}", "conv", ["a.0", "a.2"]),
        ("b", "conv", ["b"]),
        ("a.1", "linear", ["a.1"]),
    ]
