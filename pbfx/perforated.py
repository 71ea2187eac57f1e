"""The module that `pbfx.transform` returns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from pbfx.absorbed import absorb, assign
from pbfx.capture import Example, Rung
from pbfx.config import Config
from pbfx.dendrites import Candidates, Dendrites, draw_weights
from pbfx.errors import PassError, PbfxError
from pbfx.passes.context import PassContext
from pbfx.paths import join
from pbfx.phase import Phase
from pbfx.pipeline import PassRecord, run_passes
from pbfx.sites import Site, Skipped
from pbfx.structure import Counts, Structure, structure_of_keys

# What fx.GraphModule itself keeps on an instance; everything else belongs to the user, `meta` too,
# which fx starts empty and only carries along.
_GRAPH_MODULE_STATE = (
    frozenset(fx.GraphModule(nn.Module(), fx.Graph()).__dict__)
    - frozenset(nn.Module().__dict__)
    - {"meta"}
)


@dataclasses.dataclass
class Perforation:
    """What pbfx knows about a perforated module.

    Attributes:
        source: the captured graph. It is never edited; every graph that runs is derived from it.
        sites: where dendrites may grow.
        skipped: the other ops with parameters, and why.
        config: what the user asked for.
        path: where this module stood in the model that was transformed.
        rung: how it was captured.
        reason: why no graph around it could be had; empty for a whole model.
        kind: the user's class.
        absorbed: paths of the modules whose forwards run in the graph.
        recapture: captures this module anew, with some modules inside as graphs of their own.
        example: what it was exported with, and would be again; None for other rungs.
        phase: which graph runs now.
        draws: how many pools of weights have been drawn, so that a new pool differs from the last.
        records: what the passes did at the last rebuild.
        tracker: the one tracker that may restructure this module, as a token.
    """

    source: fx.Graph
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    config: Config
    path: str = ""
    rung: Rung = Rung.WHOLE
    reason: str = ""
    kind: type[nn.Module] = nn.Module
    absorbed: tuple[str, ...] = ()
    recapture: Callable[[PerforatedModule, frozenset[str], str], None] | None = None
    example: Example | None = None
    phase: Phase = Phase.NEURON
    draws: int = 0
    records: tuple[PassRecord, ...] = ()
    tracker: object = None


class _Start(nn.Module):
    """Ends the chain of constructors: the state of a user's class is copied, not made anew."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class PerforatedModule(fx.GraphModule):
    """A captured module that can grow dendrites.

    It has the parameters, buffers, submodules, attributes and state-dict keys of the user's module,
    and is an instance of its class. `perforation` holds the rest. After every structural change
    `rebuild` derives a new graph from the source graph and recompiles.
    """

    perforation: Perforation

    def __init__(self, root: nn.Module, perforation: Perforation, class_name: str) -> None:
        super().__init__(root, fx.Graph(), class_name)
        for name, value in root.__dict__.items():
            if name not in _GRAPH_MODULE_STATE:
                self.__dict__[name] = value
        self.perforation = perforation
        self.rebuild()
        absorb(self, perforation.absorbed)

    @classmethod
    def over(cls, root: nn.Module, perforation: Perforation) -> PerforatedModule:
        """Return a perforated module in the place of `root`, an instance of its class too."""
        kind, own = cls, perforation.kind
        if not issubclass(own, fx.GraphModule) and not _customises_access(own):
            # Methods of our own first; everything else is the user's.
            kind = type(own.__name__, (cls, _Start, own), {"__module__": own.__module__})
        return kind(root, perforation, own.__name__)

    def rebuild(self) -> None:
        """Derive the graph for the present structure and phase, and recompile.

        Raises:
            PassError: if a pass fails; the module then still runs the graph that it ran before.
        """
        perforation, before = self.perforation, self._graph
        self._graph = fx.Graph(owning_module=self)
        self._graph.output(self._graph.graph_copy(perforation.source, {}))
        try:
            perforation.records = run_passes(
                self, PassContext(perforation.sites, perforation.phase)
            )
        except PassError:
            self._graph = before
            raise
        self.recompile()

    def grown(self) -> dict[str, Dendrites]:
        """Return the dendrites modules that exist now, by the name of their site."""
        return {
            site.name: module
            for site in self.perforation.sites
            if (module := self._lookup(site.dendrites)) is not None
        }

    def ensure_dendrites(self, site: Site) -> Dendrites:
        """Return the dendrites module of `site`, made empty if there is none yet."""
        module = self._lookup(site.dendrites)
        if module is None:
            module = Dendrites(site, self.perforation.config, self.get_parameter(site.home))
            owner, _, name = site.dendrites.rpartition(".")
            self.get_submodule(owner).add_module(name, module)
        return module

    def drop_dendrites(self, site: Site) -> None:
        """Remove the dendrites module of `site`; its keys are the plain model's again."""
        owner, _, name = site.dendrites.rpartition(".")
        self.get_submodule(owner)._modules.pop(name, None)

    def new_candidates(self, site: Site, count: int) -> Candidates:
        """Draw a fresh pool of `count` candidates per neuron for `site`."""
        dendrites = self.ensure_dendrites(site)
        weight, bias = self.draw(site, count)
        dendrites.candidates = Candidates(
            site, self.perforation.config, weight, bias, dendrites.count
        )
        return dendrites.candidates

    def draw(self, site: Site, count: int) -> tuple[Any, Any]:
        """Draw weights (count, *W) and biases (count, N) for `site` from the private generator."""
        perforation = self.perforation
        perforation.draws += 1
        like = self.get_parameter(site.home).detach()
        name = join(perforation.path, site.name)
        seed = f"{perforation.config.seed}/{name}/{perforation.draws}"
        return draw_weights(site, like, count, seed)

    def structure(self) -> Structure:
        """Return how many dendrites and candidates each site has."""
        return Structure(
            {
                name: Counts(
                    module.count, 0 if module.candidates is None else module.candidates.count
                )
                for name, module in self.grown().items()
            }
        )

    def adopt(self, structure: Structure) -> None:
        """Take on `structure`: the first D dendrites of each site survive, new ones are zero."""
        for site in self.perforation.sites:
            counts = structure.sites.get(site.name)
            if counts is None:
                self.drop_dendrites(site)
                continue
            dendrites = self.ensure_dendrites(site)
            dendrites.resize(counts.dendrites)
            dendrites.candidates = None
            if counts.candidates:
                like = self.get_parameter(site.home).detach()
                weight = like.new_zeros(counts.candidates, *site.shape)
                bias = like.new_zeros(counts.candidates, site.neurons) if site.biased else None
                dendrites.candidates = Candidates(
                    site, self.perforation.config, weight, bias, counts.dendrites
                )
        changed = self.perforation.phase is not structure.phase
        self.perforation.phase = structure.phase
        self.rebuild()
        if changed:
            # Into or out of the eval in which the dendrite phase holds the network.
            self.train(self.training)

    def __setattr__(self, name: str, value: Any) -> None:
        if "perforation" not in self.__dict__ or name in _GRAPH_MODULE_STATE:
            super().__setattr__(name, value)
        else:
            assign(self, name, value, super().__setattr__, self)

    def original(self) -> nn.Module:
        """Return a module of the user's class over the state of this one, without a graph."""
        plain = self._shell()
        plain.__class__ = self.perforation.kind
        return plain

    def train(self, mode: bool = True) -> PerforatedModule:
        """Set the mode as usual; in the dendrite phase the network's own modules stay in eval."""
        super().train(mode)
        if self.perforation.phase is Phase.DENDRITE:
            for child in self.children():
                child.train(False)
        return self

    def _lookup(self, path: str) -> Dendrites | None:
        owner, _, name = path.rpartition(".")
        module = self.get_submodule(owner)._modules.get(name)
        assert module is None or isinstance(module, Dendrites)
        return module

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """Grow to the structure that the incoming keys describe, then load as usual."""
        described = structure_of_keys(state_dict, prefix, self.perforation.sites)
        if described is not None and described != self.structure():
            self.adopt(described)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> PerforatedModule:
        # Known to `memo` before its parts are copied, since a part may refer back to the whole.
        kind = type(self)
        twin = memo[id(self)] = kind.__new__(kind)
        perforation = dataclasses.replace(self.perforation, tracker=None)
        twin.__init__(copy.deepcopy(self._shell(), memo), perforation, kind.__name__)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        # fx pickles a module's code and traces it again, which would turn `self.training` into a
        # constant. Until the source graph has a format of its own, say so instead of breaking
        # quietly.
        raise PbfxError(
            f"a perforated {type(self).__name__} cannot be pickled; save it with pbfx.save(model, "
            "path) or torch.save(model.state_dict(), path), and copy it with copy.deepcopy"
        )

    def _recompile_submodules(self) -> list[Any]:
        # Parts inside have graphs of their own, which `rebuild` derives when they change.
        return []

    def _shell(self) -> nn.Module:
        """Return a plain module with everything that is not fx's or pbfx's."""
        shell = nn.Module()
        ours = _GRAPH_MODULE_STATE | {"perforation"}
        shell.__dict__.update(
            {name: value for name, value in self.__dict__.items() if name not in ours}
        )
        return shell


def hides(module: nn.Module) -> str | None:
    """Return why a perforated module cannot take the place of `module`, or None."""
    own = {*module.__dict__, *module._modules, *module._parameters, *module._buffers}
    for base in type(module).__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            own |= vars(base).keys()
    taken = {"perforation", *dir(PerforatedModule)} - set(dir(nn.Module))
    if isinstance(module, fx.GraphModule):
        taken -= set(dir(fx.GraphModule)) | set(_GRAPH_MODULE_STATE)
    clash = sorted(own & taken)
    return (
        f"its attribute {clash[0]!r} would hide behind PerforatedModule.{clash[0]}"
        if clash
        else None
    )


def _customises_access(cls: type) -> bool:
    """Return whether a user's class watches its attributes, which a graph module's would upset."""
    watched = ("__setattr__", "__getattr__", "__delattr__")
    return cls.__getattribute__ is not object.__getattribute__ or any(
        getattr(cls, name) is not getattr(nn.Module, name) for name in watched
    )


def perforated_parts(model: nn.Module) -> dict[str, PerforatedModule]:
    """Return the perforated modules inside `model`, by path, `""` being the model itself."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, PerforatedModule)
    }
