"""What scripts pass that has nothing to do here: taken, explained once, and left alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from pbfx.compat.hints import warn_once

_DIMENSIONS = (
    "set_this_output_dimensions",
    "set_this_input_dimensions",
    "setThisOutputDimensions",
    "setThisInputDimensions",
)


def ignore_dimensions(*dimensions: Any) -> None:
    """Take the axes of a layer's output, which are known from the op."""
    warn_once("set_this_output_dimensions", "which axis holds the neurons is known from the op")


def accept_dimensions(module: nn.Module) -> None:
    """Let scripts tell `module` about its output, as they tell the wrappers of `perforatedai`."""
    for name in _DIMENSIONS:
        if not hasattr(module, name):
            # A function of this file and no method, so that the module can still be pickled.
            vars(module)[name] = ignore_dimensions


class PAISequential(nn.Sequential):
    """A group of layers, as scripts make it of a layer and its norm; not needed any more.

    pbfx takes a layer and the norm that alone reads it for one site by itself.

    Args:
        layer_array: the layers, in their order.
    """

    def __init__(self, layer_array: Any) -> None:
        super().__init__()
        # So named in their files.
        self.model = nn.Sequential(*layer_array)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layers compute, one after the other."""
        return self.model(*args, **kwargs)


class PBSequential(PAISequential):
    """The tutorial's name of `PAISequential`."""


class PAIProcessor:
    """Base of what scripts write to pick a layer's output out of a tuple; never called.

    The graph of the model shows what becomes of every output.
    """

    def post_n1(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output."""
        return args[0] if args else None

    def post_n2(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output."""
        return args[0] if args else None

    def pre_d(self, *args: Any, **kwargs: Any) -> Any:
        """Return the input."""
        return args, kwargs

    def post_d(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output."""
        return args[0] if args else None

    def clear_processor(self) -> None:
        """Forget nothing."""


class MultiOutputProcessor(PAIProcessor):
    """Was for layers that return several values."""


class LSTMProcessor(PAIProcessor):
    """Was for `nn.LSTM`."""


class LSTMProcessorLastHidden(PAIProcessor):
    """Was for `nn.LSTM` whose last hidden state is read."""


class LSTMCellProcessor(PAIProcessor):
    """Was for `nn.LSTMCell`."""


class GRUProcessor(PAIProcessor):
    """Was for `nn.GRU`."""


class GRUCellProcessor(PAIProcessor):
    """Was for `nn.GRUCell`."""


def as_it_is(network: nn.Module) -> nn.Module:
    """Return `network`: its norms need no regrouping before it is perforated."""
    warn_once("ResNetPAI", "a layer and the norm after it are one site without being regrouped")
    return network


def neuron_module(start_module: nn.Module, name: str = "") -> nn.Module:
    """Return the layer as it is: layers grow inside the model's graph, and need no wrapper."""
    warn_once("PAINeuronModule", "layers of a perforated model grow without a wrapper")
    return start_module
