"""What a user may ask of `pbfx.transform`, checked when it is said."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from pbfx.errors import ConfigError, nearest

Learning = Literal["perforated", "gradient", "sham"]
Capture = Literal["trace", "export"]
Sites = Literal["all", "auto"]

LEARNING = ("perforated", "gradient", "sham")
CAPTURE = ("trace", "export")
SITES = ("all", "auto")
# The kernels' table, repeated here so that importing the configuration imports no kernels; a test
# compares the two.
ACTIVATIONS = ("sigmoid", "tanh", "relu", "gelu", "silu")


@dataclasses.dataclass(frozen=True)
class Config:
    """Say where dendrites may grow and how they learn.

    Args:
        include: globs over module paths (`"features.*"`); a site must match at least one.
        exclude: globs over module paths; a site must match none.
        filter_fn: `filter_fn(module, path) -> bool`, asked last, with the module that owns the
            weight.
        learning: `"perforated"` (freeze the network, train candidates to correlate with each
            neuron's error, freeze them, go on), `"gradient"` (dendrites train with everything else
            by backpropagation) or `"sham"` (the phases and restarts of `"perforated"` with
            dendrites whose output stays zero).
        activation: what a dendrite applies to its preactivation: sigmoid, tanh, relu, gelu or silu.
        candidates: size C of the pool from which each neuron's next dendrite is chosen.
        candidate_lr: step size of the candidates' own Adam; the user's optimizer never steps them.
        measure_every: every m-th training batch of a dendrite phase only measures, so that
            candidates are ranked and stopped on batches that they did not learn from. At least 2.
        priming_batches: batches that fill the running moments before candidates start to learn.
        moment_decay: decay per batch of the running moments behind the sign of the covariance, in
            [0, 1).
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
    activation: str = "tanh"
    candidates: int = 4
    candidate_lr: float = 1e-3
    measure_every: int = 4
    priming_batches: int = 8
    moment_decay: float = 0.95
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
        faults = [fault for fault in self._faults() if fault]
        if faults:
            raise ConfigError("pbfx.Config: " + "; ".join(faults))

    def _faults(self) -> list[str]:
        def whole(name: str, least: int) -> str:
            value = getattr(self, name)
            fine = isinstance(value, int) and not isinstance(value, bool) and value >= least
            return (
                "" if fine else f"{name} must be a whole number of at least {least}, got {value!r}"
            )

        def between(name: str, low: float, high: float, includes_low: bool) -> str:
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and (low < value < high or (includes_low and value == low)):
                return ""
            brackets = "[" if includes_low else "("
            return f"{name} must be a number in {brackets}{low:g}, {high:g}), got {value!r}"

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
            one_of("activation", ACTIVATIONS),
            whole("candidates", 1),
            between("candidate_lr", 0.0, math.inf, includes_low=False),
            whole("measure_every", 2),
            whole("priming_batches", 0),
            between("moment_decay", 0.0, 1.0, includes_low=True),
            whole("seed", 0),
            one_of("capture", CAPTURE),
            one_of("sites", SITES),
            auto_only("top_k"),
            auto_only("growth_parameters"),
            'sites="auto" needs a dendrite phase to measure in, which learning="gradient" has not'
            if self.sites == "auto" and self.learning == "gradient"
            else "",
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values; `filter_fn` is code and stays out."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["filter_fn"]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }
