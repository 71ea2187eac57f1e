"""What the demo says when it cannot run."""

from __future__ import annotations

from pbfx import PbfxError


class DemoError(PbfxError):
    """Raise when data, a device or a folder that the demo was given cannot be used."""
