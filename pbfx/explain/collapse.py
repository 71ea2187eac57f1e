"""Write the paths of repeated layers as one: `encoder.layer.{0..11}.attention.query`.

Layers are repeated under whole numbers (`layer.0`) and under numbered names (`denselayer1`).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

# A path in pieces, its dots among them; where layers are repeated, their numbers.
Pattern = tuple[str | frozenset[int], ...]

# A number with leading zeros would not come out as it went in.
_PIECES = re.compile(r"(\.|(?<!\d)(?:0|[1-9]\d*)(?!\d))", re.ASCII)


def collapse(paths: Iterable[str]) -> list[tuple[Pattern, list[str]]]:
    """Return patterns that stand for exactly these paths, with the paths of each.

    Patterns come in the order of the first path of each, and so do the paths.
    """
    order = {path: number for number, path in enumerate(dict.fromkeys(paths))}
    merged: dict[Pattern, list[str]] = {_pattern(path): [path] for path in order}
    # From the last numbers to the first: what differs in one place only is one pattern.
    for place in reversed(range(max(map(len, merged), default=0))):
        groups: dict[Pattern, list[Pattern]] = {}
        for pattern in merged:
            groups.setdefault(_without(pattern, place), []).append(pattern)
        together: dict[Pattern, list[str]] = {}
        for members in groups.values():
            numbers = [
                n for m in members if len(m) > place and isinstance(n := m[place], frozenset)
            ]
            whole = members[0]
            if numbers:
                whole = (*whole[:place], frozenset[int]().union(*numbers), *whole[place + 1 :])
            together[whole] = [path for m in members for path in merged[m]]
        merged = together
    found = [
        (pattern, sorted(members, key=order.__getitem__)) for pattern, members in merged.items()
    ]
    return sorted(found, key=lambda item: order[item[1][0]])


def collapse_alike(entries: Iterable[tuple[str, K]]) -> list[tuple[Pattern, K, list[str]]]:
    """Collapse the paths of entries that are alike; return pattern, likeness and paths of each.

    Args:
        entries: paths, and for each what has to be equal for two of them to share a pattern.

    Returns:
        In the order of the first entry that each pattern stands for.
    """
    first: dict[tuple[str, K], int] = {}
    groups: dict[K, list[str]] = {}
    for number, (path, likeness) in enumerate(entries):
        first.setdefault((path, likeness), number)
        groups.setdefault(likeness, []).append(path)
    found = [
        (first[members[0], likeness], pattern, likeness, members)
        for likeness, paths in groups.items()
        for pattern, members in collapse(paths)
    ]
    found.sort(key=lambda item: item[0])
    return [(pattern, likeness, members) for _, pattern, likeness, members in found]


def write(pattern: Pattern) -> str:
    """Return the text of a pattern: `{0..11}`, `{0,2}` or a lone number for repeated layers."""
    return "".join(piece if isinstance(piece, str) else _numbers(piece) for piece in pattern)


def names(pattern: Pattern) -> list[Pattern]:
    """Return the names between the dots of a pattern."""
    found: list[Pattern] = [()]
    for piece in pattern:
        if piece == ".":
            found.append(())
        else:
            found[-1] += (piece,)
    return found


def _pattern(path: str) -> Pattern:
    pieces = _PIECES.split(path)
    # The odd ones are what the pattern found: dots and numbers.
    return tuple(
        frozenset({int(piece)}) if number % 2 and piece != "." else piece
        for number, piece in enumerate(pieces)
        if piece
    )


def _without(pattern: Pattern, place: int) -> Pattern:
    """Return `pattern` without the numbers at `place`, if there are any."""
    if place >= len(pattern) or isinstance(pattern[place], str):
        return pattern
    return (*pattern[:place], frozenset(), *pattern[place + 1 :])


def _numbers(numbers: frozenset[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return texts[0] if len(numbers) == 1 else f"{{{','.join(texts)}}}"
