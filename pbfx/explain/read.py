"""Read off a model where it can grow dendrites, where it cannot, and what each site costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

from torch import nn

from pbfx.assembly import OWN_PARAMETER
from pbfx.config import Config
from pbfx.errors import ConfigError
from pbfx.explain.explanation import Explanation
from pbfx.explain.flow import Flow, flow_of
from pbfx.explain.records import (
    ApartReport,
    KeptReport,
    LoweredReport,
    PartReport,
    SiteReport,
    SkippedReport,
)
from pbfx.explain.weights import linear_conv_parameters, soma_parameters
from pbfx.kept import kept_modules
from pbfx.lower import lower_with_reports
from pbfx.neurons import Neurons
from pbfx.paths import join
from pbfx.perforated import PerforatedModule, perforated_parts
from pbfx.sites import Site, Skipped, on_channels
from pbfx.transform import look_alike


def explain(
    model: nn.Module, config: Config | None = None, *, lowered: bool = False
) -> Explanation:
    """Return where `model` can grow dendrites, what each site costs, and what was left out and why.

    A model that has not been transformed is explained as `pbfx.transform` would return it; it is
    left as it is, and no weights are copied. One that nothing can grow on has no sites, and the
    reasons. Of a plain model with perforated parts inside, the parts are explained.

    Args:
        model: transformed or plain; a `torch.compile`d one is explained as what it wraps.
        config: for a plain model, where dendrites may grow; `Config()` if None.
        lowered: whether to lower the model as well, and say what that makes of it.

    Raises:
        CaptureError: if a plain model cannot be cloned, as one with lazy modules.
        ConfigError: if `model` is no module or is transformed already and has its own config, or a
            pattern matches nothing.
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise ConfigError(f"pbfx.explain: model must be an nn.Module instance, got {given}")
    model = getattr(model, "_orig_mod", model)
    if not perforated_parts(model):
        model = look_alike(model, config)
    elif config is not None:
        raise ConfigError(
            "pbfx.explain: the model is transformed already, with a config of its own; leave out "
            "config, or explain the plain model"
        )
    explanation = _Reader(model).explanation()
    if not lowered:
        return explanation
    return dataclasses.replace(explanation, lowered=tuple(_lowered(model)))


def _lowered(model: nn.Module) -> Iterator[LoweredReport]:
    """Yield what lowering makes of each part of a transformed model."""
    parts = perforated_parts(model)
    for path, module in lower_with_reports(model)[1] if parts else ():
        called = [module.get_submodule(n.target) for n in module.graph.find_nodes(op="call_module")]
        fused = dict.fromkeys(m.site.name for m in called if isinstance(m, Neurons))
        yield LoweredReport(
            path=path,
            class_name=_name(parts[path]),
            ops_before=len(parts[path].graph.nodes),
            ops_after=len(module.graph.nodes),
            passes=module.records,
            fused=tuple(join(path, name) for name in fused),
            apart=tuple(
                ApartReport(join(path, name), reason) for name, reason in module.notes.items()
            ),
        )


