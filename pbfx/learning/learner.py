"""Train the candidates of one site from the errors that `loss.backward()` delivers.

A hook notes that a backward pass has left its results in the candidates' parameters, and at the end
of the pass the learners of all sites that it reached take them away together. So the user's
optimizer, gradient clipping, accumulation and loss scaling find nothing to act on: the gradients
are gone, and the one parameter that stays in the user's optimizer, `moments`, holds a zero
gradient. (It stays because a GradScaler insists on finding a gradient; it is made infinite when the
batch was, so that the scaler backs off as it should.)

Batches take turns. Most of them learn: they update the running moments, which give the sign of the
covariance, and step the candidates. Every m-th only measures: candidates are ranked, and stopped,
on batches that they did not learn from. Turns are counted and decided on the device, and nothing
here reads a value back to the host before `measure`: a captured CUDA graph of a training step
learns and measures in turn as the step itself would.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pbfx.candidates import Candidates
from pbfx.config import Config
from pbfx.copies import Filling
from pbfx.errors import RestructureError
from pbfx.figures import SiteFigures
from pbfx.learning.adam import Adam
from pbfx.learning.cohort import Cohort
from pbfx.learning.epoch import Chosen, chosen, measure, numbers, picked, promises
from pbfx.learning.evidence import Evidence, collect, judge, weigh
from pbfx.learning.moments import Statistics, statistics
from pbfx.learning.scaling import resume_scaling, scale_candidates, scaling_batches
from pbfx.wording import counted
from pbfx_kernels import Moment
from pbfx_kernels.booking import Memory, Rules, Tables, Verdict, is_capturing
from pbfx_kernels.turns import addresses_of, places, take_turns

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SiteLearner:
    """The optimizer, hook and counter behind one site's candidates.

    Args:
        candidates: the pool; its buffers are this learner's memory.
        config: step size, priming, decay, and how often a batch only measures.
        cohort: the learners to step together with; alone if None.
        filling: writes the zeros that all is counted from, with those of others; here if None.
    """

    _turns: Tensor

    def __init__(
        self,
        candidates: Candidates,
        config: Config,
        cohort: Cohort | None = None,
        filling: Filling | None = None,
    ) -> None:
        self.candidates, self.config = candidates, config
        phase = config.phase(candidates.dendrites)
        self.rules = Rules(phase.measure_every, phase.priming_batches, phase.moment_decay)
        self._cohort = new_cohort() if cohort is None else cohort
        memory = Filling() if filling is None else filling
        memory.place(vars(self), "_turns", candidates.moments, (), torch.int64)
        self.evidence = Evidence(candidates.moments, memory)
        self._parameters = [p for p in candidates._parameters.values() if p is not None]
        self._learnt = candidates.learnt()
        self._adam = Adam(self._learnt, phase.candidate_lr, memory)
        if filling is None:
            memory.fill()
        self._line: tuple[tuple[int, ...], Tensor | None] = (), None
        self._handle: RemovableHandle | None = None
        # Of the processes that train the model together, if there are several.
        self.group: ProcessGroup | None = None

    @property
    def batches(self) -> int:
        """Batches so far. Reading it waits for the device."""
        return int(self._turns)

    def learn_as(self, stand_in: nn.Parameter) -> None:
        """Step `stand_in` in place of the candidates' weight, from the first batch on.

        Who asks for it gives it its gradient within each backward pass, and writes the weight from
        it after the pass. The state dict then holds Adam's state of what is stepped.

        Args:
            stand_in: on the weight's device.
        """
        self._parameters.append(stand_in)
        self._learnt = [stand_in, *(p for p in self._learnt if p is not self.candidates.weight)]
        memory = Filling()
        self._adam = Adam(self._learnt, self._adam.lr, memory)
        memory.fill()

    def attach(self) -> None:
        """Start to listen to backward passes."""
        # All gradients of the pool come from one node of the graph, so one parameter speaks for it.
        self._handle = self.candidates.moments.register_post_accumulate_grad_hook(
            lambda _: self._cohort.reach(self)
        )

    def detach(self) -> None:
        """Stop listening."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self._cohort.forget()

    def kind(self) -> Hashable:
        """Return what learners must have in common to take their turns in one launch."""
        moments = self.candidates.moments
        return self.rules, moments.device, moments.dtype

    def memory(self) -> tuple[Memory, Tensor | None]:
        """Return the site's memory with the sums of this pass, and its addresses."""
        pool, buffers = self.candidates, self.candidates._buffers
        assert pool.moments.grad is not None
        known: dict[str, Any] = {name: buffers[name] for name in _MEMORY}
        steps = tuple(state["step"] for state in self._adam.state)
        line = buffers["regression"]
        memory = Memory(
            sums=pool.moments.grad, **known, turns=self._turns, steps=steps, regression=line
        )
        where = places(memory)
        if where != self._line[0]:
            self._line = where, addresses_of(memory)
        return memory, self._line[1]

    def finish(self, verdict: Verdict) -> None:
        """Step the candidates if the batch was one to learn from, and take all gradients away."""
        self._step(verdict)
        for parameter in self._parameters:
            parameter.grad = None
        self._scale()
        self.candidates.moments.grad = verdict.overflow

    def _scale(self) -> None:
        """Scale candidates that join after a norm, once enough batches have shown how.

        Raises:
            RestructureError: if a CUDA graph is being captured before that; it would go on
                measuring the scale for ever.
        """
        # It counts on the host: scaling is once, and a graph captured after it holds none of it.
        spread = self.candidates.spread
        if spread is None or not spread.open:
            return
        if is_capturing(self._turns):
            due = scaling_batches(self.config, self.candidates.dendrites)
            raise RestructureError(
                "the dendrite phase cannot be captured in a CUDA graph yet: candidates that join "
                f"after a norm are scaled after {counted(due, 'batch', 'batches')}, and this is "
                f"batch {spread.batches + 1}; run {counted(due, 'training step')} first"
            )
        scale_candidates(self.candidates, self.config, self.group)

    def _step(self, verdict: Verdict) -> None:
        """Do a step of Adam with gradients divided by `share`, or none at all, on the device."""
        adam = self._adam
        beta1, beta2 = adam.betas
        # Its kernel takes tensors of one dtype.
        alike: dict[torch.dtype, list[tuple[Tensor, Tensor, dict[str, Tensor]]]] = {}
        for parameter, state in zip(self._learnt, adam.state, strict=True):
            if parameter.grad is not None:
                learnt = parameter, parameter.grad, state
                alike.setdefault(parameter.dtype, []).append(learnt)
        for together in alike.values():
            parameters, gradients, states = (list(each) for each in zip(*together, strict=True))
            _fused_adam_(
                parameters,
                gradients,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                lr=adam.lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=adam.weight_decay,
                eps=adam.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=verdict.share,
                found_inf=verdict.idle,
            )

    def measure(self) -> float | None:
        """Close an epoch at this site alone; see `pbfx.learning.epoch.measure`."""
        return measure([self.candidates])[0]

    def chosen(self) -> Chosen:
        """Return the best candidate of each neuron; see `pbfx.learning.epoch.chosen`."""
        return chosen([self.candidates])[0]

    @torch.no_grad()
    def prospects(self) -> tuple[Statistics, Tensor]:
        """Return what was measured of the candidates that `chosen` returns.

        Returns:
            Their statistics, each (N,), and the predicted gradient ∂L/∂T (N,) of a mean batch loss
            at T = 0: a small step `-ε ∂L/∂T` changes the loss by `-ε Σ (∂L/∂T)²`. Under a loss
            scaler both are those of the scaled loss.
        """
        picked, batches = self._picked()
        found = statistics(picked)
        row = Statistics(*(getattr(found, name)[0] for name in Statistics.__dataclass_fields__))
        return row, row.total / batches

    def figures(self, name: str, correlation: float | None) -> SiteFigures:
        """Return what the candidates promise, as plain numbers. Waits for the device.

        Args:
            name: the site's full path.
            correlation: what `measure` has returned.
        """
        return figures_of({name: self}, {name: correlation})[0]

    @torch.no_grad()
    def first_link(self, share: float) -> Tensor:
        """Return the links (N,) that `share` of a Newton step from zero gives to `chosen`.

            T = -share · Σ a g / (P Σ a² E[g²])        sums over the P positions of a mean batch

        The curvature is a bound. Let the loss be the mean over B samples of a negative
        log-likelihood: its ∂²L/∂T² is then about the mean square of a sample's gradient (the
        empirical Fisher information), B Σ_i (Σ_{p in i} a g)². By Cauchy and Schwarz that is at
        most P Σ a² g², and exactly that where a sample has one position; and a² and g² are taken
        for independent. So the step is too short rather than too long.

        Zero where nothing was measured, or the chosen candidate is constant.

        Args:
            share: of the full step, in (0, 1].
        """
        picked, batches = self._picked()
        positions = picked[Moment.COUNT] / batches
        curvature = positions * picked[Moment.AA] * picked[Moment.GG] / picked[Moment.COUNT]
        known = statistics(picked).correlation != 0
        link = -share * picked[Moment.AG] / torch.where(known, curvature, 1.0)
        return torch.where(known, link, 0.0)[0].to(self.candidates.weight.dtype)

    def _picked(self) -> tuple[Tensor, Tensor]:
        """Return the moments (6, 1, N) of the chosen candidates, and of how many batches (N,)."""
        ((_, moments, batches),) = picked([self.candidates])
        return moments, batches

    def state_dict(self) -> dict[str, Any]:
        """Return what the candidates' buffers do not hold: Adam's state, counter and evidence."""
        return {
            "batches": self.batches,
            "adam": self._adam.state_dict(),
            "evidence": self.evidence.sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state` left off."""
        self._turns.fill_(int(state["batches"]))
        self._adam.load_state_dict(state["adam"])
        # Files that were written before there was any have none.
        if "evidence" in state:
            self.evidence.sums.copy_(state["evidence"])
        resume_scaling(self.candidates, int(state["batches"]), self.config)


# The kernel of `torch.optim.Adam(fused=True)`, which has no public name of its own.
_fused_adam_: Any = torch._fused_adam_  # pyright: ignore[reportPrivateImportUsage]

# The buffers of candidates that a turn reads and edits, by their names in `Memory`.
_MEMORY = (
    "running",
    "running_batches",
    "heldout",
    "heldout_batches",
    "direction",
    "error_mean",
)


def measure_all(learners: Mapping[str, SiteLearner]) -> dict[str, float | None]:
    """Close an epoch at all of these sites; see `pbfx.learning.epoch.measure`."""
    scores = measure([learner.candidates for learner in learners.values()])
    return dict(zip(learners, scores, strict=True))


def reached(learners: Mapping[str, SiteLearner]) -> dict[str, SiteLearner]:
    """Return those that an error has reached. Waits for the device."""
    turns = numbers([learner._turns for learner in learners.values()])
    return {name: learners[name] for name, batches in zip(learners, turns, strict=True) if batches}


def figures_of(
    learners: Mapping[str, SiteLearner], correlations: Mapping[str, float | None]
) -> tuple[SiteFigures, ...]:
    """Return what the candidates of each site promise, as plain numbers. Waits for the device.

    Args:
        learners: by the full path of the site.
        correlations: what `measure_all` has returned, by the same.
    """
    promised = promises([learner.candidates for learner in learners.values()])
    judged = judge(
        [learner.evidence for learner in learners.values()], [each.spread for each in promised]
    )
    found = []
    for (name, learner), promise, evidence in zip(learners.items(), promised, judged, strict=True):
        pool, (heldout, batches, p_value) = learner.candidates, evidence
        found.append(
            SiteFigures(
                site=name,
                neurons=pool.site.neurons,
                parameters=pool.site.dendrite_parameters(pool.dendrites),
                correlation=correlations[name],
                gain=promise.gain,
                slope=promise.slope,
                heldout=heldout,
                heldout_batches=batches,
                p_value=p_value,
            )
        )
    return tuple(found)


@torch.no_grad()
def learn(learners: Sequence[SiteLearner], tables: Tables) -> None:
    """Take one backward pass's moments and gradients away from all sites, and learn or measure.

    Args:
        learners: those that the pass has reached.
        tables: what `take_turns` remembers of them from pass to pass.
    """
    alike: dict[Hashable, list[SiteLearner]] = {}
    for learner in learners:
        alike.setdefault(learner.kind(), []).append(learner)
    for together in alike.values():
        memories, addresses = zip(*(learner.memory() for learner in together), strict=True)
        # Read before the batch is booked, which may overwrite its sums and decides its turn.
        weighed = weigh([(m.sums, m.direction, m.heldout_batches) for m in memories])
        verdicts = take_turns(memories, addresses, together[0].rules, tables)
        evidence = [learner.evidence for learner in together]
        collect(evidence, weighed, [memory.heldout_batches for memory in memories])
        for learner, verdict in zip(together, verdicts, strict=True):
            learner.finish(verdict)


def new_cohort() -> Cohort:
    """Return a cohort whose members are site learners."""
    tables: Tables = {}
    return Cohort(lambda learners: learn(learners, tables))
