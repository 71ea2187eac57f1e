"""Refuse what tracing would freeze or lose unseen.

Each guard compares the world before and after a trace, or listens during it, and raises a
`CaptureError` that says what the model did and what to do instead. Whatever the trace moved is put
back first.
"""

from __future__ import annotations

import collections
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from pbfx.errors import CaptureError

# Under such names fx keeps the constants that it meets while tracing.
CONSTANT = re.compile(r"_\w*_constant_?\d+")
_CONTAINERS = (dict, list, set, collections.deque)


def check_modules(module: nn.Module, name: str) -> None:
    """Refuse modules that are not what their class says they are.

    Raises:
        CaptureError: for TorchScript, lazy and compiled modules, and a forward replaced on the
            instance.
    """
    for path, child in module.named_modules():
        where = f"{path!r} in {name}" if path else name
        if isinstance(child, torch.jit.ScriptModule):
            raise CaptureError(
                f"cannot capture {where}: it is TorchScript, which hides its Python code; apply "
                "pbfx.transform to the model that it was made from"
            )
        if child._compiled_call_impl is not None or type(child).__name__ == "OptimizedModule":
            raise CaptureError(
                f"cannot capture {where}: it is compiled, and would go on to run the compiled "
                "code; apply pbfx.transform first, and compile the result"
            )
        tensors = [*child._parameters.values(), *child._buffers.values()]
        if any(torch.nn.parameter.is_lazy(tensor) for tensor in tensors):
            raise CaptureError(
                f"cannot capture {where}: {type(child).__name__} has no shape yet (a lazy module); "
                "run a batch through the model before pbfx.transform"
            )
    if "forward" in module.__dict__:
        raise CaptureError(
            f"cannot capture {name}: its forward was replaced on the instance, and tracing reads "
            "the class; apply pbfx.transform first, or define the new forward in a subclass"
        )


def check_hooks(module: nn.Module, path: str) -> None:
    """Refuse hooks on a module that is traced into: the graph would not call them again."""
    kinds = {
        "forward": (module._forward_hooks, module._forward_pre_hooks),
        "backward": (module._backward_hooks, module._backward_pre_hooks),
    }
    for kind, registries in kinds.items():
        if any(registries):
            raise CaptureError(
                f"cannot capture {path!r} ({type(module).__name__}): it has {kind} hooks, which "
                "tracing would run once and then forget; remove them before pbfx.transform, or "
                "register them on the layers inside"
            )


def modes() -> tuple[Any, ...]:
    """Return the settings of torch that a `with` block may change and a graph does not record."""
    return torch.is_grad_enabled(), *(
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        for device in ("cpu", "cuda")
    )


@contextmanager
def random_streams_kept(name: str) -> Iterator[None]:
    """Put the global random streams back, and refuse a forward that drew from them."""
    before = _streams()
    try:
        yield
    finally:
        after = _streams()
        torch.set_rng_state(before["torch"])
        random.setstate(before["random"])
        np.random.set_state(before["numpy"])
        if torch.cuda.is_initialized():
            torch.cuda.set_rng_state_all(before["cuda"])
    for library, stream in before.items():
        if not _equal(stream, after[library]):
            raise CaptureError(
                f"cannot capture {name}: forward draws random numbers (from {library}) that do not "
                "depend on its input, which the graph would repeat at every call; draw them like "
                "an input instead (torch.rand_like, x.new_empty)"
            )


def _streams() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


@contextmanager
def attributes_kept(clone: nn.Module, name: str) -> Iterator[None]:
    """Refuse a forward that writes to `self`, be it an attribute, a buffer, a list or a dict."""
    before = {path: _snapshot(module) for path, module in clone.named_modules()}
    try:
        yield
    finally:
        changed = _restore(clone, before)
    for path, key in changed:
        where = f"{name}.{path}".rstrip(".")
        raise CaptureError(
            f"cannot capture {where}: forward writes to self.{key}, which the graph would not do "
            "again; return the value instead, or keep it in a buffer that is updated in place "
            "(add_, copy_)"
        )


# An attribute, and its entries if it can change in place.
_Attribute = tuple[Any, dict[Any, Any] | None]


def _snapshot(module: nn.Module) -> dict[str, _Attribute]:
    return {
        key: (value, _entries(value) if isinstance(value, _CONTAINERS) else None)
        for key, value in module.__dict__.items()
    }


def _entries(value: Any) -> dict[Any, Any]:
    return dict(value) if isinstance(value, dict) else dict(enumerate(value))


def _restore(clone: nn.Module, before: dict[str, dict[str, _Attribute]]) -> list[tuple[str, str]]:
    """Put changed containers back, which the clone shares with the user's module.

    Returns:
        Path and name of everything that was written to.
    """
    written = []
    for path, module in clone.named_modules():
        known = before.get(path, {})
        for key, value in module.__dict__.items():
            old, entries = known.get(key, (None, None))
            if CONSTANT.fullmatch(key):
                continue
            if key not in known or old is not value:
                written.append((path, key))
            elif entries is not None:
                now = _entries(value)
                changed = [
                    entry
                    for entry in now | entries
                    if entry not in now or entry not in entries or now[entry] is not entries[entry]
                ]
                if changed:
                    # What a registry holds is an attribute to the user.
                    registry = key in ("_buffers", "_parameters", "_modules")
                    written.append((path, str(changed[0]) if registry else key))
                    _refill(value, entries)
    return written


def _refill(container: Any, entries: dict[Any, Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        container.update(entries)
    elif isinstance(container, set):
        container.update(entries.values())
    else:
        container.extend(entries.values())


@contextmanager
def functions_refused(name: str) -> Iterator[None]:
    """Refuse `autograd.Function`s: tracing goes into them, and their backward would be lost."""
    function = torch.autograd.Function
    original = function.__dict__["apply"]

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            return original.__get__(None, cls)(*args, **kwargs)
        raise CaptureError(
            f"cannot capture {name}: forward calls the autograd.Function {cls.__name__}, whose "
            "backward tracing would lose; write it as a torch.library.custom_op, which stays one "
            "node, or put it into a module outside of the part that you transform"
        )

    function.apply = classmethod(refuse)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        function.apply = original
