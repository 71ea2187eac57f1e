"""Who computes a layer in `python -m benchmarks kernels`, under which name, and by which kernels.

plain                   the layer without dendrites
pbfx                    eager, as a user calls it
pbfx, compiled          under `torch.compile(backend="pbfx")`
pbfx packed, ...        eager, with a strategy that it may not have chosen
eager loop, packed      what anyone can write: an op per dendrite, or one for all
inductor                the loop under `torch.compile`
packed + inductor       likewise, of one op for all
inductor, tuned gemm    the loop, its products chosen by timing a few Triton configurations
inductor, max-autotune  the loop, everything chosen by timing
perforatedai            where it is installed; it learns by plain backpropagation
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import candidate_neurons, full_neurons, incumbent, neurons
from benchmarks.neurons import Neuron, Tensors
from pbfx_kernels import Geometry
from pbfx_kernels.problem import linear_problem, problem_of
from pbfx_kernels.strategy import can_fuse, choose, streams

FORWARD, STEP, CANDIDATE, GRADIENT = "forward", "step", "candidate", "full"
MODES = (FORWARD, STEP, CANDIDATE, GRADIENT)
PLAIN, PBFX, COMPILED = "plain", "pbfx", "pbfx, compiled"
LOOP, PACKED, INDUCTOR, PACKED_INDUCTOR = (
    *("eager loop", "eager packed", "inductor", "packed + inductor"),
)
TUNED_GEMM, MAX_AUTOTUNE = "inductor, tuned gemm", "inductor, max-autotune"
RIVALS = (LOOP, PACKED, INDUCTOR, PACKED_INDUCTOR, TUNED_GEMM, MAX_AUTOTUNE)
# The loop in which dendrites learn too.
FULL = "eager loop, full"
# Triton configurations of a product that are timed, beside the library's own.
_CONFIGURATIONS = 4


def providers(args: argparse.Namespace, tensors: Tensors, mode: str) -> dict[str, Neuron]:
    """Return who takes part, in the order of the table; what is compiled compiles when called."""
    if mode == CANDIDATE:
        return _in_dendrite_phase(args, tensors)
    layer = tensors.layer
    if mode == GRADIENT:
        return _in_gradient_mode(args, tensors)
    found: dict[str, Neuron] = {PLAIN: neurons.plain(layer), PBFX: neurons.chosen(layer)}
    if args.compile:
        found[COMPILED] = _compiled(neurons.chosen(layer))
    if mode == FORWARD:
        for strategy in neurons.strategies(tensors):
            found[f"{PBFX} {strategy.value}"] = neurons.forced(layer, strategy)
    linear = not layer.geometry.spatial
    given = tensors.inputs[0], tensors.weight, tensors.dendrites[0]
    if linear and can_fuse(*given):
        found[f"{PBFX} {_of_op(*given)}"] = neurons.fused()
    found[LOOP] = neurons.loop(layer)
    found[PACKED] = neurons.packed(layer)
    if args.compile:
        found[INDUCTOR] = _inductor(neurons.loop(layer))
        found[PACKED_INDUCTOR] = _inductor(neurons.packed(layer))
        if _named(layer.name, args.tune_gemm):
            found[TUNED_GEMM] = _inductor(neurons.loop(layer), options=_tuned_gemm())
        if _named(layer.name, args.max_autotune):
            found[MAX_AUTOTUNE] = _inductor(neurons.loop(layer), mode="max-autotune-no-cudagraphs")
    if args.incumbent and incumbent.missing() is None:
        try:
            found[incumbent.NAME] = incumbent.neuron(tensors)
        except incumbent.Unavailable as error:
            print(f"{incumbent.NAME}: skipped, {error}")
        else:
            # It learns another way; the loop that learns like it is what its gradients are held to.
            found[FULL] = neurons.Full(neurons.loop(layer, frozen=False))
    return found


def _in_dendrite_phase(args: argparse.Namespace, tensors: Tensors) -> dict[str, Neuron]:
    """Return who teaches a candidate; the open part of perforatedai has no dendrite phase."""
    layer = tensors.layer
    found: dict[str, Neuron] = {
        PLAIN: neurons.plain(layer),
        PBFX: candidate_neurons.chosen(layer),
    }
    if args.compile:
        found[COMPILED] = _compiled(candidate_neurons.chosen(layer))
    found[LOOP] = candidate_neurons.loop(layer)
    if args.compile:
        found[INDUCTOR] = _inductor(candidate_neurons.loop(layer))
    return found


def _in_gradient_mode(args: argparse.Namespace, tensors: Tensors) -> dict[str, Neuron]:
    layer = tensors.layer
    loop, packed = (of(layer, frozen=False) for of in (neurons.loop, neurons.packed))
    found: dict[str, Neuron] = {PLAIN: neurons.plain(layer), PBFX: full_neurons.chosen(layer)}
    if args.compile:
        found[COMPILED] = _compiled(full_neurons.chosen(layer))
    found |= {LOOP: loop, PACKED: packed}
    if args.compile:
        found |= {INDUCTOR: _inductor(loop), PACKED_INDUCTOR: _inductor(packed)}
    return found


def _compiled(neuron: Neuron) -> Neuron:
    from pbfx.backend import compile_graph

    backend: Any = compile_graph
    return torch.compile(neuron, backend=backend, fullgraph=True, dynamic=False)


def _inductor(neuron: Neuron, **options: Any) -> Neuron:
    return torch.compile(neuron, fullgraph=True, dynamic=False, **options)


def _tuned_gemm() -> dict[str, Any]:
    return {
        "max_autotune_gemm": True,
        "max_autotune_gemm_backends": "ATEN,TRITON",
        "test_configs.max_mm_configs": _CONFIGURATIONS,
    }


def _named(layer: str, words: list[str]) -> bool:
    return any(word in layer for word in words)


class OutOfTime(BaseException):
    """A provider took longer than it may; no `Exception`, so that compilers do not catch it."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Interrupt the body after so many seconds.

    Raises:
        OutOfTime: if it does.
    """

    def stop(*_: object) -> None:
        raise OutOfTime(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def start(
    found: dict[str, Neuron],
    call: Callable[[str, Neuron], Callable[[int], object]],
    seconds: float,
) -> dict[str, Neuron]:
    """Call everybody once, and leave out rivals that fail or take longer than they may.

    Args:
        found: who takes part.
        call: makes of a name and a neuron what is timed.
        seconds: for the first call of a rival, compilation included.
    """
    ready = {}
    for name, neuron in found.items():
        if name not in RIVALS:
            call(name, neuron)(0)
            ready[name] = neuron
            continue
        try:
            with limited(seconds):
                call(name, neuron)(0)
        except (Exception, OutOfTime) as error:
            reason = str(error).strip().splitlines() or [""]
            print(f"{name}: left out, {type(error).__name__}: {reason[0]}")
        else:
            ready[name] = neuron
    return ready


def _of_op(x: Tensor, weight: Tensor, dendrite_weight: Tensor) -> str:
    """Return which kernel `pbfx::perforated_linear` runs."""
    problem = linear_problem(x, weight, dendrite_weight)
    return "streamed" if problem is not None and streams(problem) else "fused"


class _Watch(TorchDispatchMode):
    """Listen to the ops of this package, and say what each of them runs with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pbfx":
            name = func._schema.name.split("::")[1]
            if name == "dendrites":
                soma, _, weight, *rest = args
                stride, padding, dilation, groups, transposed, output_padding = rest[4:10]
                form = tuple(stride), tuple(padding), tuple(dilation), groups, transposed
                geometry = Geometry(*form, tuple(output_padding))
                self.seen.append(choose(problem_of(soma, weight, geometry)).value)
            elif name == "perforated_linear":
                self.seen.append(_of_op(args[0], args[1], args[3]))
            elif name.startswith("perforated_"):
                self.seen.append("depthwise" if "depthwise" in name else "fused")
        return func(*args, **(kwargs or {}))


def choice(call: Callable[[int], object]) -> str:
    """Return what the eager provider runs: the strategy of each op that it calls."""
    with _Watch() as watch:
        call(0)
    return " + ".join(dict.fromkeys(watch.seen)) or "none"


@contextlib.contextmanager
def forms() -> Iterator[list[str]]:
    """Collect the forms that the backend gives the sites of graphs compiled in the body."""
    logger = logging.getLogger("pbfx.backend.compiler")
    found: list[str] = []

    class Sites(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.DEBUG and isinstance(record.args, tuple):
                found.append(str(record.args[1]))

    handler, level = Sites(logging.DEBUG), logger.level
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
