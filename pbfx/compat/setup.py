"""How scripts name an optimizer and a scheduler: a class each, and a dict of arguments each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pbfx import ConfigError


@dataclasses.dataclass(frozen=True)
class Setup:
    """Classes and arguments, the parameters themselves not included."""

    optimizer_class: Any = None
    scheduler_class: Any = None
    optimizer_args: Any = None
    scheduler_args: Any = None

    def asked(
        self, optimizer_args: Mapping[str, Any], scheduler_args: Mapping[str, Any] | None
    ) -> Setup:
        """Return this setup with other arguments.

        Raises:
            ConfigError: if a class is missing.
        """
        if self.optimizer_class is None:
            raise ConfigError(
                "pbfx.compat: setup_optimizer needs a class; call set_optimizer(torch.optim.Adam), "
                "or whichever it is, before"
            )
        if scheduler_args and self.scheduler_class is None:
            raise ConfigError(
                "pbfx.compat: setup_optimizer got arguments for a scheduler and no class; call "
                "set_scheduler(torch.optim.lr_scheduler.StepLR), or whichever it is, before"
            )
        return dataclasses.replace(
            self,
            optimizer_args=_comparable(optimizer_args),
            scheduler_args=dict(scheduler_args or {}),
        )

    def same_as(self, other: Setup) -> bool:
        """Return whether both would make the same pair; when in doubt they would not."""
        try:
            return bool(self == other)
        # Arguments can be tensors or anything else that cannot be compared.
        except Exception:
            return False


def _comparable(args: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in args.items() if name != "params"}
    groups = args.get("params")
    if isinstance(groups, (list, tuple)):
        options["groups"] = [
            {name: value for name, value in group.items() if name != "params"}
            for group in groups
            if isinstance(group, dict)
        ]
    return options


def make_optimizer(
    setup: Setup, net: nn.Module, args: Mapping[str, Any], parameters: Any
) -> Optimizer:
    """Return a new optimizer of the setup's class.

    Args:
        setup: names the class.
        net: whose parameters to take where none are given.
        args: of the class, perhaps with `params`.
        parameters: in place of `params`.
    """
    options = dict(args)
    given = options.pop("params", None)
    wanted = given if parameters is None else parameters
    return setup.optimizer_class(net.parameters() if wanted is None else wanted, **options)


def make_scheduler(setup: Setup, optimizer: Optimizer, args: Mapping[str, Any] | None) -> Any:
    """Return a new scheduler of the setup's class, or None if it names none."""
    if setup.scheduler_class is None:
        return None
    return setup.scheduler_class(optimizer, **dict(args or {}))
