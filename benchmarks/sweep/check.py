"""What happens to one model, in a process of its own."""

from __future__ import annotations

import collections
import dataclasses
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pbfx
from benchmarks.gate import same_bits
from benchmarks.sweep.language import build_transformers
from benchmarks.sweep.subject import Name, NotBuilt, Subject
from benchmarks.sweep.vision import build_timm, build_torchvision
from benchmarks.weights import left_out, nearest_owner, weights_read
from pbfx.errors import PbfxError
from pbfx.parts import parts_of

BUILDERS: dict[str, Callable[[str], Subject]] = {
    "torchvision": build_torchvision,
    "timm": build_timm,
    "transformers": build_transformers,
}
# Stages, in the order in which a model passes them. Up to PLAIN, pbfx has no part in what fails.
BUILD, PLAIN, TRANSFORM, COMPARE = "build", "plain", "transform", "compare"
# Answers to "are the outputs the same?".
YES, NO, VARIES = "yes", "no", "the plain model varies"
# Comparing takes as long as running the plain model does; a model that is slow by itself must not
# look as if pbfx had made it so.
MAX_PLAIN_SECONDS = 20.0
# A loss that pbfx.explain does not mention.
UNSAID = "NO REASON GIVEN"
_REASON = 300


@dataclasses.dataclass
class Finding:
    """One row of the sweep, without the name. What was not reached is None.

    Attributes:
        outcome: transformed, refused (by a PbfxError), crashed (any other exception), or not built.
        settings: how the model was built and fed.
        rungs: how often each rung was used, in words.
        sites: how many places can carry dendrites.
        parameters: of the model.
        linear_conv: parameters that linear and conv ops read, counted by `weights_read`.
        covered_percent: share of them that sites own.
        identical_eval: whether transformed and plain outputs are equal bit for bit; likewise
            `identical_train`, with equal random streams, and `unchanged_grown`, after one dendrite
            more at every site.
        seconds_transform: of `pbfx.transform` alone.
        new_mib: memory of parameters and buffers that the plain model has not; 0 if all is shared.
        left_out: the ops without dendrites, by reason.
        reason: why something failed.
    """

    outcome: str = "not built"
    settings: str | None = None
    rungs: str | None = None
    sites: int | None = None
    parameters: int | None = None
    linear_conv: int | None = None
    covered_percent: float | None = None
    identical_eval: str | None = None
    identical_train: str | None = None
    unchanged_grown: str | None = None
    seconds_transform: float | None = None
    new_mib: float | None = None
    left_out: str | None = None
    reason: str | None = None


def check(name: Name, seed: int, reached: Callable[[str], None]) -> Finding:
    """Build a model, transform it, compare; `reached` is told each stage as it begins."""
    finding = Finding()
    stage = BUILD
    try:
        reached(stage)
        seed_all(seed)
        subject = BUILDERS[name.library](name.model)
        finding.settings = subject.settings
        stage = PLAIN
        reached(stage)
        started = time.perf_counter()
        plain = _Plain(subject, seed)
        _check_pace(time.perf_counter() - started)
        finding.parameters = sum(p.numel() for p in subject.model.parameters())
        finding.linear_conv = plain.linear_conv
        stage = TRANSFORM
        reached(stage)
        started = time.perf_counter()
        model = pbfx.transform(subject.model)
        finding.seconds_transform = time.perf_counter() - started
        _describe(finding, model, plain)
        finding.outcome = "transformed"
        stage = COMPARE
        reached(stage)
        _compare(finding, model, plain)
    # One model's failure is a row of the table, whatever it is.
    except Exception as error:
        finding.reason = f"{stage}: {condensed(error)}"
        if stage in (BUILD, PLAIN):
            finding.outcome = "not built"
        elif stage == TRANSFORM and isinstance(error, PbfxError):
            finding.outcome = "refused"
        else:
            finding.outcome = "crashed"
    return finding


def _check_pace(seconds: float) -> None:
    if seconds > MAX_PLAIN_SECONDS:
        raise NotBuilt(
            f"too slow for the sweep: the plain model's runs took {seconds:.0f} s, limit "
            f"{MAX_PLAIN_SECONDS:.0f} s"
        )


class _Plain:
    """The plain model's outputs, and whether they are the same twice."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject, self.seed = subject, seed
        self.buffers = {id(b): (b, b.clone()) for b in subject.model.buffers()}
        self.reads = weights_read(subject.model, lambda: self.run(subject.model, True))
        self.linear_conv = sum(read.numel for read in self.reads)
        self.outputs = {mode: self.run(subject.model, mode) for mode in (True, False)}
        if not any(self.outputs.values()):
            raise NotBuilt("its outputs hold no tensors to compare")
        again = {mode: self.run(subject.model, mode) for mode in (True, False)}
        self.steady = {mode: equal(again[mode], self.outputs[mode]) for mode in (True, False)}

    def run(self, model: nn.Module, training: bool) -> list[Tensor]:
        """Return outputs of a forward from the same random streams and buffers as always."""
        with torch.no_grad():
            for buffer, value in self.buffers.values():
                buffer.copy_(value)
        args, kwargs = self.subject.train if training else self.subject.eval
        seed_all(self.seed)
        with torch.set_grad_enabled(training):
            outputs = tensors_of(model.train(training)(*args, **kwargs))
        return [out.detach() for out in outputs]


def _describe(finding: Finding, model: nn.Module, plain: _Plain) -> None:
    parts = parts_of(model)
    rungs = collections.Counter(part.perforation.rung for part in parts.values())
    finding.rungs = ", ".join(f"{count} {rung}" for rung, count in rungs.most_common())
    explanation = pbfx.explain(model)
    finding.sites = len(explanation.sites)
    said = {name: f"{op}: {reason}" for name, op, reason in explanation.skipped}
    missed = left_out(plain.reads, model)
    reasons = collections.Counter(nearest_owner(read.name, said) or UNSAID for read in missed)
    finding.left_out = "; ".join(f"{n} x {why}" for why, n in reasons.most_common(6)) or None
    if plain.linear_conv:
        missing = sum(read.numel for read in missed)
        finding.covered_percent = 100.0 * (1 - missing / plain.linear_conv)
    known = {
        t.data_ptr() for t in [*plain.subject.model.parameters(), *plain.subject.model.buffers()]
    }
    new = [t for t in [*model.parameters(), *model.buffers()] if t.data_ptr() not in known]
    finding.new_mib = sum(t.numel() * t.element_size() for t in new) / 2**20


def _compare(finding: Finding, model: nn.Module, plain: _Plain) -> None:
    def answer(training: bool) -> str:
        if equal(plain.run(model, training), plain.outputs[training]):
            return YES
        return NO if plain.steady[training] else VARIES

    finding.identical_eval, finding.identical_train = answer(False), answer(True)
    pbfx.grow(model)
    finding.unchanged_grown = answer(False)


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Return whether two lists of tensors are equal bit for bit."""
    return len(found) == len(expected) and all(map(same_bits, found, expected))


def seed_all(seed: int) -> None:
    """Set the three streams from which models draw."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in an output, in a fixed order; caches and other objects are passed by."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_of(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors_of(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in tensors_of(getattr(value, f.name))]
    return []


def condensed(error: BaseException) -> str:
    """Return an exception in one line, with the place in pbfx or the model where it arose."""
    traceback, where = error.__traceback__, ""
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if "/benchmarks/" not in code.co_filename:
            short = "/".join(code.co_filename.split("/")[-2:])
            where = f" [{short}:{traceback.tb_lineno}]"
        traceback = traceback.tb_next
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[: _REASON - len(where)] + where
