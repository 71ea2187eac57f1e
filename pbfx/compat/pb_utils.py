"""The tutorial's functions: `PBU.initializePB` and what goes with it."""

from __future__ import annotations

from typing import Any

from torch import nn

from pbfx.compat.hints import refusing
from pbfx.compat.perforate import (
    camel_settings,
    count_params,
    deep_copy,
    load_net,
    load_net_from_dict,
    load_system,
    parameters_of,
    perforate,
    save_net,
    save_system,
)
from pbfx.compat.spelling import spoken_in_camel

__all__ = [
    "convertNetwork",
    "countParams",
    "deepCopyPAI",
    "getPBNetworkParams",
    "initializePB",
    "loadNet",
    "loadNetFromDict",
    "loadSystem",
    "paiSaveNet",
    "paiSaveSystem",
    "saveNet",
    "saveSystem",
]


def initializePB(
    model: nn.Module,
    doingPB: bool = True,
    saveName: str = "",
    makingGraphs: bool = True,
    maximizingScore: bool = True,
    *ignored: Any,
    **also_ignored: Any,
) -> nn.Module:
    """Return the model as one that can grow dendrites, and make `PBG.pbTracker`.

    Args:
        model: any module.
        doingPB: whether to grow at all.
        saveName: the folder of the run; `"PB"` if empty.
        makingGraphs: whether to draw the run when it is complete.
        maximizingScore: whether a larger score is better.
        ignored: `num_classes` and the like, which nothing depends on.
        also_ignored: the same by name.

    Raises:
        CaptureError: if no layer can carry dendrites; says why.
    """
    return perforate(
        model,
        camel_settings,
        doing=doingPB,
        save_name=saveName,
        making_graphs=makingGraphs,
        maximizing_score=maximizingScore,
    )


def convertNetwork(net: nn.Module, *ignored: Any, **also_ignored: Any) -> nn.Module:
    """Return the model as one that can grow; `PBG.pbTracker.initialize(...)` says the rest."""
    return perforate(net, camel_settings)


saveSystem = spoken_in_camel(save_system)
loadSystem = spoken_in_camel(load_system)
saveNet = spoken_in_camel(save_net)
loadNet = spoken_in_camel(load_net)
loadNetFromDict = spoken_in_camel(load_net_from_dict)
paiSaveSystem, paiSaveNet = saveSystem, saveNet
countParams = count_params
deepCopyPAI = deep_copy
getPBNetworkParams = parameters_of

__getattr__ = refusing(__name__, __all__)
