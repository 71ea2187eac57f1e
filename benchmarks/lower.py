"""Inference with dendrites: as transformed, lowered, and as a rival would have it.

Every provider computes in eval mode without gradients, with weights in the dtype that is asked for
and no autocast. On a GPU each is timed twice: called from Python, where small layers wait for
launches, and replayed as a CUDA graph, where kernels alone count. What is lowered has batch norms
folded in; the rival keeps them, and its dendrites join before them, so it is the same network
only where there are none.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import pbfx
from benchmarks.benchmark import Benchmark, Case
from benchmarks.compiling import compiler
from benchmarks.gate import output_fault, require
from benchmarks.memory import peak_mib
from benchmarks.models import MODELS, fresh
from benchmarks.options import count, natural, positive
from benchmarks.packed import copy_weights, packed_of
from benchmarks.providers import CONFIG, dendrite_state
from benchmarks.table import milliseconds, multiple
from benchmarks.timing import Quantiles, interleave, ratios

NAMES = ("mnist", "resnet18", "resnet50", "vit", "bert", "gpt2")
COLUMNS = (
    *("model", "width", "batch_size", "dendrites", "provider", "graph"),
    *("ms_p20", "ms_p50", "ms_p80", "x_plain_p50", "x_packed", "rounds", "peak_mib"),
)
# Compiled ones come after their eager form, which they are compared with.
PLAIN, PBFX, LOWERED, PACKED = "plain", "pbfx", "lowered", "packed"
COMPILED = "inductor"
# Outputs have been through all layers of a model: this much more than the table of one op.
_DEPTH = 5.0
_WARM = 3

Call = Callable[[], Tensor]


def run(args: argparse.Namespace) -> Iterator[Case]:
    """Check and time model by model.

    Raises:
        GateError: if a lowered or compiled model says something else than it should.
    """
    device = torch.device(args.device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for name in args.models:
            for dendrites in args.dendrites:
                yield from _measure(args, device, name, dendrites)


def _measure(
    args: argparse.Namespace, device: torch.device, name: str, dendrites: int
) -> Iterator[Case]:
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    plain = _settled(fresh(name, args.width, device, args.seed), args.seed)
    state = dendrite_state(plain, dendrites, args.seed)
    model = pbfx.transform(copy.deepcopy(plain), CONFIG)
    model.load_state_dict(state)
    rival = packed_of(copy.deepcopy(plain), dendrites) if dendrites else None
    models = {PLAIN: plain.to(dtype).eval(), PBFX: model.to(dtype).eval()}
    models[LOWERED] = pbfx.lower(models[PBFX])
    if rival is not None:
        copy_weights(rival, state)
        models[PACKED] = rival.to(dtype).eval()
    x = MODELS[name].batches(args.batch_size, device, args.seed)[0][0]
    x = x.to(dtype) if x.is_floating_point() else x
    with compiler(args.compile) as compile_:
        calls = {label: _call(each, x) for label, each in models.items()}
        if compile_ is not None:
            for label, each in models.items():
                calls[f"{label}, {COMPILED}"] = _call(compile_(each), x)
        require(_faults(name, models, calls, args.dtype))
        peaks = {
            label: peak_mib(call, models[label.partition(",")[0]], None, device)
            for label, call in calls.items()
        }
        for graph in (False, True) if device.type == "cuda" else (False,):
            timed = {label: _captured(call) for label, call in calls.items()} if graph else calls
            once = dict.fromkeys(timed, 1)
            times = interleave(timed, device, args.seconds, once, lambda _: None)
            yield _case(args, name, dendrites, graph, times, peaks)


def _settled(model: nn.Module, seed: int) -> nn.Module:
    """Give batch norms statistics that tell whether they have been folded, and how."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            mean, variance = module.running_mean, module.running_var
            assert mean is not None
            assert variance is not None
            mean.copy_(0.1 * torch.randn(mean.shape, generator=generator))
            variance.copy_(0.5 + torch.rand(variance.shape, generator=generator))
    return model


def _call(model: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    return lambda: model(x)


def _captured(call: Call) -> Callable[[], None]:
    """Return the replay of one call as a CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _faults(
    name: str, models: dict[str, nn.Module], calls: dict[str, Call], dtype: str
) -> list[str]:
    outputs = {label: call() for label, call in calls.items()}
    normed = any(isinstance(m, nn.BatchNorm2d) for m in models[PLAIN].modules())
    faults = []
    for label, out in outputs.items():
        way = label.partition(",")[0]
        reference = PBFX if way == LOWERED or (way == PACKED and not normed) else way
        fault = output_fault(out, outputs[reference], dtype, _DEPTH)
        if fault:
            faults.append(f"  {name}, {label} against {reference}: {fault}")
    return faults


def _case(
    args: argparse.Namespace,
    name: str,
    dendrites: int,
    graph: bool,
    times: dict[str, list[float]],
    peaks: dict[str, float | None],
) -> Case:
    cells, rows = [], []
    for label, values in times.items():
        # Compiled against compiled.
        form = f", {COMPILED}" if label.endswith(COMPILED) else ""
        own, share = Quantiles.of(values), ratios(values, times[f"{PLAIN}{form}"])
        rival = times.get(f"{PACKED}{form}")
        against = None if rival is None else ratios(values, rival).p50
        peak = peaks[label]
        cells.append(
            (
                label,
                milliseconds(own.p50),
                f"{multiple(share.p50)}x",
                "-" if against is None else multiple(against),
                "-" if peak is None else f"{peak:.0f}",
            )
        )
        rows.append(
            {
                "model": name,
                "width": args.width,
                "batch_size": args.batch_size,
                "dendrites": dendrites,
                "provider": label,
                "graph": "yes" if graph else "no",
                "ms_p20": own.p20 * 1e3,
                "ms_p50": own.p50 * 1e3,
                "ms_p80": own.p80 * 1e3,
                "x_plain_p50": share.p50,
                "x_packed": against,
                "rounds": len(values),
                "peak_mib": peak,
            }
        )
    way = "inference, replayed as a CUDA graph" if graph else "inference"
    title = f"{name}, width {args.width:g}, batch {args.batch_size}, D = {dendrites}: {way}"
    return Case(title, ("", "ms", "x plain", "x packed", "MiB"), cells, [], rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["mnist", "resnet18", "bert"])
    parser.add_argument("--dendrites", nargs="+", type=natural, default=[3], metavar="D")
    parser.add_argument("--width", type=positive, default=1.0, help="scales hidden layers")
    parser.add_argument("--batch-size", type=count, default=32, help="(default 32)")
    parser.add_argument(
        "--seconds", type=positive, default=2.0, help="of timing per case (default 2)"
    )


BENCHMARK = Benchmark(
    "lower",
    "inference: transformed, lowered, packed, eager and compiled",
    COLUMNS,
    add_arguments,
    run,
)
