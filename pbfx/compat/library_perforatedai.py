"""3.x's layers and processors, none of which are needed any more."""

from __future__ import annotations

from pbfx.compat.accepted import (
    GRUCellProcessor,
    GRUProcessor,
    LSTMCellProcessor,
    LSTMProcessor,
    LSTMProcessorLastHidden,
    MultiOutputProcessor,
    PAIProcessor,
)
from pbfx.compat.accepted import as_it_is as ResNetPAI
from pbfx.compat.accepted import as_it_is as ResNetPAIPreFC
from pbfx.compat.hints import refusing

__all__ = [
    "GRUCellProcessor",
    "GRUProcessor",
    "LSTMCellProcessor",
    "LSTMProcessor",
    "LSTMProcessorLastHidden",
    "MultiOutputProcessor",
    "PAIProcessor",
    "ResNetPAI",
    "ResNetPAIPreFC",
]

__getattr__ = refusing(__name__, __all__)
