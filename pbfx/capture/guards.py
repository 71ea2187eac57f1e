"""Refuse what tracing would freeze or lose unseen.

Each guard compares the world before and after a trace, or listens during it, and raises a
`CaptureError` that says what the model did and what to do instead. Whatever the trace moved is put
back first.
"""

from __future__ import annotations

import collections
import operator
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.utils import _pytree as pytree

from pbfx.capture.clone import python_modules
from pbfx.errors import CaptureError

# Under such names fx keeps the constants that it meets while tracing.
CONSTANT = re.compile(r"_\w*_constant_?\d+")
# The very functions: a forward that asks them is refused below.
_is_grad_enabled, _is_autocast_enabled = torch.is_grad_enabled, torch.is_autocast_enabled
_CONTAINERS = (dict, list, set, collections.deque)


def check_modules(module: nn.Module, name: str) -> None:
    """Refuse models that hold what no clone can stand for.

    Raises:
        CaptureError: for a TorchScript model, for lazy and compiled modules anywhere, and for a
            forward replaced on the model itself.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError(
            f"cannot capture {name}: it is TorchScript, which hides its Python code; apply "
            "pbfx.transform to the model that it was made from"
        )
    for path, child in module.named_modules():
        where = f"{path!r} in {name}" if path else name
        if isinstance(child, torch.jit.ScriptModule):
            continue
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


def modes() -> tuple[Any, ...]:
    """Return the settings of torch that a `with` block may change and a graph does not record."""
    return _is_grad_enabled(), *(
        _is_autocast_enabled(device) and torch.get_autocast_dtype(device)
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
def attributes_kept(
    clone: nn.Module, name: str, besides: frozenset[str] = frozenset()
) -> Iterator[None]:
    """Refuse a forward that writes to `self`, be it an attribute, a buffer, a list or a dict.

    Args:
        clone: the model.
        name: what to call it.
        besides: paths of modules that may write to themselves; they are put back all the same.
    """
    modules = python_modules(clone)
    before = {path: _snapshot(module) for path, module in modules.items()}
    try:
        yield
    finally:
        changed = _restore(modules, before)
    for path, key in changed:
        if path in besides:
            continue
        where = f"{name}.{path}".rstrip(".")
        error = CaptureError(
            f"cannot capture {where}: forward writes to self.{key}, which the graph would not do "
            "again; return the value instead, or keep it in a buffer that is updated in place "
            "(add_, copy_)"
        )
        error.culprit = clone.get_submodule(path)
        raise error


_ABSENT = object()
# An attribute, and its entries if it can change in place.
_Attribute = tuple[Any, dict[Any, Any] | None]


def _snapshot(module: nn.Module) -> dict[str, _Attribute]:
    return {
        key: (value, _entries(value) if isinstance(value, _CONTAINERS) else None)
        for key, value in module.__dict__.items()
    }


def _entries(value: Any) -> dict[Any, Any]:
    return dict(value) if isinstance(value, dict) else dict(enumerate(value))


def _restore(
    modules: dict[str, nn.Module], before: dict[str, dict[str, _Attribute]]
) -> list[tuple[str, str]]:
    """Put back what was assigned or changed; containers are those of the user's module.

    Returns:
        Path and name of everything that was written to.
    """
    written: list[tuple[str, str]] = []
    replaced: list[tuple[nn.Module, str, Any]] = []
    for path, module in modules.items():
        known = before.get(path, {})
        for key, value in module.__dict__.items():
            old, entries = known.get(key, (_ABSENT, None))
            if CONSTANT.fullmatch(key):
                continue
            if key in known and old is not value and _is_copy(value, old):
                replaced.append((module, key, old))
                value = old
            if key not in known or old is not value:
                written.append((path, key))
                replaced.append((module, key, old))
                if entries is not None:
                    _refill(old, entries)
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
        for key in known.keys() - module.__dict__.keys():
            written.append((path, key))
            module.__dict__[key] = known[key][0]
    for module, key, old in replaced:
        if old is _ABSENT:
            del module.__dict__[key]
        else:
            module.__dict__[key] = old
    return written


def _is_copy(value: Any, old: Any) -> bool:
    """Return whether `value` is a container of its own over the very entries of `old`.

    torch.export leaves such copies behind.
    """
    if type(value) is not type(old) or not isinstance(old, (dict, list, tuple)):
        return False
    leaves, structure = pytree.tree_flatten(value)
    before, expected = pytree.tree_flatten(old)
    return structure == expected and all(map(operator.is_, leaves, before))


def _refill(container: Any, entries: dict[Any, Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        container.update(entries)
    elif isinstance(container, set):
        container.update(entries.values())
    else:
        container.extend(entries.values())


def _is_proxy(value: Any) -> bool:
    return isinstance(value, fx.Proxy)


@contextmanager
def functions_refused(name: str, traced: Callable[[Any], bool] = _is_proxy) -> Iterator[None]:
    """Refuse `autograd.Function`s: tracing goes into them, and their backward would be lost.

    Args:
        name: of the model.
        traced: whether an argument of theirs stands for a value that depends on the input.
    """
    function = torch.autograd.Function
    original = function.__dict__["apply"]

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not any(map(traced, (*args, *kwargs.values()))):
            return original.__get__(None, cls)(*args, **kwargs)
        if cls.__module__ == torch.utils.checkpoint.__name__:
            # Up to torch 2.11 it calls a function of its own before it sets its hooks.
            raise _checkpointed(name)
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


@contextmanager
def contexts_refused(name: str) -> Iterator[None]:
    """Refuse activation checkpointing, and other hooks on saved tensors that a graph would drop."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    original = hooks.__enter__

    def refuse(self: Any) -> Any:
        raise _checkpointed(name)

    hooks.__enter__ = refuse
    try:
        yield
    finally:
        hooks.__enter__ = original


def _checkpointed(name: str) -> CaptureError:
    return CaptureError(
        f"cannot capture {name}: forward computes inside torch.utils.checkpoint (or another "
        "hook on saved tensors), which the graph would not enter again"
    )


# What a forward may ask of its surroundings, and a graph would answer once and for all.
_MODES = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")
_BULK = ("parameters", "named_parameters", "buffers", "named_buffers")


@contextmanager
def questions_refused(name: str, bulk: bool = True) -> Iterator[None]:
    """Refuse a forward that asks for torch's modes, or if `bulk`, reads its parameters in bulk."""
    faults: dict[tuple[Any, str], str] = {
        (torch, key): f"asks torch.{key}(), and a graph has only one of the answers"
        for key in _MODES
    } | {
        (nn.Module, key): f"computes with tensors that it reads in bulk (self.{key}()), which the "
        "graph would hold on to as they are now; read them as attributes (self.weight)"
        for key in (_BULK if bulk else ())
    }
    originals = {(owner, key): getattr(owner, key) for owner, key in faults}

    def guarded(original: Any, fault: str) -> Any:
        def ask(*args: Any, **kwargs: Any) -> Any:
            asker = sys._getframe(1).f_globals.get("__name__", "")
            # Not the model's: torch itself, and the dendrites inside a part that is called.
            if asker.partition(".")[0] in ("torch", "pbfx", "pbfx_kernels"):
                return original(*args, **kwargs)
            raise CaptureError(f"cannot capture {name}: forward {fault}")

        return ask

    for (owner, key), original in originals.items():
        setattr(owner, key, guarded(original, faults[owner, key]))
    try:
        yield
    finally:
        for (owner, key), original in originals.items():
            setattr(owner, key, original)