class _Reader:
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parts = perforated_parts(model)
        # What computes a parametrized weight is of no interest: the weight's layer is.
        self._kept = {
            path: kept
            for path, kept in kept_modules(model).items()
            if "parametrizations" not in path.split(".")
        }
        self._layers = linear_conv_parameters(model)
        self._grows: dict[int, nn.Parameter] = {}

    def explanation(self) -> Explanation:
        sites: list[SiteReport] = []
        skipped: list[SkippedReport] = []
        for path, part in self._parts.items():
            grown = part.grown()
            for site in part.perforation.sites:
                dendrites = grown.get(site.name)
                count = 0 if dendrites is None else dendrites.count
                channels = None if dendrites is None else dendrites.site.channels
                sites.append(_report(path, part, site, count, on_channels(site, channels)))
                self._grows |= soma_parameters(part, site)
            skipped += self._skipped(path, part.perforation.skipped)
        for path, kept in self._kept.items():
            skipped += self._skipped(path, kept.skipped)
        skipped += self._never_called({s.name for s in skipped})
        every = self._grows | {
            key: parameter
            for path, own in self._layers.items()
            if self._is_ours(path)
            for key, parameter in own.items()
        }
        # What a kept forward does with a parameter of its own is not known.
        every |= self._functional({s.name for s in skipped if s.op != OWN_PARAMETER})
        return Explanation(
            class_name=type(self._model).__name__,
            parts=tuple(
                PartReport(path, _name(part), part.perforation.rung, part.perforation.reason)
                for path, part in self._parts.items()
            ),
            kept=tuple(
                KeptReport(path, _name(self._model.get_submodule(path)), kept.reason)
                for path, kept in self._kept.items()
                if kept.reason
            ),
            sites=tuple(sites),
            skipped=tuple(skipped),
            growable_parameters=sum(p.numel() for p in self._grows.values()),
            linear_conv_parameters=sum(p.numel() for p in every.values()),
            flows=tuple(self._flows(sites, skipped)),
            modules=tuple(path for path, _ in self._model.named_modules()),
        )

    def _apart(self) -> set[str]:
        """Return the modules that are reported by themselves."""
        return {*self._parts, *(path for path, kept in self._kept.items() if kept.reason)}

    def _skipped(self, path: str, found: Iterable[Skipped]) -> list[SkippedReport]:
        """Return what the owner at `path` skipped; a module that is called as one is no op."""
        apart = self._apart()
        return [
            SkippedReport(join(path, s.name), s.op, s.reason)
            for s in found
            if not s.name or join(path, s.name) not in apart
        ]

    def _is_ours(self, path: str) -> bool:
        """Return whether `path` lies in what was transformed, not in a plain model around it."""
        return not _lineage(path).isdisjoint(self._parts.keys() | self._kept.keys())

    def _never_called(self, known: set[str]) -> list[SkippedReport]:
        """Return the linear and conv layers that no graph calls and nobody has given a reason."""
        found = []
        for path, own in self._layers.items():
            explained = not known.isdisjoint(_lineage(path))
            if self._is_ours(path) and not explained and own.keys().isdisjoint(self._grows):
                kind = _name(self._model.get_submodule(path))
                found.append(SkippedReport(path, kind, "no captured forward calls it"))
        return found

    def _functional(self, names: set[str]) -> dict[int, nn.Parameter]:
        """Return the weights among skipped `names`: those of functions are named themselves."""
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        found = [parameters[name] for name in names & parameters.keys()]
        return {id(p): p for p in found}

    def _flows(self, sites: list[SiteReport], skipped: list[SkippedReport]) -> list[Flow]:
        counts = {site.name: site.dendrites for site in sites}
        left = {s.name for s in skipped}
        apart = self._apart()
        return [flow_of(path, part, counts, left, apart) for path, part in self._parts.items()]


def _report(path: str, part: PerforatedModule, site: Site, count: int, grown: Site) -> SiteReport:
    neurons = grown.neurons
    soma = math.prod(site.shape) + (site.neurons if site.bias else 0)
    own = math.prod(grown.shape) + (neurons if site.biased else 0)
    # Each new dendrite also has a link to the soma and one from every older dendrite.
    links = count * neurons + count * (count - 1) // 2 * neurons
    full = join(path, site.name).replace("_orig_mod.", "")
    known = {figures.site: figures for figures in part.perforation.figures}.get(full)
    return SiteReport(
        name=join(path, site.name),
        op=site.op,
        norm=site.norm,
        calls=site.calls,
        dendrites=count,
        parameters=soma + own * count + links,
        next_dendrite=grown.dendrite_parameters(count),
        rung=part.perforation.rung,
        channels=neurons,
        neurons=site.neurons,
        heldout=None if known is None else known.heldout,
        p_value=None if known is None else known.p_value,
        gain=None if known is None else known.gain,
    )


def _lineage(path: str) -> set[str]:
    """Return `path` and every path above it."""
    names = path.split(".")
    return {".".join(names[:end]) for end in range(len(names) + 1)}


def _name(module: nn.Module) -> str:
    return type(module).__name__
