"""Carry out a decision on a model, its optimizer and its schedule: wholly, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from pbfx import restructure
from pbfx.by_hand import grow_part
from pbfx.deciding import grows_at_once
from pbfx.learning import SiteLearner
from pbfx.listening import Listening
from pbfx.measuring import show_figures
from pbfx.optimizers import Schedule
from pbfx.parts import Survey, parts_of, survey
from pbfx.policy import Action, Decision
from pbfx.rates import Search
from pbfx.restructure import Frozen
from pbfx.run import Run
from pbfx.settings import PerDendrite, at
from pbfx.undo import undoing


class Resets(NamedTuple):
    """What starts again after each growth, by the number of dendrites after it."""

    learning_rate: PerDendrite[bool]
    optimizer_state: PerDendrite[bool]


class Outcome(NamedTuple):
    """What a decision has come to.

    Attributes:
        found: by a walk over the model as it is now.
        frozen: what the dendrite phase that has begun has frozen; None if none has.
        learners: of its candidates, not attached yet.
        search: for a learning rate, if one has begun.
    """

    found: Survey
    frozen: Frozen | None
    learners: dict[str, SiteLearner]
    search: Search | None


def carry_out(
    decision: Decision,
    run: Run,
    before: Listening,
    parts: tuple[nn.Module, Optimizer, Schedule],
    resets: Resets,
    new_search: Callable[[int], Search | None],
) -> Outcome:
    """Change model, optimizer and schedule as `decision` says.

    Args:
        decision: any but to continue.
        run: where it stands; it does not move.
        before: what the phase that ends has attached to the model.
        parts: what is changed.
        resets: what starts again after a growth.
        new_search: begins a search for a learning rate, given the number of dendrites, where that
            is wanted.

    Raises:
        RestructureError: from whatever failed; everything is then as it was before.
    """
    model, optimizer, schedule = parts
    over = decision.action is Action.COMPLETE
    source = run.current if decision.action is Action.GROW else run.kept(decision)
    start = run.test.start if over and run.test is not None else None
    if start is not None:
        source = start.network
    frozen, learners, search = None, {}, None
    # Promotion makes new tensors; all else returns to a snapshot, which is copied into old ones.
    values = decision.action is not Action.PROMOTE
    with undoing(*parts, values=values):
        with restructure.synchronised(model, optimizer):
            if decision.action is Action.PROMOTE:
                assert before.frozen is not None
                restructure.promote(model, before.learners)
                restructure.thaw(model, before.frozen)
            else:
                assert source is not None
                source.restore(model)
                if before.frozen is not None:
                    restructure.thaw(model, before.frozen)
                if decision.action is Action.FINISH or run.finishing:
                    restructure.set_finishing(model, decision.action is Action.FINISH)
                elif not over:
                    frozen, learners = _grow(model)
            found = survey(model)
            if not over:
                if at(resets.learning_rate, found.dendrites):
                    schedule.reset()
                if at(resets.optimizer_state, found.dendrites):
                    optimizer.state.clear()
        if start is not None:
            start.restore(*parts)
            found = survey(model)
            for path, part in found.parts.items():
                part.perforation.draws = start.draws[path]
            show_figures(model, ())
        elif not over and not learners and decision.action is not Action.FINISH:
            search = new_search(found.dendrites)
    return Outcome(found, frozen, learners, search)


def _grow(model: nn.Module) -> tuple[Frozen | None, dict[str, SiteLearner]]:
    """Start a dendrite phase, or add dendrites at once where the mode of learning has none."""
    parts = parts_of(model).values()
    if grows_at_once(parts):
        for part in parts:
            grow_part(part, 1, dict.fromkeys(site.name for site in part.perforation.sites))
        return None, {}
    return restructure.start_dendrite_phase(model)
