"""Play a call again as what it came to: allocations, calls of torch, and launches, in a row.

What the body of an op decides, it decides by the form of its tensors. So the second call of a form
is recorded, and every later one runs a straight line of Python that is written from the record: the
same memory is asked for, the same kernels are launched with new pointers, and nothing is decided,
checked or looked up any more.

    p0 = t0.data_ptr()
    p1 = t1.data_ptr()
    if (p0 | p1) % 16: return None
    s = stream(0)
    t2 = empty((4096, 64), (64, 1), bfloat16)
    launch(128, 1, 1, s, function, ..., t2.data_ptr(), p0, p1, 4096, 64)
    return t2

The record is complete because it is made below the body: a dispatch mode sees every op of torch,
and whoever launches a kernel of this package, `relaunch`, tells the recorder. Views are not played
again; they are where pointers come from. What cannot be told so is never played: a call on another
device than the current one, pointers that are not aligned, memory that nobody has told of, launches
that Triton's interpreter runs, and everything inside of `measure`. The logger of this module says
at level DEBUG which bodies are played from now on, and why others are not.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pbfx_kernels import launcher, measured

_LOG = logging.getLogger(__name__)
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
# What compiled graphs ask for memory, and for views of it: a third of what the dispatcher costs.
# Memory of a GPU is that of the current one.
_guards: Any = torch._C._dynamo.guards  # pyright: ignore[reportAttributeAccessIssue]
_EMPTY = {"cuda": _guards._empty_strided_cuda, "cpu": _guards._empty_strided_cpu}
_PART = _guards._reinterpret_tensor

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
        # A body within a body is part of the other's tape.
        told = device.type in self._devices and _is_current(device) and _here.recorder is None
        if not told or measured.inside():
            return self._body(*tensors, *rest)
        form: list[Any] = [device]
        for tensor in tensors:
            form += (None,) if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)
        key = (*form, *rest)
        tape = self._tapes.get(key, True)
        # The environment is for a whole process, and takes as long to read as a launch.
        if (tape is True or tape is None) and measured.active():
            return self._body(*tensors, *rest)
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

    @property
    def name(self) -> str:
        """The body's, with its module."""
        module = getattr(self._body, "__module__", "").removeprefix("pbfx_kernels.")
        return f"{module}.{getattr(self._body, '__qualname__', 'body')}"

    def _record(self, key: Any, tensors: Sequence[Tensor | None], rest: Sequence[Any]) -> Any:
        recorder = _Recorder(tensors)
        _here.recorder = recorder
        try:
            with recorder:
                found = self._body(*tensors, *rest)
        finally:
            _here.recorder = None
        tape = self._tapes[key] = recorder.tape(found) or False
        if _LOG.isEnabledFor(logging.DEBUG):
            form = ", ".join("None" if t is None else str(tuple(t.shape)) for t in tensors)
            says = "is played from now on" if tape else f"is not played: {recorder.fault}"
            _LOG.debug("%s of %s %s", self.name, form, says)
        return found


def float32_precision(tensor: Tensor) -> object:
    """Return what products of float32 may round their factors to, where that makes a difference."""
    if tensor.dtype is not torch.float32:
        return None
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def recording() -> bool:
    """Return whether anybody wants to know of launches."""
    return _here.recorder is not None


def launched(compiled: Any, grid: Sequence[int], arguments: Iterable[Any]) -> None:
    """Tell whoever records of a launch.

    Args:
        compiled: the kernel, or None where there is none to launch again.
        grid: three numbers of programs.
        arguments: of its launcher: tensors, boxes of tensors, numbers and constants.
    """
    if _here.recorder is not None:
        _here.recorder.launched(compiled, grid, arguments)


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or device.index == torch._C._cuda_getDevice()


