"""Edit a live optimizer and its scheduler in place.

The objects that the user's script holds stay the objects that it holds: parameters are exchanged
inside the existing groups, and the state of every parameter that survives stays with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pbfx.copies import Filling
from pbfx.errors import TrackerError
from pbfx.wording import counted

Parameters = Mapping[str, nn.Parameter]
Stepping = Literal["auto", "epoch", "batch"]

# Entries of a parameter group that schedulers write.
_SCHEDULED = frozenset(
    ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "max_momentum", "base_momentum")
)
# Of those, the learning rates.
_RATES = frozenset(("lr", "initial_lr", "max_lr", "min_lr"))
# Optimizers whose per-element state does not start at zero: state key -> group key of the first
# value.
_FIRST_VALUE = {"step_size": "lr", "sum": "initial_accumulator_value"}
# State of Adafactor that stands for a whole matrix and has no element of its own for each of the
# parameter's.
_FACTORED = frozenset(("row_var", "col_var"))


def sync_optimizer(
    optimizer: Optimizer,
    before: Parameters,
    after: Parameters,
    managed: Iterable[str],
    home: Callable[[str], nn.Parameter],
) -> None:
    """Make `optimizer` hold the model's present parameters.

    Args:
        optimizer: edited in place; its groups stay the same dicts and lists.
        before: the model's parameters by name when the optimizer was last right.
        after: the parameters now.
        managed: names that the optimizer must hold; those missing are added.
        home: gives, for the name of a new parameter, the older one whose group it joins.

    Raises:
        TrackerError: if the optimizer cannot step a parameter that it must hold.
    """
    exchange = {
        id(old): (name, after.get(name))
        for name, old in before.items()
        if after.get(name) is not old
    }
    filling = Filling()
    for group in optimizer.param_groups:
        named = "param_names" in group
        kept: list[nn.Parameter] = []
        names: list[str] = []
        for index, old in enumerate(group["params"]):
            new = old
            if id(old) in exchange:
                _, new = exchange[id(old)]
                _move_state(optimizer, group, old, new, filling)
            if new is not None:
                kept.append(new)
                names.append(group["param_names"][index] if named else "")
        group["params"][:] = kept
        if named:
            group["param_names"][:] = names
    filling.fill()
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name in managed:
        if id(after[name]) in held:
            continue
        if isinstance(optimizer, torch.optim.Muon) and after[name].dim() != 2:
            raise TrackerError(
                f"Muon steps matrices only, and {name} has shape {tuple(after[name].shape)}; use "
                "another optimizer, or learning='perforated' with tuning='links' and finish=False"
            )
        group = held.get(id(home(name)), optimizer.param_groups[0])
        group["params"].append(after[name])
        if "param_names" in group:
            group["param_names"].append(name)
    if isinstance(optimizer, torch.optim.Adagrad):
        _start_adagrad(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS) and set(before.values()) != set(after.values()):
        # Its state is one flat vector over all parameters; it cannot outlive a change of their
        # number.
        optimizer.state.clear()
        optimizer._numel_cache = None


def _move_state(
    optimizer: Optimizer,
    group: dict[str, Any],
    old: nn.Parameter,
    new: nn.Parameter | None,
    filling: Filling,
) -> None:
    state = optimizer.state.pop(old, None)
    if state is None or new is None:
        return
    moved = {}
    for key, value in state.items():
        if key in _FACTORED:
            # By its name, because for a single neuron its shape is the parameter's.
            return
        if isinstance(value, Tensor) and value.shape == old.shape:
            first = float(group.get(_FIRST_VALUE.get(key, ""), 0.0))
            moved[key] = grown = (
                value.new_full(new.shape, first) if first else filling.zeros(value, new.shape)
            )
            shared = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
            filling.into(grown[shared], value[shared])
        elif isinstance(value, Tensor) and value.dim() > 0:
            # Of a shape that only the optimizer understands: start this parameter afresh.
            return
        else:
            moved[key] = value
    optimizer.state[new] = moved


def _start_adagrad(optimizer: torch.optim.Adagrad) -> None:
    """Give every parameter without state its first one: Adagrad makes it at construction only."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state.get(parameter):
                device = parameter.device if group.get("fused") else torch.device("cpu")
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=device),
                    "sum": torch.full_like(parameter, group["initial_accumulator_value"]),
                }


def hold(
    optimizer: Optimizer, parameters: Parameters, before: Parameters, names: list[list[str | None]]
) -> None:
    """Fill the optimizer's groups with the parameters that `names` lists.

    Args:
        optimizer: edited in place.
        parameters: the model's by name.
        before: those when the optimizer was last right.
        names: for each group; `None` stands for a parameter that is not the model's (a criterion's,
            say). Those keep their order among themselves.

    Raises:
        TrackerError: if the names do not fit; nothing has moved.
    """
    groups = optimizer.param_groups
    ours = {id(p) for p in (*parameters.values(), *before.values())}
    foreign = [[p for p in group["params"] if id(p) not in ours] for group in groups]
    unknown = sorted({n for group in names for n in group if n is not None} - parameters.keys())
    fault = None
    if unknown:
        fault = f"the model has no parameter {unknown[0]!r}; load its state dict first"
    elif len(groups) != len(names):
        fault = f"the optimizer has {counted(len(groups), 'parameter group')}, not {len(names)}"
    elif [len(rest) for rest in foreign] != [group.count(None) for group in names]:
        fault = "the optimizer's groups hold another number of parameters from elsewhere"
    if fault:
        raise TrackerError(f"the saved tracker does not fit: {fault}")
    for group, rest, wanted in zip(groups, foreign, names, strict=True):
        others = iter(rest)
        group["params"][:] = [next(others) if n is None else parameters[n] for n in wanted]


