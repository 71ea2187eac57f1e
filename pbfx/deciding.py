"""From a situation to a decision that can be carried out.

The policy is asked, and has the first word. A search for a learning rate that is under way is not
interrupted; budgets decline what they do not allow; a growth of nothing, the wish for a last phase
and the end of all epochs turn what the policy said into something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from pbfx import restructure
from pbfx.budget import Budget
from pbfx.learning import SiteLearner
from pbfx.parts import Survey
from pbfx.perforated import PerforatedModule
from pbfx.phase import Phase
from pbfx.policy import (
    Action,
    Decision,
    PolicyLike,
    Situation,
    asked,
    finished,
    growth_epochs,
    possible,
)
from pbfx.run import Run


def decide(
    policy: PolicyLike,
    budget: Budget,
    run: Run,
    situation: Situation,
    model: nn.Module,
    found: Survey,
    learners: Mapping[str, SiteLearner],
) -> Decision:
    """Return what to do after the epoch that `situation` ends with. Only a search moves on.

    Args:
        policy: the user's.
        budget: likewise.
        run: where it stands; this epoch is not in its history yet.
        situation: what the policy is to judge.
        model: as it would grow.
        found: what a walk over it has found.
        learners: of its candidates; none in a neuron phase.

    Raises:
        TrackerError: if the policy decided what cannot be done.
    """
    spent = len(run.history) + 1
    if run.search is not None:
        decision = Decision(Action.CONTINUE, run.search.judge(situation.scores[-1]))
        return possible(budget.in_time(decision, situation, spent), situation)
    decision = asked(policy, situation)
    if isinstance(decision, Decision):
        grows = decision.action is Action.GROW and situation.phase is Phase.NEURON
        if grows and not situation.finishing:
            phases = not grows_at_once(found.parts.values())
            epochs = growth_epochs(policy, situation.dendrites, phases)
            decision = budget.affordable(decision, model, found, spent, epochs)
        if decision.action is Action.PROMOTE and learners:
            # A growth of nothing would go on for ever under a policy that counts dendrites.
            why = restructure.why_nothing_grows(found.walk, dict(learners))
            if why is not None:
                decision = Decision(Action.COMPLETE, f"{decision.reason}; {why}")
        wanted = any(p.perforation.config.finish for p in found.parts.values())
        kept = run.kept(decision)
        grown = kept is not None and kept.structure.dendrites > 0
        decision = finished(decision, situation, wanted and grown)
        decision = budget.in_time(decision, situation, spent)
    return possible(decision, situation)


def grows_at_once(parts: Iterable[PerforatedModule]) -> bool:
    """Return whether growing takes no dendrite phase."""
    return all(part.perforation.config.learning == "gradient" for part in parts)
