"""The module that `pbfx.transform` returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from pbfx.absorbed import absorb, assign
from pbfx.candidates import Candidates, bend_of
from pbfx.capture import CONSTANT
from pbfx.compiled import drop_compiled_code
from pbfx.copies import Filling
from pbfx.dendrites import Dendrites
from pbfx.derived import key_of
from pbfx.draws import Draw, draw_weights
from pbfx.errors import CheckpointError, ConfigError, PassError
from pbfx.followers import imitate, is_averaging
from pbfx.kinds import GRAPH_MODULE_STATE, clash, mixed_with, own_state
from pbfx.passes.context import PassContext
from pbfx.paths import join, module_at, modules_in
from pbfx.perforation import Perforation
from pbfx.phase import Phase
from pbfx.pipeline import run_passes
from pbfx.plain_graph import named
from pbfx.sites import Site, on_channels
from pbfx.structure import Counts, Structure, structure_of_keys


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
            if name not in GRAPH_MODULE_STATE:
                self.__dict__[name] = value
        self.perforation = perforation
        for site in perforation.sites if perforation.config.reserve else ():
            self.ensure_dendrites(site)
        self.rebuild()
        absorb(self, perforation.absorbed)

    @staticmethod
    def over(root: nn.Module, perforation: Perforation) -> PerforatedModule:
        """Return a perforated module in the place of `root`, an instance of its class too."""
        kind = mixed_with(PerforatedModule, perforation.kind)
        return kind(root, perforation, perforation.kind.__name__)

    def rebuild(self) -> None:
        """Derive the graph for the present structure and phase, and recompile.

        Raises:
            PassError: if a pass fails; the module then still runs the graph that it ran before.
        """
        perforation = self.perforation
        origin = perforation.source, perforation.sites
        key = key_of(self, origin, perforation.phase)
        known = perforation.graphs.take_up(self, origin, key)
        if known is None:
            self._derive()
            if key is not None:
                perforation.graphs.keep(self, origin, key, perforation.records)
        else:
            perforation.records = known.records
        if not self._runs_again():
            drop_compiled_code(self)

    def _derive(self) -> None:
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

    def _runs_again(self) -> bool:
        """Go on with the code object of an equal graph that has run before, if there is a reserve.

        Dynamo keeps what it has compiled with the code, and what may differ between two equal
        graphs is among its guards: there is a module with every site that candidates come and go
        in. Not without a reserve: dendrites that come with their module are no guard's business.
        """
        perforation, new = self.perforation, type(self).forward
        if not perforation.config.reserve:
            return False
        slots = tuple(dendrites.slots for dendrites in self.grown().values())
        if slots != perforation.slots:
            perforation.slots = slots
            perforation.forwards.clear()
            perforation.forwards[self.code] = new
            return False
        old = perforation.forwards.setdefault(self.code, new)
        names = (*new.__code__.co_names, *new.__code__.co_varnames)
        if all(old.__globals__.get(n) is new.__globals__.get(n) for n in names):
            type(self).forward = old
        return True

    def grown(self) -> dict[str, Dendrites]:
        """Return the dendrites modules that exist now, by the name of their site."""
        return {
            site.name: module
            for site in self.perforation.sites
            if (module := self._lookup(site.dendrites)) is not None
        }

    def ensure_dendrites(self, site: Site, channels: tuple[int, ...] | None = None) -> Dendrites:
        """Return the dendrites module of `site`, made empty on `channels` if there is none yet."""
        module = self._lookup(site.dendrites)
        if module is None:
            like = self._soma_weight(site)
            module = Dendrites(on_channels(site, channels), self.perforation.config, like)
            owner, _, name = site.dendrites.rpartition(".")
            module_at(self, owner).add_module(name, module)
        return module

    def drop_dendrites(self, site: Site) -> None:
        """Remove the dendrites module of `site`; its keys are the plain model's again."""
        if self.perforation.config.reserve:
            dendrites = self.ensure_dendrites(site)
            dendrites.candidates = None
            dendrites.resize(0)
            return
        owner, _, name = site.dendrites.rpartition(".")
        module_at(self, owner)._modules.pop(name, None)

    def new_candidates(self, pools: Sequence[tuple[Site, int]]) -> None:
        """Draw a fresh pool of so many candidates per neuron for each of these sites."""
        bend = bend_of(self.perforation.config)
        owners = [self.ensure_dendrites(site) for site, _ in pools]
        places = [
            on_channels(site, dendrites.site.channels)
            for (site, _), dendrites in zip(pools, owners, strict=True)
        ]
        drawn = self.draw([(site, count) for site, (_, count) in zip(places, pools, strict=True)])
        filling = Filling()
        for site, dendrites, (weight, bias) in zip(places, owners, drawn, strict=True):
            if bias is not None and bend:
                bias += bend
            self._give_candidates(dendrites, site, weight, bias, filling)
        filling.fill()

    def draw(self, sets: Sequence[tuple[Site, int]]) -> list[tuple[Tensor, Tensor | None]]:
        """Draw from the private generator, for each site and count weights (count, *W) and biases
        (count, N) or None."""
        perforation = self.perforation
        draws = []
        for site, count in sets:
            perforation.draws += 1
            name = join(perforation.path, site.name)
            seed = f"{perforation.config.seed}/{name}/{perforation.draws}"
            draws.append(Draw(site, self._soma_weight(site), count, seed))
        return draw_weights(draws)

    def _soma_weight(self, site: Site) -> Tensor:
        owner, _, name = site.home.rpartition(".")
        return getattr(module_at(self, owner), name).detach()

    def structure(self) -> Structure:
        """Return how many dendrites and candidates each site has."""
        counts = {name: module.counts for name, module in self.grown().items()}
        if self.perforation.config.reserve:
            # Slots are there before anything is in them.
            counts = {name: count for name, count in counts.items() if count != Counts()}
        return Structure(counts)

    def _give_candidates(
        self,
        dendrites: Dendrites,
        site: Site,
        weight: Tensor,
        bias: Tensor | None,
        filling: Filling | None = None,
    ) -> None:
        """Let the candidates of `dendrites` be a pool with these weights."""
        config = self.perforation.config
        slots = dendrites.slots if config.reserve else 0
        dendrites.candidates = Candidates(
            site, config, weight, bias, dendrites.count, slots, filling
        )

    def adopt(self, structure: Structure) -> None:
        """Take on `structure`: the first D dendrites of each site survive, new ones are zero.

        None survives where they are to be on other channels.

        Raises:
            ConfigError: if they are to be on some channels and slots are reserved on all.
        """
        for name, counts in structure.sites.items():
            if counts.channels is not None and self.perforation.config.reserve:
                raise ConfigError(
                    f"the site {join(self.perforation.path, name)!r} is to have dendrites on some "
                    "channels, but Config(reserve=...) has made slots on all of them; transform "
                    "the model without reserve"
                )
        for site in self.perforation.sites:
            counts = structure.sites.get(site.name)
            if counts is None:
                self.drop_dendrites(site)
                continue
            known = self._lookup(site.dendrites)
            if known is not None and known.site.channels != counts.channels:
                self.drop_dendrites(site)
            dendrites = self.ensure_dendrites(site, counts.channels)
            site = on_channels(site, counts.channels)
            dendrites.resize(counts.dendrites)
            dendrites.candidates = None
            if counts.candidates:
                like = self._soma_weight(site)
                weight = like.new_zeros(counts.candidates, *site.shape)
                bias = like.new_zeros(counts.candidates, site.neurons) if site.biased else None
                self._give_candidates(dendrites, site, weight, bias)
        changed = self.perforation.phase is not structure.phase
        self.perforation.phase = structure.phase
        self.rebuild()
        if changed:
            # Into or out of the eval in which the dendrite phase holds the network.
            self.train(self.training)

    def __setattr__(self, name: str, value: Any) -> None:
        if "perforation" not in self.__dict__ or name in GRAPH_MODULE_STATE:
            super().__setattr__(name, value)
        else:
            assign(self, name, value, super().__setattr__, self)

    def original(self) -> nn.Module:
        """Return a module of the user's class over the state of this one, without a graph."""
        plain = nn.Module()
        plain.__dict__.update(own_state(self.__dict__))
        plain.__class__ = self.perforation.kind
        return plain

    def train(self, mode: bool = True) -> PerforatedModule:
        """Set the mode as usual; in the dendrite phase the network's own modules stay in eval."""
        if self.perforation.phase is not Phase.DENDRITE:
            super().train(mode)
            return self
        if self.perforation.kind.train is nn.Module.train:
            self.training = mode
        else:
            # The user's own may do more.
            super().train(mode)
        for child in self._modules.values():
            hold_in_eval(child)
        return self

    def _lookup(self, path: str) -> Dendrites | None:
        owner, _, name = path.rpartition(".")
        module = module_at(self, owner)._modules.get(name)
        assert module is None or isinstance(module, Dendrites)
        return module

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """Grow to the structure that the incoming keys describe, then load as usual."""
        described = structure_of_keys(state_dict, prefix, self.perforation.sites)
        if described is not None and described != self.structure():
            self.adopt(described)
            update_followers(self)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PerforatedModule:
        # The constants of the forward are no state of the user's: they move with the model, but
        # neither `half` nor `to_empty` has a say in what they are.
        constants: dict[str, Tensor] = {
            name: self._buffers.pop(name)  # pyright: ignore[reportAssignmentType]
            for name, value in list(self._buffers.items())
            if value is not None and CONSTANT.fullmatch(name)
        }
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(constants)
        for name, value in constants.items():
            device = fn(value).device
            # A meta tensor has forgotten its numbers, and no state dict brings these back.
            if device.type != "meta":
                self._buffers[name] = value.to(device)
        return self

    def __copy__(self) -> PerforatedModule:
        # New module objects over the same tensors, as `pbfx.transform` makes them of a plain
        # model: dendrites of one are not the other's.
        tensors = [*self.parameters(), *self.buffers()]
        return copy.deepcopy(self, {id(tensor): tensor for tensor in tensors})

    def __deepcopy__(self, memo: dict[int, Any]) -> PerforatedModule:
        # Known to `memo` before its parts are copied, since a part may refer back to the whole.
        kind = type(self)
        twin = memo[id(self)] = kind.__new__(kind)
        perforation = copy.deepcopy(self.perforation, memo)
        _restore(twin, (kind.__name__, perforation, copy.deepcopy(_state(self), memo)))
        if is_averaging():
            self.perforation.followers.add(twin)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        own, name = self.perforation.kind, type(self).__name__
        if named(own) is None:
            raise CheckpointError(
                f"a perforated {name} cannot be pickled: its class {own.__module__}."
                f"{own.__qualname__} cannot be imported by that name; define it at the top level "
                "of a module, or save with pbfx.save(model, path) or "
                "torch.save(model.state_dict(), path)"
            )
        # All that is ours is checked before the first byte is written.
        for part in perforated_parts(self).values():
            part.perforation.__getstate__()
        return _blank, (own,), (name, self.perforation, _state(self)), None, None, _restore

    def _recompile_submodules(self) -> list[Any]:
        # Parts inside have graphs of their own, which `rebuild` derives when they change.
        return []

    def _replicate_for_data_parallel(self) -> PerforatedModule:
        # The class holds the compiled forward, and a replica runs the same.
        replica = object.__new__(type(self))
        replica.__dict__ = self.__dict__ | {
            "_parameters": {},
            "_buffers": self._buffers.copy(),
            "_modules": self._modules.copy(),
            "_is_replica": True,
        }
        return replica