def return_to(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state dict, and let the groups stay the same dicts, and rates the same tensors."""
    outer, groups = optimizer.param_groups, list(optimizer.param_groups)
    optimizer.load_state_dict(copy.deepcopy(dict(state)))
    for group, loaded in zip(groups, optimizer.param_groups, strict=True):
        for key, value in loaded.items():
            if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                group[key].copy_(value)
            else:
                group[key] = value
    outer[:] = groups
    optimizer.param_groups = outer


class Schedule:
    """The learning rates and the scheduler as they were at the start, to step and to return to.

    Args:
        optimizer: whose groups hold the rates.
        scheduler: any scheduler of torch, or None.
        stepping: who steps it: `"epoch"` the tracker, `"batch"` the user's loop, `"auto"` the
            tracker unless the scheduler is seen to move between two calls of the tracker.

    Raises:
        TrackerError: if the scheduler belongs to another optimizer or is no scheduler.
    """

    def __init__(self, optimizer: Optimizer, scheduler: Any, stepping: Stepping) -> None:
        if scheduler is not None:
            owner = getattr(scheduler, "optimizer", optimizer)
            methods = ("step", "state_dict", "load_state_dict")
            if not all(callable(getattr(scheduler, name, None)) for name in methods):
                raise TrackerError(
                    "scheduler must be a learning-rate scheduler with step(), state_dict() and "
                    f"load_state_dict(), got {type(scheduler).__name__}"
                )
            if owner is not optimizer:
                raise TrackerError(
                    f"scheduler ({type(scheduler).__name__}) steps another optimizer than the one "
                    "given"
                )
        if stepping not in ("auto", "epoch", "batch"):
            raise TrackerError(
                f"scheduler_steps must be 'auto', 'epoch' or 'batch', got {stepping!r}"
            )
        self.optimizer, self.scheduler, self.stepping = optimizer, scheduler, stepping
        self._rates = [
            {key: copy.deepcopy(group[key]) for key in _SCHEDULED & group.keys()}
            for group in optimizer.param_groups
        ]
        self._start = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
        self._seen = self._position()

    def observe(self) -> None:
        """Find out who steps the scheduler; called first thing in every `tracker.step`."""
        if self.stepping == "auto" and self._position() != self._seen:
            self.stepping = "batch"

    def step(self, score: float) -> None:
        """Step an epoch scheduler; one that the user's loop steps is left alone."""
        if self.scheduler is not None and self.stepping != "batch":
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(score)
            else:
                self.scheduler.step()
        self._seen = self._position()

    def reset(self) -> None:
        """Return rates and schedule to where they were at the start."""
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(self._start))
        for group, rates in zip(self.optimizer.param_groups, self._rates, strict=False):
            for key, value in rates.items():
                if isinstance(group[key], Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = copy.deepcopy(value)
        self._seen = self._position()

    def scale(self, factor: float) -> None:
        """Multiply the rates, and those that the schedule is derived from, by `factor`."""
        for group in self.optimizer.param_groups:
            for key in _RATES & group.keys():
                if isinstance(group[key], Tensor):
                    group[key].mul_(factor)
                else:
                    group[key] = group[key] * factor
        for part in self.parts()[1:]:
            for key in ("base_lrs", "max_lrs"):
                rates = getattr(part, key, None)
                if isinstance(rates, list):
                    setattr(part, key, [rate * factor for rate in rates])

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule stands and where it started."""
        return {
            "stepping": self.stepping,
            "rates": copy.deepcopy(self._rates),
            "start": copy.deepcopy(self._start),
            "scheduler": None
            if self.scheduler is None
            else copy.deepcopy(self.scheduler.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state` left off; the rates themselves are part of the optimizer's state.

        Raises:
            TrackerError: if one has a scheduler and the other has none.
        """
        if (state["scheduler"] is None) != (self.scheduler is None):
            there, here = (
                "no scheduler" if missing else "a scheduler"
                for missing in (state["scheduler"] is None, self.scheduler is None)
            )
            raise TrackerError(
                f"the saved tracker had {there}, this one has {here}; give it the same parts"
            )
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        self.stepping = state["stepping"]
        self._rates, self._start = copy.deepcopy(state["rates"]), copy.deepcopy(state["start"])
        self._seen = self._position()

    def parts(self) -> list[Any]:
        """Return this object, the scheduler, and the schedulers that it is made of."""

        def nested(scheduler: Any) -> list[Any]:
            inner = getattr(scheduler, "_schedulers", ())
            return [scheduler, *(part for child in inner for part in nested(child))]

        return [self] if self.scheduler is None else [self, *nested(self.scheduler)]

    def _position(self) -> tuple[Any, ...]:
        """Return what moves when the scheduler is stepped, whatever its class."""
        counters = ("last_epoch", "_step_count")
        return tuple(getattr(part, name, None) for part in self.parts()[1:] for name in counters)
