"""Lower graphs in forked processes, so that this one finds what they made in Inductor's caches.

    this process    trace  fork ----- lower graph 0 ----- load 1, 2, ...   wait for kernels
    scout 1                 |  lower graph 1  -> cache
    scout 2                 |  lower graph 2  -> cache

Lowering and code generation are Python, so threads would take turns. A scout does what this process
would do, writes the caches on disk, and is gone; whatever fails there is done here instead, so that
scouts can save time and change nothing else. They write no machine code: kernels are for Inductor's
workers, which share them among all graphs.

Processes that are forked after CUDA was initialised cannot use it. Lowering needs no more of it
than what the device is, which a scout remembers; what does measure on the device, such as
`max_autotune`, is not for scouts.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Seconds after which a scout is taken for stuck: a lock that another thread held as it was forked.
_PATIENCE = 120.0
# Whatever asks the device while it lowers.
_MEASURE = (
    "max_autotune",
    "max_autotune_gemm",
    "max_autotune_pointwise",
    "coordinate_descent_tuning",
)


def send_scouts(jobs: Sequence[Callable[[], object]], options: dict[str, Any]) -> list[int]:
    """Run each of `jobs` but the first, which is this process's own, in a process of its own.

    Args:
        jobs: independent of each other, the longest first; each compiles a graph.
        options: of Inductor, that they compile with beside its configuration.

    Returns:
        The processes, for `await_scouts`; none where they could not help.
    """
    count = min(len(jobs) - 1, _workers(options))
    if count < 1:
        return []
    known = _device_facts()
    scouts: list[int] = []
    for index in range(count):
        with warnings.catch_warnings():
            # Python's, about threads that hold locks; torch's data loaders fork as well.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _scout(jobs[1 + index :: count], known)
        scouts.append(pid)
    return scouts


def await_scouts(scouts: Sequence[int]) -> None:
    """Wait until all have come back; those that are stuck are ended."""
    deadline = time.monotonic() + _PATIENCE
    waiting = list(scouts)
    while waiting:
        for pid in list(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                waiting.remove(pid)
                if status:
                    logger.info("scout %d has failed: its graphs are lowered here", pid)
        if waiting and time.monotonic() > deadline:
            for pid in waiting:
                os.kill(pid, signal.SIGKILL)
            deadline += _PATIENCE
        if waiting:
            time.sleep(0.005)


def _workers(options: dict[str, Any]) -> int:
    """Return how many scouts may run at once, none where no cache would bring their work back."""
    from torch._inductor import config
    from torch._inductor.async_compile import get_compile_threads

    def wanted(name: str) -> Any:
        return options.get(name, getattr(config, name, None))

    cached = wanted("fx_graph_cache") and not wanted("force_disable_caches")
    if not cached or any(map(wanted, _MEASURE)) or not sys.platform.startswith("linux"):
        return 0
    return get_compile_threads() - 1


def _device_facts() -> dict[str, Any]:
    """Return what a scout may be asked about CUDA, which it cannot ask itself."""
    if not torch.cuda.is_initialized():
        return {}
    for device in range(torch.cuda.device_count()):
        # torch keeps what it has asked for once.
        torch.cuda.get_device_properties(device)
    return {
        "current_device": torch.cuda.current_device(),
        "device_count": torch.cuda.device_count(),
        "mem_get_info": torch.cuda.mem_get_info(),
        # Tracing sets the generator's state back, which a scout never draws from.
        "get_rng_state": torch.zeros(16, dtype=torch.uint8, device="cpu"),
        "set_rng_state": None,
        "is_available": True,
        "_is_in_bad_fork": False,
    }


def _scout(jobs: Sequence[Callable[[], object]], known: dict[str, Any]) -> None:
    """Do `jobs` and exit, without a word to this process's files, threads and handlers."""
    failed = 1
    try:
        # A pool of threads does not survive a fork.
        torch.set_num_threads(1)
        _remember(known)
        _leave_kernels_out()
        for job in jobs:
            job()
        failed = 0
    except BaseException as error:
        logger.debug("a scout has failed", exc_info=error)
    finally:
        os._exit(failed)


def _remember(known: dict[str, Any]) -> None:
    """Answer questions about CUDA from what `_device_facts` has found."""
    if not known:
        return
    import torch._subclasses.fake_tensor as fake

    for name, value in known.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    native: Any = torch._C
    native._cuda_getDevice = torch.cuda.current_device
    native._cuda_getDeviceCount = torch.cuda.device_count
    # It makes a tensor on the device, for the sake of a backward that runs.
    fake.init_gpu_context = lambda *_: None


def _leave_kernels_out() -> None:
    """Let Inductor write code without loading it, and without compiling the kernels in it."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache

    inductor: Any = AsyncCompile
    inductor.use_process_pool = classmethod(lambda cls: False)

    def load(cls: Any, key: str, path: str, *_: Any, **__: Any) -> types.ModuleType:
        module = types.ModuleType(f"scouted_{key}")
        module.__dict__.update(__file__=path, key=key, call=_never, runner=None)
        return module

    code: Any = PyCodeCache
    code.load_by_key_path = classmethod(load)


def _never(*_: Any) -> None:
    raise AssertionError("a scout compiles, and does not run what it has compiled")
