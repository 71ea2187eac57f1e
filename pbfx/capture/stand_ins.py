"""Stand-ins for a forward's inputs that refuse questions which a graph cannot ask again.

A plain `Proxy` answers `isinstance(x, torch.Tensor)` with False and `hasattr(x, "logits")` with
True, whatever the real value will be, and the answer becomes part of the graph without a word. A
`StandIn` raises instead. It tells a question from a use by who asks: Python looks up `__class__`
for `isinstance`, and calls `__getattr__` from a call instruction for `hasattr`.
"""

from __future__ import annotations

import dis
import linecache
import sys
from bisect import bisect_right
from types import CodeType, FrameType

import torch
from torch.fx.proxy import Attribute, Proxy

from pbfx.errors import CaptureError

# Between a user's isinstance and the look-up of __class__ may stand the classes that implement it.
_BETWEEN = frozenset({"abc", "_py_abc", "typing", "typing_extensions"})
_TENSOR_ATTRIBUTES = frozenset(dir(torch.Tensor))


class StandIn(Proxy):
    """What tracing gives to `forward` in place of a value that depends on its input."""

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Answer torch's own questions; refuse the model's."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") in _BETWEEN:
            frame = frame.f_back
        if frame.f_code is torch.is_tensor.__code__ and frame.f_back is not None:
            frame = frame.f_back
        elif frame.f_globals.get("__name__", "").partition(".")[0] == "torch" or not _asks(frame):
            return type(self)
        raise CaptureError(
            f"forward asks for the type of {self.node.name!r}, which depends on its input, in "
            f"{_place(frame)}"
        )

    def __getattr__(self, name: str) -> Attribute:
        """Return an attribute to be read at run time; refuse `hasattr` and its like."""
        frame = sys._getframe(1)
        asker = frame.f_globals.get("__name__", "")
        if (
            name not in _TENSOR_ATTRIBUTES
            and asker.partition(".")[0] != "torch"
            and not _instruction(frame).startswith("LOAD_")
        ):
            raise CaptureError(
                f"forward asks whether {self.node.name!r} has an attribute {name!r}, which depends "
                f"on its input, in {_place(frame)}"
            )
        return StandInAttribute(self, name)


class StandInAttribute(StandIn, Attribute):
    """An attribute of a stand-in: a value of its own, or a method about to be called."""


def asks_for_none(code: CodeType) -> bool:
    """Return whether `code` compares anything with None by identity, be it as `is` or a jump."""
    return any(
        i.opname == "IS_OP" or ("JUMP" in i.opname and "NONE" in i.opname)
        for i in dis.get_instructions(code)
    )


def _asks(frame: FrameType) -> bool:
    """Return whether the code of `frame` is asking for a type; else a C function of torch's is."""
    instruction = _instruction(frame)
    if "CALL" not in instruction:
        return True
    # Of a call, the source says whether it is isinstance; without source, whether it may be.
    line, _, column, _ = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    source = linecache.getline(frame.f_code.co_filename, line or 0).encode()
    if not source or column is None:
        return "isinstance" in frame.f_code.co_names
    return source[column:].startswith((b"isinstance", b"issubclass"))


def _instruction(frame: FrameType) -> str:
    """Return the name of the instruction that `frame` is at."""
    instructions = list(dis.get_instructions(frame.f_code))
    at = bisect_right(instructions, frame.f_lasti, key=lambda i: i.offset) - 1
    return instructions[at].opname


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_qualname} (line {frame.f_lineno})"
