"""torch.compile for benchmarks: counted, uncached, and never silently eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

# Every provider is another module behind the same lines of code, in two modes.
_RECOMPILE_LIMIT = 64


@contextmanager
def compiler(wanted: bool) -> Iterator[Callable[..., Callable] | None]:
    """Give the body a `torch.compile` that counts, or None if not `wanted`."""
    if not wanted:
        yield None
        return
    with counting("inductor") as (compile_, _):
        yield compile_


@contextmanager
def counting(
    backend: str | Callable[..., Callable],
) -> Iterator[tuple[Callable[..., Callable], Callable[[], int]]]:
    """Give the body a compile function, and one that returns how many graphs it has compiled.

    Caches on disk are off, so that a first call is a first call, and past the limit of
    recompilations torch raises instead of running eagerly.
    """
    import torch._dynamo.testing

    # It takes whatever `torch.compile` does; its annotation says less.
    named: Any = backend
    counter = torch._dynamo.testing.CompileCounterWithBackend(named)
    with strict(cached=False):
        yield (
            lambda module: torch.compile(module, backend=counter, fullgraph=True),
            lambda: counter.frame_count,
        )


@contextmanager
def strict(cached: bool) -> Iterator[None]:
    """Compile from nothing in the body, and raise where torch would go on eagerly.

    Args:
        cached: whether what a run before this one compiled may be used.
    """
    import torch._dynamo.config
    import torch._inductor.config

    torch.compiler.reset()
    with ExitStack() as stack:
        stack.enter_context(
            torch._dynamo.config.patch(
                recompile_limit=_RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True
            )
        )
        if not cached:
            stack.enter_context(torch._inductor.config.patch(force_disable_caches=True))
        stack.enter_context(warnings.catch_warnings())
        # Inductor's advice to use TF32: the dtype is the user's choice here.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        # What torch says of profiles when its caches are off.
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        try:
            yield
        finally:
            torch.compiler.reset()
