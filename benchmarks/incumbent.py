"""`perforatedai` as one more provider, where it is installed: of whole models, and of one layer.

It learns in gradient mode, the only one that its open part has. Its dendrites get everybody's
weights, so it passes everybody's gate. It follows the package's public documents, and what it was
seen to do. It keeps its state in globals, writes files, opens debuggers and exits the process on
errors: it works in a temporary folder, with no terminal to read from, and whatever goes wrong is
printed and leaves it out of the table.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.neurons import Full, Tensors
from benchmarks.providers import LOOP, Built, Gradients, Provider, sgd

NAME = "perforatedai"
# Of the inputs that grow a model; image nets of benchmarks.step read 28 x 28.
_ROWS, _SIDE = 2, 28


class Unavailable(Exception):
    """The package is there and does not do what its documents say."""


def missing() -> str | None:
    """Return why it cannot take part, or None."""
    if importlib.util.find_spec(NAME) is None:
        return f"{NAME}: skipped, not installed here"
    return None


def neuron(tensors: Tensors) -> Full:
    """Return the layer of `tensors`, wrapped by it, with that many dendrites.

    The tensors that a call is given take the place of its parameters.

    Raises:
        Unavailable: if it does not grow the layer.
    """
    layer, weight = tensors.layer, tensors.weight
    dendrites = tensors.dendrites[0].shape[0]
    g = layer.geometry
    if g.spatial:
        channels = weight.shape[1] * g.groups
        form: Any = (g.stride, g.padding, g.dilation, g.groups)
        soma: nn.Module = nn.Conv2d(channels, weight.shape[0], tuple(weight.shape[2:]), *form)
    else:
        soma = nn.Linear(weight.shape[1], weight.shape[0])
    # It refuses a model that is a layer itself.
    net, x = nn.Sequential(soma).to(weight.device), torch.randn(_ROWS, *layer.x[1:])
    wrapped = _grown(net, x.to(weight.device), dendrites)
    own: Any = wrapped.get_submodule("0")

    def call(x: Tensor, weight: Tensor, bias: Tensor, *roles: Tensor) -> Tensor:
        v, c, to_soma, to_dendrite = roles
        _put(own.main_module, weight=weight, bias=bias)
        for d in range(dendrites):
            _put(own.dendrite_module.layers[d], weight=v[d], bias=c[d])
            if d:
                _put(own.dendrite_module.dendrites_to_dendrites, **{str(d): to_dendrite[d, :d]})
        if dendrites:
            _put(own.dendrites_to_top, **{str(dendrites - 1): to_soma})
        return wrapped(x)

    # It decides on the host, from values on the device, so that no graph can be captured.
    return Full(call, captured=False)


def _put(owner: nn.Module, **tensors: Tensor) -> None:
    """Let plain tensors stand for parameters, so that gradients reach what they are views of."""
    for name, tensor in tensors.items():
        owner._parameters.pop(name, None)
        owner.__dict__[name] = tensor


def _build(plain: nn.Module, state: Mapping[str, Tensor], dendrites: int) -> Built:
    device = next(plain.parameters()).device
    model = _grown(plain, _example(plain).to(device), dendrites)
    own = dict(model.named_parameters())
    with torch.no_grad():
        # Growing has trained it a little.
        for name in own:
            plain_name = name.replace(".main_module.", ".")
            if plain_name in state:
                own[name].copy_(state[plain_name])
        for path in _wrapped(model) if dendrites else ():
            roles = _parameters(path, dendrites)
            for role, names in roles.items():
                values = state[f"{path}.dendrites.{role}"]
                for d, name in names.items():
                    # The links of a dendrite to the older ones are a tensor of its own.
                    value = values[d, :d] if role == "to_dendrite" else values[d]
                    own[name].copy_(values if role == "to_soma" else value)
    return model, sgd(model)


def _gradients(model: nn.Module) -> Gradients:
    own = dict(model.named_parameters())
    found: Gradients = {}
    for path in _wrapped(model):
        for role in ("weight", "bias"):
            grad = own[f"{path}.main_module.{role}"].grad
            if grad is not None:
                found[f"{path}.{role}"] = grad
        dendrites = len({n for n in own if n.startswith(f"{path}.dendrite_module.layers.")}) // 2
        for role, names in _parameters(path, dendrites).items():
            grads = {d: grad for d, name in names.items() if (grad := own[name].grad) is not None}
            if not grads:
                continue
            if role == "to_soma":
                value = grads[0]
            elif role == "to_dendrite":
                value = grads[1].new_zeros(dendrites, dendrites, grads[1].shape[1])
                for d, grad in grads.items():
                    value[d, :d] = grad
            else:
                value = torch.stack([grads[d] for d in sorted(grads)])
            found[f"{path}.dendrites.{role}"] = value
    return found


def _wrapped(model: nn.Module) -> list[str]:
    """Return the paths of the layers that it has wrapped."""
    mark = ".main_module.weight"
    return [name.removesuffix(mark) for name, _ in model.named_parameters() if name.endswith(mark)]


def _parameters(path: str, dendrites: int) -> dict[str, dict[int, str]]:
    """Return its names for what pbfx stacks, by role and dendrite."""
    layers, links = (
        f"{path}.dendrite_module.layers",
        f"{path}.dendrite_module.dendrites_to_dendrites",
    )
    last = {0: f"{path}.dendrites_to_top.{dendrites - 1}"}
    return {
        "weight": {d: f"{layers}.{d}.weight" for d in range(dendrites)},
        "bias": {d: f"{layers}.{d}.bias" for d in range(dendrites)},
        "to_soma": last if dendrites else {},
        "to_dendrite": {d: f"{links}.{d}" for d in range(1, dendrites)},
    }


def _example(plain: nn.Module) -> Tensor:
    """Return an input that the model takes."""
    first = next(m for m in plain.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    if isinstance(first, nn.Linear):
        return torch.randn(_ROWS, first.in_features)
    return torch.randn(_ROWS, first.in_channels, _SIDE, _SIDE)


def _grown(net: nn.Module, x: Tensor, dendrites: int) -> nn.Module:
    """Let it wrap `net` and grow dendrites; each growth wants a training step before.

    Raises:
        Unavailable: if it fails, or grows none.
    """
    with _quarantine():
        settings = importlib.import_module(f"{NAME}.globals_perforatedai")
        tools = importlib.import_module(f"{NAME}.utils_perforatedai")
        settings.pc.set_testing_dendrite_capacity(False)
        settings.pc.set_unwrapped_modules_confirmed(True)
        settings.pc.set_weight_decay_accepted(True)
        settings.pc.set_configuration_confirmed(True)
        settings.pc.set_silent(True)
        settings.pc.set_pai_forward_function(torch.tanh)
        settings.pc.set_switch_mode(settings.pc.DOING_SWITCH_EVERY_TIME)
        # By default it puts buffers on the GPU that torch sees, wherever the model is.
        settings.pc.set_device(x.device)
        settings.pc.set_use_cuda(x.is_cuda)
        model = tools.perforate_model(
            net, save_name="bench", making_graphs=False, maximizing_score=True
        )
        for epoch in range(dendrites):
            optimizer = sgd(model)
            settings.pai_tracker.set_optimizer_instance(optimizer)
            model(x).square().mean().backward()
            optimizer.step()
            model, _, _ = settings.pai_tracker.add_validation_score(float(epoch), model)
            model = model.to(x.device)
    layers = {n.split(".layers.")[1].split(".")[0] for n in model.state_dict() if ".layers." in n}
    if len(layers) != dendrites:
        raise Unavailable(f"it grew {len(layers)} dendrites, not {dendrites}")
    return model


@contextlib.contextmanager
def _quarantine() -> Iterator[None]:
    here = Path.cwd()
    try:
        with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open() as nothing:
            os.chdir(folder)
            stdin, sys.stdin = sys.stdin, nothing
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    yield
            finally:
                sys.stdin = stdin
                os.chdir(here)
    # It calls sys.exit, and a debugger without a terminal ends in an exception of its own.
    except (Exception, SystemExit) as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error


PROVIDER = Provider(NAME, _build, lambda d: d + 1.0, _gradients, LOOP)