class _Slot:
    """What a tape knows of a tensor that is given or made, which it does not keep alive."""

    __slots__ = ("_alive", "extent", "form", "memory", "offset")

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # As long as somebody may ask whether it is alive, no other memory has its identity.
        self.memory, self._alive = storage._cdata, StorageWeakRef(storage)
        self.form = tensor.shape, tensor.stride(), tensor.dtype
        self.offset, self.extent = int(tensor.storage_offset()), _extent(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether every element of `tensor` lies among those of this one."""
        first = tensor.storage_offset() - self.offset
        inside = first >= 0 and first + _extent(tensor) <= self.extent
        same = tensor.untyped_storage()._cdata == self.memory
        return same and inside and tensor.dtype is self.form[2] and not self._alive.expired()


def _extent(tensor: Tensor) -> int:
    """Return how many elements lie between the first one and the last, both included."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


class _Recorder(TorchDispatchMode):
    """Writes down what a body does with its tensors.

    Args:
        tensors: the arguments of the body.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        assert tensors[0] is not None
        self._count, self._device = len(tensors), tensors[0].device
        self._index = tensors[0].get_device()
        self._slots = [None if tensor is None else _Slot(tensor) for tensor in tensors]
        self._known = {slot.memory for slot in self._slots if slot is not None}
        self._lines: list[str] = []
        general = functools.partial(_empty, self._device)
        self._names: dict[str, Any] = {
            "part": _PART,
            "empty": _EMPTY.get(self._device.type, general),
        }
        self._known_names: dict[int, str] = {}
        # Arguments whose addresses kernels get.
        self._pointed: set[int] = set()
        self._launches = self._calls = False
        self.fault: str | None = None

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
        results = list(found) if isinstance(found, (tuple, list)) else [found]
        new = [each for each in results if self._is_new(each)]
        # A number that Python reads may decide something.
        if not all(each is None or isinstance(each, Tensor) for each in results):
            self._refuse(f"Python reads what {func} gives")
        if func in _ALLOCATIONS and new:
            self._lines.append(self._allocation(new[0]))
        elif new or func._schema.is_mutable:
            self._calls = True
            words = [self._said(arg) for arg in args]
            words += [f"{name}={self._said(arg)}" for name, arg in kwargs.items()]
            call = f"{self._name(func)}({', '.join(words)})"
            taken = [self._take(each) if self._is_new(each) else "_" for each in results]
            listed = "," * isinstance(found, (tuple, list))
            self._lines.append(f"{', '.join(taken)}{listed} = {call}" if new else call)
        return found

    def _is_new(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._known

    def _take(self, tensor: Tensor) -> str:
        slot = _Slot(tensor)
        self._known.add(slot.memory)
        self._slots.append(slot)
        return f"t{len(self._slots) - 1}"

    def _allocation(self, tensor: Tensor) -> str:
        form = f"{tuple(tensor.shape)}, {tensor.stride()}, {self._name(tensor.dtype)}"
        if tensor.device == self._device:
            return f"{self._take(tensor)} = empty({form})"
        empty = self._name(functools.partial(_empty, tensor.device))
        return f"{self._take(tensor)} = {empty}({form})"

    def launched(self, compiled: Any, grid: Sequence[int], arguments: Iterable[Any]) -> None:
        """Note a launch; see the function of that name."""
        if compiled is None:
            self._refuse("a launch was interpreted, or its pointers were not aligned")
            return
        self._launches = True
        given, straight = list(arguments), launcher.straight(compiled.run)
        function, metadata = self._name(compiled.function), self._name(compiled.packed_metadata)
        if straight is None:
            call, settings = self._name(compiled.run), ()
            words = list(map(self._passed, given))
        else:
            call, settings = self._name(straight.launch), tuple(map(repr, straight.settings))
            boxes = iter(straight.boxes)
            words = [
                self._boxes(argument, next(boxes)) if _is_box(argument) else self._passed(argument)
                for argument in given
            ]
        how = "s", function, *settings, metadata, "None", "None", "None"
        self._lines.append(f"{call}({', '.join((*map(str, grid), *how, *words))})")

    def _boxes(self, box: Any, how: Any) -> str:
        """Return how the end of a launcher is given a box."""
        describe, rest = launcher.apart(how, box.placing(), box.base.data_ptr())
        address = self._address(box.base)
        first = address if describe is None else f"{self._name(describe)}({address})"
        return ", ".join((first, *map(repr, rest)))

    def _passed(self, argument: Any) -> str:
        """Return how a launcher is given an argument."""
        if isinstance(argument, Tensor):
            return self._address(argument)
        if _is_box(argument):
            return f"{self._name(argument.placing())}({self._address(argument.base)})"
        return repr(argument) if type(argument) is int else self._name(argument)

    def _address(self, tensor: Tensor) -> str:
        if not tensor.numel():
            return "0"
        at = self._slot_of(tensor)
        if at is None:
            return ""
        if tensor.data_ptr() % _ALIGNMENT:
            self._refuse(f"a pointer is not aligned to {_ALIGNMENT} bytes")
        slot, first = at
        base = f"t{slot}.data_ptr()"
        if slot < self._count:
            self._pointed.add(slot)
            base = f"p{slot}"
        bytes_ = first * tensor.element_size()
        if bytes_ % _ALIGNMENT:
            self._refuse(f"a pointer is {bytes_} bytes from where its memory starts")
        return f"{base} + {bytes_}" if bytes_ else base

    def _said(self, value: Any) -> str:
        """Return how torch is given an argument."""
        if isinstance(value, Tensor):
            return self._told(value)
        if isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) for each in value):
            return f"[{', '.join(map(self._said, value))}]"
        return self._name(value)

    def _told(self, tensor: Tensor) -> str:
        """Return how a tape speaks of a tensor: by its slot, or as a view of that."""
        at = self._slot_of(tensor)
        if at is None:
            return ""
        slot, first = at
        known = self._slots[slot]
        assert known is not None
        if not first and known.form[:2] == (tensor.shape, tensor.stride()):
            return f"t{slot}"
        return f"part(t{slot}, {tuple(tensor.shape)}, {tensor.stride()}, {first})"

    def _slot_of(self, tensor: Tensor) -> tuple[int, int] | None:
        """Return whose part a tensor is, and from which element on; None if that is not certain."""
        slots = enumerate(self._slots)
        held = [(n, slot) for n, slot in slots if slot is not None and slot.holds(tensor)]
        if len(held) != 1:
            whose = " and ".join(f"tensor {n}" for n, _ in held) or "nobody"
            self._refuse(f"memory of form {tuple(tensor.shape)} belongs to {whose}")
            return None
        ((number, slot),) = held
        return number, int(tensor.storage_offset()) - slot.offset

    def tape(self, found: Any) -> Body | None:
        """Return the record as a function of the tensors, or None where it is none."""
        outs = found if isinstance(found, tuple) else (found,)
        told = [self._returned(out) for out in outs]
        if self.fault is not None:
            return None
        lines = [f"p{slot} = t{slot}.data_ptr()" for slot in sorted(self._pointed)]
        if self._pointed:
            bits = " | ".join(f"p{slot}" for slot in sorted(self._pointed))
            lines.append(f"if ({bits}) % {_ALIGNMENT}: return None")
        body = [*self._lines, f"return {', '.join(told)}{',' * isinstance(found, tuple)}"]
        body = _freed(body, range(self._count, len(self._slots)))
        if self._launches:
            stream = self._name(torch._C._cuda_getCurrentRawStream)
            lines.append(f"s = {stream}({self._index})")
        if self._calls:
            # The record was made below autocast.
            lines.append(f"with {self._name(torch._C._DisableAutocast)}():")
            body = [f"    {line}" for line in body]
        source = f"def play({', '.join(f't{slot}' for slot in range(self._count))}):\n"
        source += "".join(f"    {line}\n" for line in (*lines, *body))
        exec(source, self._names)
        return self._names["play"]

    def _returned(self, out: Tensor | None) -> str:
        if out is None:
            return "None"
        at = self._slot_of(out)
        if at is not None and at[0] < self._count:
            self._refuse(f"it returns tensor {at[0]}, which it was given")
        return self._told(out)

    def _refuse(self, fault: str) -> None:
        self.fault = self.fault or fault

    def _name(self, value: Any) -> str:
        """Return what a value is called, the same each time; it lives as long as the name."""
        name = self._known_names.setdefault(id(value), f"v{len(self._names)}")
        self._names[name] = value
        return name


def _is_box(argument: Any) -> bool:
    return hasattr(argument, "placing")


def _empty(
    device: torch.device, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _freed(lines: Sequence[str], slots: Sequence[int]) -> list[str]:
    """Let go of memory where it was used last, and do not ask for what nobody uses."""
    used = [set(re.findall(r"\bt\d+\b", line)) for line in lines]
    kept = list(lines)
    for slot in slots:
        name = f"t{slot}"
        uses = [index for index, names in enumerate(used) if name in names]
        first, last = uses[0], uses[-1]
        if first == last and lines[first].startswith(f"{name} = empty("):
            kept[first] = ""
        elif last < len(lines) - 1:
            kept[last] += f"; del {name}"
    return [line for line in kept if line]
