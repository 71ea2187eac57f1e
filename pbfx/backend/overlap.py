"""Let Inductor's workers compile kernels while the next graph is being worked on.

    one graph after another     trace  lower  wait | trace  lower  wait | ...
    overlapping                 trace  lower | trace  lower | ...  wait for all

Inductor hands the kernels of a graph to its workers and waits for them before it goes on, and
compiles a backward when the first error comes. A graph that is cut into regions would wait once for
each of them, longest kernel by longest kernel, while most workers are idle. Nothing of a graph
runs before all of it has been compiled, so all can be waited for at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def overlapping() -> Iterator[None]:
    """Compile forwards and backwards in the body, and wait for their kernels when it is over.

    Where Inductor does not wait as expected, it waits as ever.
    """
    import torch._functorch.config as autograd
    from torch._inductor.async_compile import AsyncCompile

    waiting: list[tuple[Any, dict[str, Any]]] = []
    wait = AsyncCompile.wait

    def later(self: Any, scope: dict[str, Any]) -> None:
        waiting.append((self, scope))

    with autograd.patch(force_non_lazy_backward_lowering=True):
        AsyncCompile.wait = later
        try:
            yield
        finally:
            AsyncCompile.wait = wait
    for kernels, scope in waiting:
        wait(kernels, scope)
