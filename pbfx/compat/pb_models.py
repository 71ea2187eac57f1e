"""The tutorial's own layers: groups, processors and ResNets, none of which are needed any more."""

from __future__ import annotations

from pbfx.compat.accepted import (
    GRUCellProcessor,
    GRUProcessor,
    LSTMCellProcessor,
    MultiOutputProcessor,
    PBSequential,
)
from pbfx.compat.accepted import LSTMProcessorLastHidden as LSTMProcessorReturnHidden
from pbfx.compat.accepted import MultiOutputProcessor as multiOutputProcesser
from pbfx.compat.accepted import as_it_is as ResNetPB
from pbfx.compat.hints import refusing

__all__ = [
    "GRUCellProcessor",
    "GRUProcessor",
    "LSTMCellProcessor",
    "LSTMProcessorReturnHidden",
    "MultiOutputProcessor",
    "PBSequential",
    "ResNetPB",
    "multiOutputProcesser",
]

__getattr__ = refusing(__name__, __all__)
