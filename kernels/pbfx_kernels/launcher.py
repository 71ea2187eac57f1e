"""Triton's launcher without what it does alike for every launch of a kernel: that is done once.

    run(gx, gy, gz, stream, function, metadata, None, None, None, out, boxes, 64, ...)
    launch(gx, gy, gz, stream, function, 0, 0, None, None, metadata, None, None, None,
           out, described(p), 64, 1, 64, ...)

Between the two lie, in Python, a look at the scratch memory that a kernel asks for, a walk over
its arguments for boxes, and for each box the driver's description of it, which is encoded anew.
The description says an address and what never changes, and an allocator returns to the addresses
of the step before. So it is remembered by address.

What lies between is no interface of Triton's. Of versions that are not listed here, launches go
through its launcher.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Versions whose launcher was read, and is tested on GPUs.
_KNOWN = ((3, 6),)
# Addresses of a box that are remembered: those of a step, and of the steps around it.
_MOST_ADDRESSES = 64

Placing = Callable[[int], Any]
Describe = Callable[[int], object]


class Straight(NamedTuple):
    """The end of a launcher.

    Attributes:
        launch: of grid, stream and function, `settings`, the kernel's metadata, three Nones for
            hooks, and arguments, with boxes taken apart.
        settings: what it is given between function and metadata.
        boxes: how the kernel reads each of the boxes among its arguments, in order.
    """

    launch: Callable[..., object]
    settings: tuple[object, ...]
    boxes: tuple[Any, ...]


def straight(run: Any) -> Straight | None:
    """Return the end of Triton's launcher, or None where it is not known.

    Args:
        run: of a compiled kernel.
    """
    if type(run).__module__ != "triton.backends.nvidia.driver" or not _is_known():
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    launch, boxes = run.launch, ()
    # Of a kernel that reads boxes, it is a function around the end.
    if inspect.isfunction(launch):
        around = inspect.getclosurevars(launch).nonlocals
        if not around.keys() >= {"launcher", "tensordesc_meta"}:
            return None
        launch, boxes = around["launcher"], tuple(around["tensordesc_meta"])
    return Straight(launch, (run.launch_cooperative_grid, run.launch_pdl, None, None), boxes)


@functools.cache
def _is_known() -> bool:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) in _KNOWN


def apart(how: Any, placing: Placing, address: int) -> tuple[Describe | None, Sequence[object]]:
    """Take boxes apart, as the end of a launcher is given them.

    Args:
        how: one of `Straight.boxes`.
        placing: makes boxes at an address.
        address: where they lie now.

    Returns:
        describe: what comes first, by address; None for the address itself.
        rest: what comes then, wherever they lie.
    """
    from triton.backends.nvidia.driver import make_tensordesc_arg

    rest = make_tensordesc_arg(placing(address), how)[1:]
    if how is None:
        return None, rest

    @functools.lru_cache(_MOST_ADDRESSES)
    def describe(address: int) -> object:
        return make_tensordesc_arg(placing(address), how)[0]

    return describe, rest
