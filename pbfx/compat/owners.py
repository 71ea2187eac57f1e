"""Which tracker belongs to which model, and which one scripts mean by *the* tracker.

Those scripts know one tracker, that of the model which was perforated last. Here every model owns
its own, so a second model does not break the first: what names a model finds that model's tracker.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from pbfx import TrackerError

_KEY = "_pbfx_compat"
# What scripts mean by *the* tracker.
_latest: list[Any] = []
# Plain models that were perforated: passing one on is an easy mistake.
_originals: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Owned:
    """Hold the tracker of a model, among the model's attributes; a copy of the model has none."""

    def __init__(self, tracker: Any = None) -> None:
        self.tracker = tracker

    def __reduce__(self) -> tuple[type[_Owned], tuple[()]]:
        return _Owned, ()


def give(model: nn.Module, tracker: Any, original: nn.Module) -> None:
    """Make `tracker` that of `model`, and the one that scripts mean."""
    # Around the model's own __setattr__, to which an assignment means a change of its structure.
    vars(model)[_KEY] = _Owned(tracker)
    _latest[:] = [tracker]
    if original is not model:
        _originals.add(original)


def latest() -> Any:
    """Return the tracker of the model that was perforated last.

    Raises:
        TrackerError: if there was none.
    """
    if not _latest:
        raise TrackerError(
            "pbfx.compat: there is no tracker before there is a model; call perforate_model "
            "(initializePB) first"
        )
    return _latest[0]


def latest_or_none() -> Any:
    """Return the tracker of the model that was perforated last, or None."""
    return _latest[0] if _latest else None


def tracker_of(net: Any) -> Any:
    """Return the tracker of `net`, a perforated model or a wrapper around one.

    Raises:
        TrackerError: if it has none.
    """
    if not isinstance(net, nn.Module):
        raise TrackerError(f"pbfx.compat: the model must be an nn.Module, got {net!r}")
    for module in _inside(net):
        owned = vars(module).get(_KEY)
        if owned is not None and owned.tracker is not None:
            return owned.tracker
    if any(module in _originals for module in _inside(net)):
        raise TrackerError(
            f"pbfx.compat: this {type(net).__name__} is the plain model; go on with the one that "
            "perforate_model (initializePB) returned: model = perforate_model(model)"
        )
    raise TrackerError(
        f"pbfx.compat: this {type(net).__name__} was not perforated, or is a copy; pass the model "
        "that perforate_model (initializePB) returned, or a wrapper around it"
    )


def _inside(net: nn.Module) -> Iterator[nn.Module]:
    yield net
    for name in ("_orig_mod", "module"):
        inner = getattr(net, name, None)
        if isinstance(inner, nn.Module):
            yield from _inside(inner)
    yield from net.modules()
