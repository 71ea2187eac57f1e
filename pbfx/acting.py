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
from pbfx.parts import Survey, Walk, parts_of, survey, walk
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
        parameters: those that the optimizer is in line with, by name.
        frozen: what the dendrite phase that has begun has frozen; None if none has.
        learners: of its candidates, not attached yet.
        search: for a learning rate, if one has begun.
    """

    found: Survey
    parameters: dict[str, nn.Parameter]
    frozen: Frozen | None
    learners: dict[str, SiteLearner]
    search: Search | None


def carry_out(
    decision: Decision,
    run: Run,
    before: Listening,
    parts: tuple[Walk, Optimizer, Schedule],
    resets: Resets,
    new_search: Callable[[int], Search | None],
) -> Outcome:
    """Change model, optimizer and schedule as `decision` says.

    Args:
        decision: any but to continue.
        run: where it stands; it does not move.
        before: what the phase that ends has attached to the model.
        parts: what is changed, the model as a walk has just found it.
        resets: what starts again after a growth.
        new_search: begins a search for a learning rate, given the number of dendrites, where that
            is wanted.

    Raises:
        RestructureError: from whatever failed; everything is then as it was before.
    """
    found, optimizer, schedule = parts
    model = found.model
    over = decision.action is Action.COMPLETE
    source = run.current if decision.action is Action.GROW else run.kept(decision)
    start = run.test.start if over and run.test is not None else None
    if start is not None:
        source = start.network
    frozen, learners, search = None, {}, None
    # Promotion makes new tensors; all else returns to a snapshot, which is copied into old ones.
    values = decision.action is not Action.PROMOTE
    with undoing(*parts, values=values):
        known = found.parameters()
        if decision.action is Action.PROMOTE:
            assert before.frozen is not None
            restructure.promote(found, before.learners)
            found = walk(model)
            restructure.thaw(found, before.frozen)
        else:
            assert source is not None
            found = source.restore(found)
            if before.frozen is not None:
                restructure.thaw(found, before.frozen)
            if decision.action is Action.FINISH or run.finishing:
                restructure.set_finishing(found, decision.action is Action.FINISH)
            elif not over:
                frozen, learners = _grow(found)
                found = walk(model)
        now = survey(found)
        if not over:
            if at(resets.learning_rate, now.dendrites):
                schedule.reset()
            if at(resets.optimizer_state, now.dendrites):
                optimizer.state.clear()
        known = restructure.synchronise(optimizer, known, found)
        if start is not None:
            start.restore(model, optimizer, schedule)
            now = survey(model)
            for path, part in now.parts.items():
                part.perforation.draws = start.draws[path]
            show_figures(now.parts, ())
        elif not over and not learners and decision.action is not Action.FINISH:
            search = new_search(now.dendrites)
    return Outcome(now, known, frozen, learners, search)


def _grow(found: Walk) -> tuple[Frozen | None, dict[str, SiteLearner]]:
    """Start a dendrite phase, or add dendrites at once where the mode of learning has none."""
    parts = parts_of(found).values()
    if grows_at_once(parts):
        for part in parts:
            grow_part(part, 1, dict.fromkeys(site.name for site in part.perforation.sites))
        return None, {}
    return restructure.start_dendrite_phase(found)
