"""The console script `pbfx`: finds the subcommand and turns errors into exit codes.

Exit codes: 0 done; 2 the user can put it right (a wrong option, a missing file or package);
130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pbfx.cli import explain
from pbfx.demo import command as demo


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.run is None:
        parser.print_help()
        return 2
    try:
        return args.run(args, ["pbfx", *arguments])
    except KeyboardInterrupt:
        print("pbfx: interrupted; no results were written", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_users(error):
            raise
        print(f"pbfx: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="pbfx", description="Artificial dendrites for PyTorch models, and their compiler."
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in (("demo", demo), ("explain", explain)):
        command_parser = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(command_parser)
        command_parser.set_defaults(run=command.run)
    return parser


class _Version(argparse.Action):
    # argparse's own version action wants the text already when the parser is built.
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *ignored: object) -> None:
        import pbfx

        print(f"pbfx {pbfx.__version__}")
        parser.exit()


def _is_users(error: Exception) -> bool:
    from pbfx import PbfxError

    return isinstance(error, PbfxError)
