"""`perforatedai` as one more provider, where it is installed.

It follows the package's public documents. Its dendrites draw their own weights and start with zero
links, so the gate compares its output with the plain model's. It keeps its state in globals and
writes files, opens debuggers and exits the process on errors: it works in a temporary folder, with
no terminal to read from, and whatever goes wrong is printed and leaves it out of the table.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from benchmarks.providers import Built, Provider, sgd

NAME = "perforatedai"


class Unavailable(Exception):
    """The package is there and does not do what its documents say."""


def missing() -> str | None:
    """Return why it cannot take part, or None."""
    if importlib.util.find_spec(NAME) is None:
        return f"{NAME}: skipped, not installed here"
    return None


def _build(plain: nn.Module, state: Mapping[str, Tensor], dendrites: int) -> Built:
    before = sum(p.numel() for p in plain.parameters())
    with _quarantine():
        settings = importlib.import_module(f"{NAME}.globals_perforatedai")
        tools = importlib.import_module(f"{NAME}.utils_perforatedai")
        settings.pc.set_testing_dendrite_capacity(False)
        settings.pc.set_unwrapped_modules_confirmed(True)
        settings.pc.set_weight_decay_accepted(True)
        settings.pc.set_switch_mode(settings.pc.DOING_SWITCH_EVERY_TIME)
        model = tools.perforate_model(
            plain, save_name="bench", making_graphs=False, maximizing_score=True
        )
        for epoch in range(dendrites):
            settings.pai_tracker.set_optimizer_instance(sgd(model))
            device = next(plain.parameters()).device
            model, _, _ = settings.pai_tracker.add_validation_score(float(epoch), model)
            model = model.to(device)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if learning < before * (dendrites + 1):
        raise Unavailable(f"it did not grow to D = {dendrites}: {learning} parameters learn")
    return model, sgd(model)


@contextlib.contextmanager
def _quarantine() -> Iterator[None]:
    here = Path.cwd()
    try:
        with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open() as nothing:
            os.chdir(folder)
            stdin, sys.stdin = sys.stdin, nothing
            try:
                yield
            finally:
                sys.stdin = stdin
                os.chdir(here)
    # It calls sys.exit, and a debugger without a terminal ends in an exception of its own.
    except (Exception, SystemExit) as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error


PROVIDER = Provider(NAME, _build, lambda d: d + 1.0)
