"""Train the candidates of one site from the errors that `loss.backward()` delivers.

The learner lives in hooks that fire when a backward pass has left its results in the candidates'
parameters. It takes them away at once, so the user's optimizer, gradient clipping, accumulation and
loss scaling find nothing to act on: the gradients are gone, and the one parameter that stays in the
user's optimizer, `moments`, holds a zero gradient. (It stays because a GradScaler insists on
finding a gradient; it is made infinite when the batch was, so that the scaler backs off as it
should.)

Batches take turns. Most of them learn: they update the running moments, which give the sign of the
covariance, and step the candidates. Every m-th only measures: candidates are ranked, and stopped,
on batches that they did not learn from. Nothing here reads a value back to the host before
`measure`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pbfx.config import Config
from pbfx.dendrites import Candidates
from pbfx.learning.moments import Statistics, statistics
from pbfx.learning.scaling import resume_scaling, scale_candidates
from pbfx_kernels import Moment


class SiteLearner:
    """The optimizer, hooks and counters behind one site's candidates.

    Args:
        candidates: the pool; its buffers are this learner's memory.
        config: step size, priming, decay, and how often a batch only measures.
    """

    def __init__(self, candidates: Candidates, config: Config) -> None:
        self.candidates, self.config = candidates, config
        self.batches = 0
        # Fused, because only that one can be told on the device to skip a step (`found_inf`): with
        # a zero gradient Adam still moves, by its momentum.
        self._adam = torch.optim.Adam(candidates.learnt(), lr=config.candidate_lr, fused=True)
        self._arrived: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Start to listen to backward passes."""
        awaited = [*self.candidates.learnt(), self.candidates.moments]
        expected = {id(parameter) for parameter in awaited}

        def arrived(parameter: Tensor) -> None:
            # One backward pass fires each hook once, in the same order as the last; the last acts.
            self._arrived.add(id(parameter))
            if self._arrived == expected:
                self._arrived.clear()
                self._consume()

        self._handles = [p.register_post_accumulate_grad_hook(arrived) for p in awaited]

    def detach(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._arrived.clear()

    @torch.no_grad()
    def _consume(self) -> None:
        """Take this backward pass's moments and gradients away, and learn or measure."""
        pool = self.candidates
        assert pool.moments.grad is not None
        sums = pool.moments.grad.view(len(Moment), pool.count, -1)
        # A loss scaler's overflow makes a batch infinite. It must leave no trace here, without a
        # sync.
        finite = torch.isfinite(sums).all()
        sums = torch.where(finite, sums, torch.zeros_like(sums))
        self.batches += 1
        if self.batches % self.config.measure_every == 0:
            pool.heldout.add_(sums)
            pool.heldout_batches.add_(finite)
        else:
            if self.batches > self.config.priming_batches:
                self._adam.found_inf = torch.where(finite, 0.0, 1.0)  # pyright: ignore[reportAttributeAccessIssue]
                # The op averages over its positions. A small last batch would count as much as a
                # full one, and its noise would rule Adam's second moment: weigh it by its size.
                usual = pool.running[Moment.COUNT, 0, 0] / pool.running_batches.clamp_min(1)
                share = usual.clamp_min(1) / sums[Moment.COUNT, 0, 0].clamp_min(1)
                # The kernel reads float32, whatever the model's dtype.
                self._adam.grad_scale = share.float()  # pyright: ignore[reportAttributeAccessIssue]
                self._adam.step()
            decay = torch.where(finite, self.config.moment_decay, 1.0)
            pool.running.mul_(decay).add_(sums)
            pool.running_batches.mul_(decay).add_(finite)
            self._steer()
        for parameter in pool.parameters():
            parameter.grad = None
        scale_candidates(pool, self.batches, self.config)
        overflow = torch.where(finite, 0.0, torch.inf).to(pool.moments.dtype)
        pool.moments.grad = overflow.expand_as(pool.moments).clone()

    def _steer(self) -> None:
        """Point each candidate's gradient uphill in |Cov|, in units of the neuron's error.

        Dividing by the error's spread makes the step independent of the loss's scale: of batch
        size, of the number of positions, and of a loss scaler.
        """
        pool, now = self.candidates, statistics(self.candidates.running)
        spread = now.error_variance.sqrt()
        known = spread > 0
        direction = torch.where(known, now.covariance.sign() / torch.where(known, spread, 1.0), 0.0)
        # Through `.data`, because graphs of later forwards of the same step may still hold these.
        pool.direction.data.copy_(direction)
        pool.error_mean.data.copy_(now.error_mean[0])

    @torch.no_grad()
    def measure(self) -> float | None:
        """Close an epoch: remember the best candidates, and start a new measurement.

        Returns:
            The mean over neurons of the best candidate's |correlation| with the error on the
            batches of this epoch that only measured, or None if there was none.
        """
        pool = self.candidates
        if not bool(pool.heldout_batches):
            return None
        score = statistics(pool.heldout).correlation.abs()
        better = score > pool.best_score
        pool.best_score.copy_(torch.where(better, score, pool.best_score))
        pool.best_moments.copy_(torch.where(better, pool.heldout, pool.best_moments))
        pool.best_batches.copy_(torch.where(better, pool.heldout_batches, pool.best_batches))
        for name in ("weight", "bias"):
            live, best = getattr(pool, name), getattr(pool, f"best_{name}")
            if live is not None:
                rows = better if name == "bias" else pool.site.along_weight(better)
                best.copy_(torch.where(rows, live, best))
        pool.best_to_dendrite.copy_(
            torch.where(better[:, None, :], pool.to_dendrite, pool.best_to_dendrite)
        )
        pool.heldout.zero_()
        pool.heldout_batches.zero_()
        return float(score.amax(0).mean())

    @torch.no_grad()
    def chosen(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the best candidate of each neuron: weight (*W), bias (N,) or None, to_dendrite
        (D, N).

        Where no batch ever measured, or every candidate of a neuron is constant, the first stands
        in.
        """
        pool = self.candidates
        winner = pool.best_score.argmax(0)
        neurons = torch.arange(winner.numel(), device=winner.device)
        best_bias = pool._buffers["best_bias"]
        bias = None if best_bias is None else best_bias[winner, neurons]
        rows = pool.site.along_weight(winner[None]).expand(1, *pool.site.shape)
        weight = pool.best_weight.gather(0, rows)[0]
        return weight, bias, pool.best_to_dendrite[winner, :, neurons].T

    @torch.no_grad()
    def prospects(self) -> tuple[Statistics, Tensor]:
        """Return what was measured of the candidates that `chosen` returns.

        Returns:
            Their statistics, each (N,), and the predicted gradient ∂L/∂T (N,) of a mean batch loss
            at T = 0: a small step `-ε ∂L/∂T` changes the loss by `-ε Σ (∂L/∂T)²`. Under a loss
            scaler both are those of the scaled loss.
        """
        pool = self.candidates
        winner = pool.best_score.argmax(0, keepdim=True)
        picked = pool.best_moments.gather(1, winner.expand(len(Moment), 1, -1))
        batches = pool.best_batches.gather(0, winner)[0].clamp_min(1)
        found = statistics(picked)
        row = Statistics(*(getattr(found, name)[0] for name in Statistics.__dataclass_fields__))
        return row, row.total / batches

    def state_dict(self) -> dict[str, Any]:
        """Return what the candidates' buffers do not hold: Adam's state and the batch counter."""
        return {"batches": self.batches, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state` left off."""
        self.batches = int(state["batches"])
        self._adam.load_state_dict(state["adam"])
        resume_scaling(self.candidates, self.batches, self.config)
