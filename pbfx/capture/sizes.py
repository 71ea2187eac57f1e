"""What an exported graph asks of the sizes of its inputs.

torch.export stands symbols for the sizes that may change, and writes down what it had to assume
about them when forward asked: that one is above eight, that two are equal. Each becomes a check.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch

from pbfx.errors import CaptureError


@dataclasses.dataclass(frozen=True)
class Check:
    """What has to hold for the sizes of the inputs: as code over `s`, and as a user reads it."""

    code: str
    words: str


def checks_of(
    names: Sequence[str], values: Sequence[Any], of_calls: Set[int] = frozenset()
) -> list[Check]:
    """Return what the shapes and guards of an export ask of the sizes of its inputs.

    Args:
        names: what to call each input.
        values: the fake tensors that stood for them.
        of_calls: the places of guards that calls of whole modules left. They are called with what
            there is, so that a size is not 0 or 1 is no condition of theirs.
    """
    code: dict[Any, Any] = {}
    words: dict[Any, Any] = {}
    found: list[tuple[Any, str, str]] = []
    checks: list[Check] = []
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        for dim, size in enumerate(value.shape):
            at, read = f"s[{index}][{dim}]", f"{name}.shape[{dim}]"
            if not isinstance(size, torch.SymInt):
                checks.append(Check(f"{at} == {size}", f"{read} == {size}"))
                continue
            expression = size.node.expr
            if expression.is_Symbol and expression not in code:
                # Whole numbers and not negative, so that conditions may be left out.
                symbol = type(expression)
                code[expression] = symbol(at, integer=True, nonnegative=True)
                words[expression] = symbol(read, integer=True, nonnegative=True)
            else:
                found.append((expression, at, read))
    checks += [
        Check(f"{at} == {_printed(e.xreplace(code))}", f"{read} == {_printed(e.xreplace(words))}")
        for e, at, read in found
        if e.free_symbols <= code.keys()
    ]
    if values:
        environment = values[0].fake_mode.shape_env
        guards = [
            guard.expr
            for index, guard in enumerate(environment.guards)
            if index not in of_calls or getattr(guard.expr, "rel_op", "") != "!="
        ]
        guards += [
            bound
            for symbol, limits in environment.var_to_range.items()
            for bound in (
                *([symbol >= limits.lower] if limits.lower > 0 else []),
                *([symbol <= limits.upper] if limits.upper.is_Integer else []),
            )
        ]
        checks += [
            Check(_printed(g.xreplace(code)), _printed(g.xreplace(words)))
            for g in guards
            if g.free_symbols and g.free_symbols <= code.keys()
        ]
    return list(dict.fromkeys(checks))


def compiled(codes: Sequence[str]) -> Callable[[Sequence[Any]], bool]:
    """Return the conjunction of conditions over `s`, the shapes of the inputs.

    They were printed from the expressions of torch's shape environment, and hold nothing else.
    """
    condition = " and ".join(f"({code})" for code in codes) or "True"
    return eval(f"lambda s: {condition}", {"math": math, "max": max, "min": min, "abs": abs})


def wrong_size(
    checks: Sequence[Check], names: Sequence[str], shapes: Sequence[Any], ranks: Sequence[int]
) -> CaptureError:
    """Return the error for inputs of such shapes, of which some check does not hold."""
    if [len(shape) for shape in shapes] != ranks:
        failed = [f"{name}.dim() == {rank}" for name, rank in zip(names, ranks, strict=True)]
    else:
        failed = [check.words for check in checks if not compiled([check.code])(shapes)]
    got = ", ".join(f"{n} of {tuple(shape)}" for n, shape in zip(names, shapes, strict=True))
    return CaptureError(
        f"the exported graph holds for {' and '.join(failed)} only, got {got}. torch.export fixed "
        "that, because forward depends on it or dynamic_shapes says so; give pbfx.transform "
        "example_inputs and dynamic_shapes that leave it open, or call the model with such sizes"
    )


def _printed(expression: Any) -> str:
    from torch.utils._sympy.printers import PythonPrinter

    return PythonPrinter().doprint(expression)
