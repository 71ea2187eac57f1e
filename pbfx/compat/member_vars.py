"""The state of a tracker under the names that `perforatedai` keeps it by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pbfx import Epoch, Phase
from pbfx.compat.hints import UnknownNameError, nearest
from pbfx.compat.run_folder import first_epochs, running_scores
from pbfx.compat.spelling import snake


class UnknownVariableError(UnknownNameError, KeyError):
    """A script asks for a variable of the tracker that has no counterpart."""

    def __str__(self) -> str:
        return str(self.args[0])


class MemberVars(Mapping[str, Any]):
    """What scripts read as `pai_tracker.member_vars[...]`; made when it is read.

    Args:
        tracker: the script's, whose state it is.
    """

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def __getitem__(self, name: str) -> Any:
        known = _VARIABLES.get(snake(name))
        if known is None:
            raise UnknownVariableError(
                f"pbfx.compat: the tracker has no variable {name!r}; {nearest(name, _VARIABLES)}"
            )
        return known(self._tracker)

    def __iter__(self) -> Iterator[str]:
        return iter(_VARIABLES)

    def __len__(self) -> int:
        return len(_VARIABLES)


def _scores(history: tuple[Epoch, ...], *phases: Phase) -> list[float]:
    return [epoch.score for epoch in history if epoch.phase in phases]


def _best(tracker: Any, epochs: list[Epoch]) -> float:
    scores = [epoch.score for epoch in epochs if epoch.phase is Phase.NEURON]
    return (max if tracker.maximize else min)(scores, default=0.0)


def _cycle(tracker: Any) -> list[Epoch]:
    """Return the epochs since the last change of structure."""
    history = tracker.history
    if not history or history[-1].action != "continue":
        return []
    return [epoch for epoch in history if epoch.cycle == history[-1].cycle]


def _extras(tracker: Any) -> dict[str, list[Any]]:
    rows = [] if tracker.record is None else tracker.record.extras
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row[name] for row in rows if name in row] for name in names}


def _mode(tracker: Any) -> str:
    dendritic = tracker.tracker is not None and tracker.tracker.phase is Phase.DENDRITE
    return "p" if dendritic else "n"


_VARIABLES: dict[str, Callable[[Any], Any]] = {
    "mode": _mode,
    "doing_pai": lambda t: not t.plain,
    "maximizing_score": lambda t: t.maximize,
    "switch_mode": lambda t: t.settings.now("switch_mode"),
    "num_dendrites_added": lambda t: t.dendrites,
    "num_cycles": lambda t: sum(epoch.action != "continue" for epoch in t.history),
    "num_dendrite_tries": lambda t: t.history[-1].attempt if t.history else 0,
    "num_epochs_run": lambda t: len(t.history) - 1,
    "total_epochs_run": lambda t: len(t.history) - 1,
    "epoch_last_improved": lambda t: max(
        (e.number - 1 for e in t.history if e.improved), default=0
    ),
    "accuracies": lambda t: [epoch.score for epoch in t.history],
    "n_accuracies": lambda t: _scores(t.history, Phase.NEURON),
    "p_accuracies": lambda t: _scores(t.history, Phase.DENDRITE),
    "running_accuracies": lambda t: running_scores(t.history, t.settings.now("history_lookback")),
    "current_best_validation_score": lambda t: _best(t, _cycle(t)),
    "global_best_validation_score": lambda t: _best(t, list(t.history)),
    "param_counts": lambda t: [epoch.parameters for epoch in first_epochs(t.history)],
    "switch_epochs": lambda t: [epoch.number - 2 for epoch in first_epochs(t.history)[1:]],
    "training_learning_rates": lambda t: [epoch.learning_rates[0] for epoch in t.history],
    "extra_scores": _extras,
    "optimizer_instance": lambda t: t.optimizer,
    "scheduler_instance": lambda t: t.scheduler,
}