def hold_in_eval(module: nn.Module | None) -> None:
    """Do what `module.train(False)` does, and leave alone what is in eval."""
    if module is None:
        return
    if type(module).train is not nn.Module.train:
        module.train(False)
        return
    if module.training:
        module.training = False
    for child in module._modules.values():
        hold_in_eval(child)


def _state(module: PerforatedModule) -> dict[str, Any]:
    """Return what the user's class wants copied, without what is fx's or pbfx's."""
    state = module.__getstate__()
    if not isinstance(state, dict):
        raise CheckpointError(
            f"a perforated {type(module).__name__} cannot be copied or pickled: its __getstate__ "
            f"must return a dict of attributes, got {type(state).__name__}"
        )
    return own_state(state)


def _blank(own: type[nn.Module]) -> PerforatedModule:
    """Return a module without any state, for `_restore`."""
    kind = mixed_with(PerforatedModule, own)
    return kind.__new__(kind)


def _restore(module: PerforatedModule, state: tuple[str, Any, dict[str, Any]]) -> None:
    """Fill a blank module, by way of the user's `__setstate__`, and derive its graph."""
    name, perforation, attributes = state
    module.__setstate__(attributes)
    shell = nn.Module()
    shell.__dict__.update(module.__dict__)
    module.__init__(shell, perforation, name)


def update_followers(model: PerforatedModule) -> None:
    """Let the averaged copies of `model` follow its structure."""
    for twin in list(model.perforation.followers):
        # A copy with a tracker of its own goes its own way.
        if isinstance(twin, PerforatedModule) and twin.perforation.tracker is None:
            imitate(perforated_parts(twin), perforated_parts(model))


def hides(module: nn.Module) -> str | None:
    """Return why a perforated module cannot take the place of `module`, or None."""
    return clash(PerforatedModule, ("perforation",), module)


def perforated_parts(model: nn.Module) -> dict[str, PerforatedModule]:
    """Return the perforated modules inside `model`, by path, `""` being the model itself."""
    return {
        path: module
        for path, module in modules_in(model).items()
        if isinstance(module, PerforatedModule)
    }
