"""Play a call again as what it came to: allocations, calls of torch, and launches, in a row.

What the body of an op decides, it decides by the form of its tensors. So the second call of a form
is recorded, and every later one runs a straight line of Python that was written from the record:
the same memory is asked for, the same kernels are launched with new pointers, and nothing is
decided, checked or looked up any more.

    a = empty_strided((4096, 64), (64, 1), ...)
    launch_0(p_0, p_3, a.data_ptr(), ...)
    return a

The record is complete because it is made below the body: a dispatch mode sees every op of torch,
and every kernel of this package is launched by `relaunch`, which tells the recorder. Views are not
played again; they are where pointers come from. A call that cannot be told so is never recorded:
a tensor of another device than the current one, two tensors in one memory, a pointer that is not
aligned, a launch that Triton's interpreter runs, or `measure`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pbfx_kernels import measured

# Tapes of one body; past this many they are recorded again.
_MOST_TAPES = 4096
# What kernels take for granted of pointers.
_ALIGNMENT = 16
_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}

Body = Callable[..., Any]


class _Thread(threading.local):
    """Who records the launches of this thread."""

    recorder: _Recorder | None = None


_here = _Thread()


class Taped:
    """A body of an op that is played from a tape where there is one.

    Args:
        body: from tensors and hashable arguments to a tensor or a tuple of new tensors; what it
            does is settled by the form of the tensors, the other arguments, and `measure`.
        devices: types of the devices on which calls are recorded.
    """

    __slots__ = ("_body", "_devices", "_tapes")

    def __init__(self, body: Body, devices: Sequence[str] = ("cuda",)) -> None:
        self._body, self._devices = body, devices
        # None where a form was seen, False where it cannot be recorded.
        self._tapes: dict[Any, Body | bool | None] = {}

    def __call__(self, tensors: Sequence[Tensor | None], *rest: Any) -> Any:
        """Return `body(*tensors, *rest)`."""
        first = tensors[0]
        assert first is not None
        device = first.device
        told = device.type in self._devices and _is_current(device)
        # A body within a body is part of the other's tape.
        if not told or _here.recorder is not None or measured.active():
            return self._body(*tensors, *rest)
        key = (
            *(None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors),
            device,
            *rest,
        )
        tape = self._tapes.get(key, True)
        if tape is True:
            # What is compiled, found out or cached at a first call is no part of the tape.
            found = self._body(*tensors, *rest)
            if len(self._tapes) >= _MOST_TAPES:
                self._tapes.clear()
            self._tapes[key] = None
            return found
        if tape is None:
            return self._record(key, tensors, rest)
        found = tape(*tensors) if tape else None
        return self._body(*tensors, *rest) if found is None else found

    def _record(self, key: Any, tensors: Sequence[Tensor | None], rest: Sequence[Any]) -> Any:
        recorder = _Recorder(tensors)
        _here.recorder = recorder
        try:
            with recorder:
                found = self._body(*tensors, *rest)
        finally:
            _here.recorder = None
        self._tapes[key] = recorder.tape(found) or False
        return found


def float32_precision(tensor: Tensor) -> object:
    """Return what products of float32 may round their factors to, where that makes a difference."""
    if tensor.dtype is not torch.float32:
        return None
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def launched(compiled: Any, grid: Sequence[int], arguments: Sequence[Any]) -> None:
    """Tell whoever records of a launch.

    Args:
        compiled: the kernel, or None where there is none to launch again.
        grid: of programs.
        arguments: of its launcher: `Pointer`s, boxes at pointers, numbers and constants.
    """
    if _here.recorder is not None:
        _here.recorder.launched(compiled, grid, arguments)


def recording() -> bool:
    """Return whether anybody wants to know of launches."""
    return _here.recorder is not None


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or device.index == torch._C._cuda_getDevice()


class Pointer(int):
    """An address among the arguments of a launch; every other number stays as it is."""


class _Recorder(TorchDispatchMode):
    """Writes down what a body does with its tensors.

    Args:
        tensors: the arguments of the body.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        assert tensors[0] is not None
        self._count, self._device = len(tensors), tensors[0].get_device()
        # Everything that was seen is kept alive, so that no memory stands for two tensors.
        self._slots: list[Tensor | None] = list(tensors)
        self._slot_of: dict[int, int] = {}
        self._lines: list[str] = []
        self._names: dict[str, Any] = {"as_strided": torch.as_strided}
        self._guarded: set[int] = set()
        self._fits, self._calls = True, False
        for slot, tensor in enumerate(tensors):
            if tensor is not None:
                self._fits &= self._slot_of.setdefault(_memory(tensor), slot) == slot

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an op, and note it unless it only looks at memory from another side."""
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        outs = [out for out in tree_flatten(found)[0] if isinstance(out, Tensor)]
        new = [out for out in outs if _memory(out) not in self._slot_of]
        # Results that share new memory, such as chunks of a copy, have no names of their own.
        self._fits &= len({_memory(out) for out in new}) == len(new)
        if func in _ALLOCATIONS and new:
            (out,) = outs
            self._lines.append(self._allocation(self._take(out), out))
        elif new or func._schema.is_mutable:
            self._call(func, args, kwargs, found, new)
        return found

    def _call(self, func: Any, args: Any, kwargs: Any, found: Any, new: list[Tensor]) -> None:
        self._calls = True
        words = [self._said(arg) for arg in args]
        words += [f"{name}={self._said(arg)}" for name, arg in kwargs.items()]
        call = f"{self._name(func)}({', '.join(words)})"
        results = list(found) if isinstance(found, (tuple, list)) else [found]
        named = [
            f"t{self._take(each)}" if any(each is out for out in new) else "_" for each in results
        ]
        # Whatever lies deeper has no name.
        self._fits &= len(named) - named.count("_") == len(new)
        taken = ", ".join(named) + "," * isinstance(found, (tuple, list))
        self._lines.append(f"{taken} = {call}" if new else call)

    def _said(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self._told(value)
        if isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) for each in value):
            return f"[{', '.join(map(self._said, value))}]"
        return self._name(value)

    def _allocation(self, slot: int, out: Tensor) -> str:
        self._names["empty_strided"] = torch.empty_strided
        dtype, device = self._name(out.dtype), self._name(out.device)
        form = f"{tuple(out.shape)}, {out.stride()}, dtype={dtype}, device={device}"
        return f"t{slot} = empty_strided({form})"

    def launched(self, compiled: Any, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        """Note a launch; see the function of that name."""
        if compiled is None:
            self._fits = False
            return
        run, function, packed = map(
            self._name, (compiled.run, compiled.function, compiled.packed_metadata)
        )
        words = []
        for argument in arguments:
            if type(argument) is Pointer:
                words.append(self._address(argument))
            elif hasattr(argument, "placing"):
                address = self._address(argument.base.data_ptr())
                words.append(f"{self._name(argument.placing())}({address})")
            else:
                words.append(repr(argument) if type(argument) is int else self._name(argument))
        stream = f"{self._name(torch._C._cuda_getCurrentRawStream)}({self._device})"
        given = ", ".join((*map(str, grid), stream, function, packed, "None, None, None", *words))
        self._lines.append(f"{run}({given})")

    def tape(self, found: Any) -> Body | None:
        """Return the record as a function of the tensors, or None where it is none."""
        outs = found if isinstance(found, tuple) else (found,)
        told = [self._output(out) for out in outs]
        if not self._fits:
            return None
        lines = [f"p{slot} = t{slot}.data_ptr()" for slot in sorted(self._guarded)]
        if self._guarded:
            bits = " | ".join(f"p{slot}" for slot in sorted(self._guarded))
            lines.append(f"if ({bits}) % {_ALIGNMENT}: return None")
        body = [*self._lines, f"return {', '.join(told)}{',' * isinstance(found, tuple)}"]
        body = _freed(body, range(self._count, len(self._slots)))
        if self._calls:
            # The record was made below autocast.
            lines.append(f"with {self._name(torch._C._DisableAutocast)}():")
            body = [f"    {line}" for line in body]
        source = f"def play({', '.join(f't{slot}' for slot in range(self._count))}):\n"
        source += "".join(f"    {line}\n" for line in (*lines, *body))
        exec(source, self._names)
        return self._names["play"]

    def _output(self, out: Tensor | None) -> str:
        if out is None:
            return "None"
        slot = self._slot_of.get(_memory(out), -1)
        if slot < self._count:
            # An argument, or memory that nobody has told of.
            self._fits = False
        return self._told(out)

    def _take(self, tensor: Tensor) -> int:
        slot = len(self._slots)
        self._slots.append(tensor)
        self._slot_of[_memory(tensor)] = slot
        return slot

    def _told(self, tensor: Tensor) -> str:
        """Return how a tape speaks of a tensor: by its slot, or as a view of that."""
        slot = self._slot_of.get(_memory(tensor))
        base = None if slot is None else self._slots[slot]
        if base is None or base.dtype is not tensor.dtype:
            self._fits = False
            return ""
        first = tensor.storage_offset() - base.storage_offset()
        if not first and (tensor.shape, tensor.stride()) == (base.shape, base.stride()):
            return f"t{slot}"
        place = f"t{slot}.storage_offset() + {first}"
        return f"as_strided(t{slot}, {tuple(tensor.shape)}, {tensor.stride()}, {place})"

    def _address(self, address: int) -> str:
        if not address:
            # Of a tensor without elements.
            return "0"
        for slot, tensor in enumerate(self._slots):
            if tensor is None or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            if start <= address < start + storage.nbytes():
                if slot < self._count:
                    self._guarded.add(slot)
                    self._fits &= not tensor.data_ptr() % _ALIGNMENT
                base = f"p{slot}" if slot < self._count else f"t{slot}.data_ptr()"
                offset = address - tensor.data_ptr()
                return f"{base} + {offset}" if offset else base
        self._fits = False
        return "0"

    def _name(self, value: Any) -> str:
        name = f"v{len(self._names)}"
        self._names[name] = value
        return name


def _freed(lines: Sequence[str], slots: Sequence[int]) -> list[str]:
    """Let go of memory where it was used last, and do not ask for what nobody uses."""
    used = [set(re.findall(r"\bt\d+\b", line)) for line in lines]
    kept = list(lines)
    for slot in slots:
        name = f"t{slot}"
        uses = [index for index, names in enumerate(used) if name in names]
        first, last = uses[0], uses[-1]
        if first == last and "empty_strided" in lines[first]:
            kept[first] = ""
        elif last < len(lines) - 1:
            kept[last] += f"; del {name}"
    return [line for line in kept if line]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
