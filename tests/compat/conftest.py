"""Every test here is a script of its own: settings, warnings and the folder are fresh."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pbfx.compat.hints import forget_warnings
from pbfx.compat.perforate import camel_settings, snake_settings


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the test as a script of its own, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for settings in (camel_settings, snake_settings):
        settings.reset()
    forget_warnings()
    yield tmp_path
    for settings in (camel_settings, snake_settings):
        settings.reset()
