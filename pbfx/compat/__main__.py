"""`python -m pbfx.compat script.py [args]`: run a script for `perforatedai` as it stands."""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from pbfx.compat.hints import speak
from pbfx.compat.provide import provide


def main(argv: list[str]) -> None:
    """Run the script that `argv` names, with the rest of `argv` as its arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m pbfx.compat",
        description="Run a script written for perforatedai, unmodified, on pbfx.",
    )
    parser.add_argument("script", help="the Python file")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(argv)
    if not os.path.isfile(options.script):
        parser.error(f"there is no file {options.script}")
    speak()
    provide()
    # What Python itself sets up for a script.
    sys.argv[:] = [options.script, *options.args]
    sys.path[0] = os.path.dirname(os.path.abspath(options.script))
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
