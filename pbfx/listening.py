"""Who listens to the training loop: candidates' learners, and the hooks that hold the rest still.

In a dendrite phase the learners take away what backward passes bring, and whatever no graph holds
in eval is held there by hooks. In a neuron phase hooks of the optimizer hold older dendrites, where
only the newest are to learn.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pbfx import restructure
from pbfx.learning import SiteLearner, hold_older
from pbfx.parts import Walked, walk
from pbfx.restructure import Frozen


class Listening:
    """What the present phase has attached to a model and its optimizer.

    Args:
        model: in a neuron phase.
        optimizer: of its parameters.

    Attributes:
        frozen: what the dendrite phase has frozen; None in a neuron phase.
        learners: of its candidates, by the full path of the site; none in a neuron phase.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.frozen: Frozen | None = None
        self.learners: dict[str, SiteLearner] = {}
        self._holds: list[RemovableHandle] = hold_older(model.modules(), optimizer)

    def change(
        self,
        model: Walked,
        optimizer: Optimizer,
        frozen: Frozen | None,
        learners: dict[str, SiteLearner],
    ) -> None:
        """Detach all that has listened so far, and attach what the next phase needs."""
        for learner in self.learners.values():
            learner.detach()
        for handle in self._holds:
            handle.remove()
        self.frozen, self.learners = frozen, learners
        found = walk(model)
        self._holds = (
            restructure.hold_outside(found)
            if learners
            else hold_older(found.modules.values(), optimizer)
        )
        for learner in learners.values():
            learner.attach()

    def follow(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Go on with another optimizer."""
        if not self.learners:
            self.change(model, optimizer, None, {})

    def state_dict(self) -> dict[str, Any]:
        """Return what was frozen and what the learners know, as plain data and tensors."""
        frozen = self.frozen
        return {
            "frozen": None
            if frozen is None
            else {"learning": list(frozen.learning), "training": list(frozen.training)},
            "learners": {name: learner.state_dict() for name, learner in self.learners.items()},
        }


def resumed(
    model: nn.Module, state: dict[str, Any]
) -> tuple[Frozen | None, dict[str, SiteLearner]]:
    """Freeze `model` as it was, and return what `Listening.state_dict` described, to change to.

    Args:
        model: with the structure, and so the candidates, that it had.
        state: holds that state dict.
    """
    if state["frozen"] is None:
        return None, {}
    frozen = Frozen(*(tuple(state["frozen"][key]) for key in ("learning", "training")))
    restructure.freeze(model)
    learners = restructure.learners_of(model)
    for name, learner in learners.items():
        learner.load_state_dict(state["learners"][name])
    return frozen, learners
