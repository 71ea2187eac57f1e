"""The list of benchmarks. A new one is a file with a `BENCHMARK`, and a line here."""

from __future__ import annotations

from benchmarks import (
    comparison,
    dendrite_step,
    kernels,
    lower,
    recompile,
    restructure,
    selection,
    step,
    tune,
    whole,
    zoo,
)
from benchmarks.benchmark import Benchmark
from benchmarks.learning import command as learning

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        step.BENCHMARK,
        whole.BENCHMARK,
        lower.BENCHMARK,
        kernels.BENCHMARK,
        tune.BENCHMARK,
        dendrite_step.BENCHMARK,
        restructure.BENCHMARK,
        selection.BENCHMARK,
        recompile.BENCHMARK,
        zoo.BENCHMARK,
        comparison.BENCHMARK,
    )
}

# What has rows, options and a way of running of its own: modules with `main(argv)` and `SUMMARY`.
COMMANDS = {"learning": learning}
