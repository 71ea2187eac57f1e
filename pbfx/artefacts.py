"""Structured trace artefacts: what `TORCH_TRACE=folder` writes and `tlparse` shows.

They stand beside those of Dynamo and Inductor. Where nobody traces, nothing is put together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch._logging._internal import trace_structured


def trace_text(name: str, text: Callable[[], str]) -> None:
    """Write an artefact of plain text.

    Args:
        name: what it is called, without "pbfx_".
        text: makes it; called only if somebody traces.
    """
    _trace(name, "string", text)


def trace_json(name: str, value: Callable[[], Any]) -> None:
    """Write an artefact of JSON values; arguments as of `trace_text`."""
    _trace(name, "json", lambda: json.dumps(value(), indent=2))


def _trace(name: str, encoding: str, payload: Callable[[], str]) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"pbfx_{name}", "encoding": encoding},
        payload_fn=payload,
        # A restructure happens outside of any compilation.
        expect_trace_id=False,
    )
