"""`pbfx explain`: what `pbfx.explain` says about a model that can be built without arguments.

Imports nothing heavy until it runs, so that `pbfx --help` need not wait.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

SUMMARY = "say where a model can grow dendrites, what that costs, and why not elsewhere"

DESCRIPTION = """\
Builds a model and prints where it can grow dendrites, what each site costs, and
what was left out, with the reason.

  pbfx explain torchvision.models:resnet18
  pbfx explain --draw net.png train:make_model
  pbfx explain --exclude 'head.*' --json package.module:Net
  pbfx explain --lowered package.module:Net

The model may be plain or transformed. Modules are found where Python finds them
and in the current folder. What the model's code prints goes to stderr.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pbfx explain` to `parser`."""
    parser.add_argument(
        "model",
        metavar="MODULE:CALLABLE",
        help="a class or function that gives the model when called without arguments, or the model",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument(
        "--lowered", action="store_true", help="also lower it for inference and say what that does"
    )
    parser.add_argument("--draw", metavar="PATH", help="also write a picture: .png or .svg")
    for name, text in (
        ("include", "sites that may grow; a glob over paths, may be repeated (*)"),
        ("exclude", "sites that may not; a glob over paths, may be repeated"),
    ):
        parser.add_argument(f"--{name}", metavar="GLOB", action="append", help=text)


def run(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Explain the model; return the exit status. The picture comes first, so that all is well."""
    from pbfx import Config, explain
    from pbfx.cli.target import build

    model = build(args.model)
    config = None
    if args.include or args.exclude:
        config = Config(include=tuple(args.include or ("*",)), exclude=tuple(args.exclude or ()))
    explanation = explain(model, config, lowered=args.lowered)
    if args.draw is not None:
        explanation.draw(args.draw)
    text = json.dumps(explanation.to_json(), indent=2) if args.json else str(explanation)
    # A terminal that lacks a letter shows a question mark, of one column as well.
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:
        # `head` has enough. Python would flush again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
