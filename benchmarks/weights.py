"""Which weights of a model do linear and convolution ops read? Counted by listening, not by pbfx.

It runs the model once and watches the functions that torch's layers and users' code call, so it
knows nothing of graphs and serves as the measure of what a capture has found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pbfx.parts import parts_of
from pbfx.paths import join

# Where their weight stands, and under which name.
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_LAYERS: dict[Callable[..., Any], tuple[int, str]] = dict.fromkeys(
    (F.linear, *_CONVOLUTIONS, *_TRANSPOSED), (1, "weight")
)
# A product with a parameter is a linear layer that somebody wrote out.
_PRODUCTS: dict[Callable[..., Any], tuple[int, str]] = {
    torch.matmul: (1, "other"),
    torch.mm: (1, "mat2"),
    torch.addmm: (2, "mat2"),
    Tensor.matmul: (1, "other"),
    Tensor.mm: (1, "mat2"),
    Tensor.__matmul__: (1, "other"),
}
# Several weights at once: all their matrices count.
_COMPOUNDS = (F.multi_head_attention_forward, torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell)


@dataclasses.dataclass
class Read:
    """One weight that a linear or conv op reads.

    Attributes:
        name: of the parameter; of the module that was running, if the weight is computed.
        parameter: the parameter itself; None for a computed weight.
        numel: its size.
    """

    name: str
    parameter: nn.Parameter | None
    numel: int


class _Listener(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.reads: dict[object, Read] = {}
        self.running: list[str] = [""]

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _COMPOUNDS:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter) and leaf.dim() >= 2:
                    self.note(leaf)
        else:
            position, name = _LAYERS.get(function) or _PRODUCTS.get(function) or (None, "")
            if position is not None:
                weight = args[position] if len(args) > position else kwargs.get(name)
                if function in _LAYERS or id(weight) in self.names:
                    self.note(weight)
        return function(*args, **kwargs)

    def note(self, weight: Any) -> None:
        if not isinstance(weight, Tensor):
            return
        name = self.names.get(id(weight))
        if name is not None:
            assert isinstance(weight, nn.Parameter)
            self.reads.setdefault(id(weight), Read(name, weight, weight.numel()))
            return
        # A view of a parameter, or one that was computed: known by who was running.
        where = self.running[-1]
        self.reads.setdefault(where, Read(where, None, weight.numel()))


def weights_read(model: nn.Module, run: Callable[[], object]) -> list[Read]:
    """Return the weights that linear and conv ops read while `run()` calls `model`.

    Each weight is listed once, however many ops read it. Recurrent layers of several steps
    (`nn.LSTM`) are not such ops. Gradients stay enabled, because torch takes other ways without.
    """
    listener = _Listener(model)
    with _running(model, listener), listener:
        run()
    return list(listener.reads.values())


def left_out(reads: Sequence[Read], model: nn.Module) -> list[Read]:
    """Return those weights that no site of the transformed `model` reads too.

    A computed weight is known by the module that reads it, and by the parameter that its dendrites
    live beside.
    """
    weights, modules = set(), set()
    for path, part in parts_of(model).items():
        own = dict(part.named_parameters(remove_duplicate=False))
        for site in part.perforation.sites:
            weights.add(id(own.get(site.weight)))
            modules |= {join(path, site.name), join(path, site.home.rpartition(".")[0])}
    return [
        read
        for read in reads
        if (
            read.name not in modules
            if read.parameter is None
            else id(read.parameter) not in weights
        )
    ]


def nearest_owner(name: str, known: Mapping[str, str]) -> str | None:
    """Return what `known` says of `name` or of the innermost module around it; None if nothing."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return known.get(name)


@contextmanager
def _running(model: nn.Module, listener: _Listener) -> Iterator[None]:
    """Let `listener` know the path of the module whose forward is running."""

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: listener.running.append(path)

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path)))
        handles.append(
            module.register_forward_hook(
                lambda *_: listener.running.pop() and None, always_call=True
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
