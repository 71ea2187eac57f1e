"""3.x's functions: `UPA.perforate_model` and what goes with it."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from pbfx.compat.hints import refusing
from pbfx.compat.perforate import (
    count_params,
    load_net,
    load_net_from_dict,
    load_system,
    perforate,
    save_net,
    save_system,
    snake_settings,
)
from pbfx.compat.perforate import deep_copy as deep_copy_pai
from pbfx.compat.perforate import parameters_of as get_pai_network_params
from pbfx.compat.perforate import same_net as prepare_final_model
from pbfx.compat.perforate import save_net as pai_save_net
from pbfx.compat.perforate import save_system as pai_save_system

__all__ = [
    "convert_network",
    "count_params",
    "deep_copy_pai",
    "get_pai_network_params",
    "initialize_pai",
    "load_net",
    "load_net_from_dict",
    "load_system",
    "pai_save_net",
    "pai_save_system",
    "perforate_model",
    "prepare_final_model",
    "save_net",
    "save_system",
]


def perforate_model(
    model: nn.Module,
    doing_pai: bool = True,
    save_name: str = "",
    making_graphs: bool = True,
    maximizing_score: bool | None = None,
    num_classes: int = 10**10,
    values_per_train_epoch: int = -1,
    values_per_val_epoch: int = -1,
    zooming_graph: bool = True,
    config_file: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Return the model as one that can grow dendrites, and make `GPA.pai_tracker`.

    Args:
        model: any module.
        doing_pai: whether to grow at all.
        save_name: the folder of the run; if empty that of the settings, else `"PAI"`.
        making_graphs: whether to draw the run when it is complete.
        maximizing_score: whether a larger score is better; None for what the settings say.
        num_classes: nothing depends on it.
        values_per_train_epoch: nothing depends on it.
        values_per_val_epoch: nothing depends on it.
        zooming_graph: nothing depends on it.
        config_file: a JSON file of settings, as 3.x writes it.

    Raises:
        CaptureError: if no layer can carry dendrites; says why.
        ConfigError: if the settings leave none, or cannot be honoured.
    """
    if config_file is not None:
        snake_settings.load(config_file)
    return perforate(
        model,
        snake_settings,
        doing=doing_pai,
        save_name=save_name,
        making_graphs=making_graphs,
        maximizing_score=maximizing_score,
    )


def initialize_pai(
    model: nn.Module,
    doing_pai: bool = True,
    save_name: str = "",
    making_graphs: bool = True,
    maximizing_score: bool = True,
    *ignored: Any,
    **also_ignored: Any,
) -> nn.Module:
    """Return what `perforate_model` returns: its name before 3.2."""
    return perforate(
        model,
        snake_settings,
        doing=doing_pai,
        save_name=save_name,
        making_graphs=making_graphs,
        maximizing_score=maximizing_score,
    )


def convert_network(net: nn.Module, *ignored: Any, **also_ignored: Any) -> nn.Module:
    """Return the model as one that can grow; `GPA.pai_tracker.initialize(...)` says the rest."""
    return perforate(net, snake_settings)


__getattr__ = refusing(__name__, __all__)
