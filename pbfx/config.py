"""What a user may ask of `pbfx.transform`, checked when it is said."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import nn

from pbfx.errors import ConfigError, nearest
from pbfx.settings import PerDendrite, at, freeze_lists

Learning = Literal["perforated", "gradient", "sham"]
Tuning = Literal["links", "newest", "all", "full"]
Objective = Literal["covariance", "correlation"]
Bias = Literal["drawn", "bend"]
Capture = Literal["trace", "export"]
Sites = Literal["all", "auto"]

LEARNING = ("perforated", "gradient", "sham")
TUNING = ("links", "newest", "all", "full")
OBJECTIVES = ("covariance", "correlation")
BIASES = ("drawn", "bend")
CAPTURE = ("trace", "export")
SITES = ("all", "auto")
# The kernels' table, repeated here so that importing the configuration imports no kernels; a test
# compares the two.
ACTIVATIONS = ("sigmoid", "tanh", "relu", "gelu", "silu")


class PhaseSettings(NamedTuple):
    """The settings of `Config` that one dendrite phase of one site has; no lists among them."""

    candidates: int
    candidate_lr: float
    measure_every: int
    priming_batches: int
    moment_decay: float


@dataclasses.dataclass(frozen=True)
class Config:
    """Say where dendrites may grow and how they learn.

    Each of `candidates`, `candidate_lr`, `measure_every`, `priming_batches` and `moment_decay` may
    be a list indexed by the number of dendrites that the site has when its candidates are drawn;
    the last value stands for all numbers beyond.

    Args:
        include: globs over module paths (`"features.*"`); a site must match at least one.
        exclude: globs over module paths; a site must match none.
        filter_fn: `filter_fn(module, path) -> bool`, asked last, with the module that owns the
            weight.
        learning: `"perforated"` (freeze the network, train candidates to correlate with each
            neuron's error, freeze them, go on), `"gradient"` (dendrites train with everything else
            by backpropagation) or `"sham"` (the phases and restarts of `"perforated"` with
            dendrites whose output stays zero).
        tuning: what the neuron phases of `"perforated"` train of an accepted dendrite: `"links"`
            (its link to the neuron, as published), `"all"` (its weights too, from its neuron's
            error; none is passed on to what it reads), `"newest"` (the same, for the newest
            dendrite of each neuron) or `"full"` (everything, by plain backpropagation through
            dendrites). Other modes leave this aside.
        finish: whether one more neuron phase follows where training would complete, in which the
            dendrites of `"perforated"` train with everything else by plain backpropagation. It
            starts from the best network, and is kept only if it beats that.
        initial_link: share, in [0, 1], of the step to the predicted optimum that a dendrite's link
            to its neuron takes at promotion. 0 leaves the network's output as it was; other values
            assume a loss that is a mean of negative log-likelihoods, without a loss scaler.
        activation: what a dendrite applies to its preactivation: sigmoid, tanh, relu, gelu or silu.
        objective: what a candidate maximises: its `"covariance"` with its neuron's error, or their
            `"correlation"`, for which what it explains of the error already counts no more.
        candidates: size C of the pool from which each neuron's next dendrite is chosen.
        candidate_bias: where candidates start: with `"drawn"` biases, as a fresh layer has them, or
            with these moved to the `"bend"` of a tanh or sigmoid, whose middle is straight: there
            squares of the input, the first that a trained neuron leaves over, show in the
            covariance.
        candidate_lr: step size of the candidates' own Adam; the user's optimizer never steps them.
        measure_every: every m-th training batch of a dendrite phase only measures, so that
            candidates are ranked and stopped on batches that they did not learn from. At least 2.
        priming_batches: batches that fill the running moments before candidates start to learn.
        moment_decay: decay per batch of the running moments behind the sign of the covariance, in
            [0, 1).
        reserve: dendrites per neuron for which slots are made at once, so that growing up to so
            many recompiles nothing; an empty slot costs what a dendrite costs. 0 for none.
        seed: seeds the private generator that draws candidates; torch's global streams are never
            touched.
        capture: `"trace"` (symbolic tracing, of the whole model or of the largest modules that
            allow it) or `"export"` (torch.export of the whole model, for calls like the
            `example_inputs` of `pbfx.transform`).
        sites: `"all"` (a dendrite phase grows one dendrite per neuron at every site) or `"auto"`
            (it grows only where its measurements predict that it pays; see `docs/selection.md`).
        top_k: with `"auto"`, how many sites grow at most in one dendrite phase, those with the
            largest predicted gain per parameter; None for any number.
        growth_parameters: with `"auto"`, how many parameters one dendrite phase may add, links
            included; None for any number.

    Raises:
        ConfigError: naming every setting that is out of range, at construction.

    Source: Brenner and Itti, arXiv 2501.18018 (phases, objective); Fahlman and Lebiere 1990
    (pools).
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    filter_fn: Callable[[nn.Module, str], bool] | None = None
    learning: Learning = "perforated"
    tuning: Tuning = "links"
    finish: bool = False
    initial_link: float = 0.0
    activation: str = "tanh"
    objective: Objective = "covariance"
    candidates: PerDendrite[int] = 4
    candidate_bias: Bias = "drawn"
    candidate_lr: PerDendrite[float] = 1e-3
    measure_every: PerDendrite[int] = 4
    priming_batches: PerDendrite[int] = 8
    moment_decay: PerDendrite[float] = 0.95
    reserve: int = 0
    seed: int = 0
    capture: Capture = "trace"
    sites: Sites = "all"
    top_k: int | None = None
    growth_parameters: int | None = None

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            value = getattr(self, name)
            # A single glob is a natural thing to write, and a string would else be read letter by
            # letter.
            if isinstance(value, (list, tuple, set, frozenset)):
                object.__setattr__(self, name, tuple(value))
            elif isinstance(value, str):
                object.__setattr__(self, name, (value,))
        freeze_lists(self, *PhaseSettings._fields)
        listed = {n: v for n in PhaseSettings._fields if isinstance(v := getattr(self, n), tuple)}
        faults = [f"{name} must not be an empty list" for name, v in listed.items() if not v]
        if listed and not faults:
            # The settings at each number of dendrites are checked as any others.
            for dendrites in range(max(map(len, listed.values()))):
                dataclasses.replace(self, **self.phase(dendrites)._asdict())
        elif not faults:
            faults = [fault for fault in self._faults() if fault]
        if faults:
            raise ConfigError("pbfx.Config: " + "; ".join(faults))

    def phase(self, dendrites: int) -> PhaseSettings:
        """Return the settings of a dendrite phase of a site that has so many dendrites."""
        return PhaseSettings(
            at(self.candidates, dendrites),
            at(self.candidate_lr, dendrites),
            at(self.measure_every, dendrites),
            at(self.priming_batches, dendrites),
            at(self.moment_decay, dendrites),
        )

    def _faults(self) -> list[str]:
        def whole(name: str, least: int) -> str:
            value = getattr(self, name)
            fine = isinstance(value, int) and not isinstance(value, bool) and value >= least
            return (
                "" if fine else f"{name} must be a whole number of at least {least}, got {value!r}"
            )

        def between(name: str, low: float, high: float, ends: str) -> str:
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            edges = (low,) * (ends[0] == "[") + (high,) * (ends[1] == "]")
            if number and (low < value < high or value in edges):
                return ""
            return f"{name} must be a number in {ends[0]}{low:g}, {high:g}{ends[1]}, got {value!r}"

        def flag(name: str) -> str:
            value = getattr(self, name)
            return "" if isinstance(value, bool) else f"{name} must be True or False, got {value!r}"

        def one_of(name: str, valid: tuple[str, ...]) -> str:
            value = getattr(self, name)
            return (
                ""
                if value in valid
                else f"{name} is unknown, got {value!r}: {nearest(str(value), valid)}"
            )

        def globs(name: str) -> str:
            value = getattr(self, name)
            return (
                ""
                if isinstance(value, tuple) and all(isinstance(glob, str) for glob in value)
                else f"{name} must be a glob or a tuple of globs, got {value!r}"
            )

        def auto_only(name: str) -> str:
            if getattr(self, name) is None:
                return ""
            elsewhere = f"{name} chooses among sites, which needs sites='auto', got {self.sites!r}"
            return whole(name, 1) or ("" if self.sites == "auto" else elsewhere)

        callable_filter = self.filter_fn is None or callable(self.filter_fn)
        return [
            globs("include"),
            globs("exclude"),
            "" if callable_filter else f"filter_fn must be callable, got {self.filter_fn!r}",
            one_of("learning", LEARNING),
            one_of("tuning", TUNING),
            flag("finish"),
            between("initial_link", 0.0, 1.0, "[]"),
            one_of("activation", ACTIVATIONS),
            one_of("objective", OBJECTIVES),
            one_of("candidate_bias", BIASES),
            whole("candidates", 1),
            between("candidate_lr", 0.0, math.inf, "()"),
            whole("measure_every", 2),
            whole("priming_batches", 0),
            between("moment_decay", 0.0, 1.0, "[)"),
            whole("reserve", 0),
            (
                "reserve goes with tuning 'links' or 'all', got 'newest': which dendrite is the "
                "newest must not be part of a graph that does not change"
                if self.reserve and self.tuning == "newest"
                else ""
            ),
            whole("seed", 0),
            one_of("capture", CAPTURE),
            one_of("sites", SITES),
            auto_only("top_k"),
            auto_only("growth_parameters"),
            'sites="auto" needs a dendrite phase to measure in, which learning="gradient" has not'
            if self.sites == "auto" and self.learning == "gradient"
            else "",
            'reserve makes slots on all channels, and sites="auto" chooses among them; use one'
            if self.sites == "auto" and self.reserve
            else "",
        ]

    @property
    def trains_stacks(self) -> bool:
        """Whether some neuron phase of `"perforated"` trains the weights of dendrites."""
        return self.learning == "perforated" and (self.tuning != "links" or self.finish)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values; `filter_fn` is code and stays out."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["filter_fn"]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }
