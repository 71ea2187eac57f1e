"""Let Inductor's workers compile kernels while the next graph is being worked on.

    one graph after another     trace  lower  wait | trace  lower  wait | ...
    overlapping                 trace  lower | trace  lower | ...  wait for all

Inductor hands the kernels of a graph to its workers and waits for them before it goes on, and
compiles a backward when the first error comes. A graph that is cut into regions would wait once for
each of them, longest kernel by longest kernel, while most workers are idle. Nothing of a graph
runs before all of it has been compiled, so all can be waited for at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def overlapping() -> Iterator[None]:
    """Compile forwards and backwards in the body, and wait for their kernels when it is over.

    Raises:
        Whatever the body raises, or the first of the kernels that cannot be compiled.
    """
    import torch._functorch.config as autograd
    from torch._inductor.async_compile import AsyncCompile

    waiting: list[tuple[Any, dict[str, Any]]] = []
    wait = AsyncCompile.wait

    def later(self: Any, scope: dict[str, Any]) -> None:
        waiting.append((self, scope))

    AsyncCompile.wait = later
    try:
        with autograd.patch(force_non_lazy_backward_lowering=True):
            yield
    finally:
        AsyncCompile.wait = wait
        # Whatever has failed: what was compiled before stays in Inductor's caches.
        _finish(waiting, wait)


def _finish(waiting: list[tuple[Any, dict[str, Any]]], wait: Callable[..., None]) -> None:
    """Wait for the kernels of all modules, and forget those whose kernels fail."""
    from torch._inductor.codecache import PyCodeCache

    faults: list[BaseException] = []
    for kernels, scope in waiting:
        try:
            wait(kernels, scope)
        # A worker that has died, Ctrl-C: the others are waited for, then it is raised.
        except BaseException as error:
            faults.append(error)
            loaded = PyCodeCache.modules_no_attr
            for path in [path for path, module in loaded.items() if vars(module) is scope]:
                del loaded[path]
    if faults:
        raise faults[0]
