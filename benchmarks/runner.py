"""Run one benchmark: options, table, CSV and exit codes.

Exit codes: 0 done; 1 an output was wrong, so nothing was timed; 2 a wrong option or name; 141
nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.benchmark import Benchmark
from benchmarks.environment import COLUMNS, DTYPES, choose_device, environment, precision
from benchmarks.errors import GateError, UsageError
from benchmarks.options import count, natural
from benchmarks.records import RESULTS, append, check_columns, results_path
from benchmarks.registry import BENCHMARKS, COMMANDS
from benchmarks.table import render
from pbfx.errors import nearest

USAGE = "usage: python -m benchmarks NAME [options]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m benchmarks` and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return 0
    name, *rest = arguments
    if name in COMMANDS:
        return COMMANDS[name].main(rest)
    if name not in BENCHMARKS:
        known = (*BENCHMARKS, *COMMANDS)
        print(f"benchmarks: no benchmark {name!r}; {nearest(name, known)}", file=sys.stderr)
        return 2
    benchmark = BENCHMARKS[name]
    args = parser_of(benchmark).parse_args(rest)
    try:
        if benchmark.summarize and args.summary:
            summary = "\n\n".join(render(case) for case in benchmark.summarize(args.summary))
            print(summary, flush=True)
            return 0
        return run(benchmark, args)
    except UsageError as error:
        print(f"benchmarks {name}: {error}", file=sys.stderr)
        return 2
    except GateError as error:
        print(f"benchmarks {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"benchmarks {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `head` has enough. Python would flush again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def listing() -> str:
    """Return the help that a call without a name shows."""
    summaries = {b.name: b.summary for b in BENCHMARKS.values()}
    summaries |= {name: command.SUMMARY for name, command in COMMANDS.items()}
    width = max(map(len, summaries))
    lines = [f"  {name.ljust(width)}  {summary}" for name, summary in summaries.items()]
    return "\n".join([USAGE, "", *lines, "", "python -m benchmarks NAME --help lists its options."])


def parser_of(benchmark: Benchmark) -> argparse.ArgumentParser:
    """Return the parser of one benchmark: the options that all share, and its own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {benchmark.name}", description=benchmark.summary
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 is autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile what is measured")
    parser.add_argument("--seed", type=natural, default=0, help="of weights and data (default 0)")
    parser.add_argument("--threads", type=count, help="of torch on the CPU (default: torch's)")
    parser.add_argument(
        "--save",
        action="store_true",
        help=f"append rows to benchmarks/results/{benchmark.name}.csv",
    )
    parser.add_argument("--out", type=Path, metavar="CSV", help="append rows to this file instead")
    parser.add_argument("--revision", help="git revision to record where there is no git checkout")
    if benchmark.summarize:
        committed = RESULTS / f"{benchmark.name}.csv"
        parser.add_argument(
            "--summary", type=Path, nargs="?", const=committed, metavar="CSV",
            help="measure nothing: sum up the rows of this file (default: the committed one)",
        )  # fmt: skip
    benchmark.add_arguments(parser)
    return parser


def run(benchmark: Benchmark, args: argparse.Namespace) -> int:
    """Run `benchmark`, print each case as it comes, append its rows if asked; return 0.

    Raises:
        UsageError: if the options cannot be honoured; nothing has been measured.
        GateError: if an output is wrong.
    """
    device = choose_device(args.device, args.dtype)
    path = results_path(benchmark.name, args)
    columns = (*COLUMNS, *benchmark.columns)
    if path is not None:
        check_columns(path, columns)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    where = environment(benchmark.name, device, args.dtype, args.seed, args.revision)
    print(f"{where['device']}, {args.dtype}, torch {where['torch']}, triton {where['triton']}")
    with precision(args.dtype, device):
        for case in benchmark.run(args):
            print(f"\n{render(case)}", flush=True)
            if path is not None:
                append(path, columns, [where | row for row in case.rows])
    if path is not None:
        print(f"\nrows appended to {path}")
    return 0
