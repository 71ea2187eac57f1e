"""Run the reference where a kernel turns out not to launch: once found, warned once, remembered.

The choice of a strategy is a pure function and cannot know everything of a GPU: its shared memory
may be smaller than what a configuration asks for, its compiler may refuse the code. Such failures
are Triton's own errors, raised before anything is written. Every other error is a bug, or a device
that is lost, and is passed on.
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

from pbfx_kernels.problem import Problem

T = TypeVar("T")

# Problems whose kernel has failed, whatever the number of positions.
_refused: set[Problem] = set()


def or_reference(problem: Problem, kernel: Callable[[], T], plain: Callable[[], T]) -> T:
    """Return what `kernel` gives, or `plain` if the kernel cannot be launched for this problem.

    Warns:
        RuntimeWarning: the first time that a kernel fails for a site like this one.
    """
    if _refused and _like(problem) in _refused:
        return plain()
    try:
        return kernel()
    except Exception as error:
        if not _is_tritons(error):
            raise
        _refused.add(_like(problem))
        warnings.warn(
            f"pbfx: a kernel for a site with N={problem.neurons}, K={problem.inputs}, "
            f"D={problem.dendrites} in {problem.dtype} cannot be launched "
            f"({type(error).__name__}: {error}); such sites run the reference, in plain torch",
            RuntimeWarning,
            stacklevel=3,
        )
        return plain()


def _like(problem: Problem) -> Problem:
    """Return what stands for a site with any number of positions."""
    return dataclasses.replace(problem, positions=0)


def _is_tritons(error: Exception) -> bool:
    # Whoever launched a kernel has imported it.
    errors = sys.modules.get("triton.errors")
    return errors is not None and isinstance(error, errors.TritonError)
