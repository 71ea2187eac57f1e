"""Put perforated modules in the places of captured ones; split them again when hooks come."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from pbfx.absorbed import absorb, lead, release
from pbfx.capture import Capture, Rung, capture_clone, is_torch_layer, redirect
from pbfx.config import Config
from pbfx.errors import CaptureError
from pbfx.kept import ATTRIBUTE, Kept
from pbfx.paths import join
from pbfx.perforated import PerforatedModule, hides
from pbfx.perforation import Perforation
from pbfx.sites import Site, Skipped, describe_sites, is_op, why_no_layer

# What a parameter counts as that no known op reads.
OWN_PARAMETER = "parameter"
# For the path of each part: the module that its graph runs over, and its sites.
Parts = dict[str, tuple[nn.Module, Sequence[Site]]]
# For the path of each part: its chosen sites, and the others with the reason.
Choices = dict[str, tuple[tuple[Site, ...], tuple[Skipped, ...]]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A captured model, and what of it will grow: sites and skipped layers by part.

    `outside` holds the layers that forwards of their own call and that cannot grow, by their owner.
    """

    captured: Capture
    chosen: dict[str, tuple[Site, ...]]
    skipped: dict[str, tuple[Skipped, ...]]
    outside: dict[str, tuple[Skipped, ...]]

    def left_out(self) -> Iterator[tuple[str, str, str]]:
        """Yield full path, op and reason of everything that cannot grow."""
        for path, found in (*self.skipped.items(), *self.outside.items()):
            for op in found:
                yield join(path, op.name), op.op, op.reason


def make_plan(captured: Capture, choose: Callable[[Parts], Choices]) -> Plan:
    """Describe the sites of every graph in `captured`, and `choose` among them."""
    parts = captured.parts
    described = {path: describe_sites(part.root, part.graph) for path, part in parts.items()}
    # An op that is a part of its own is no site of the graph that calls it.
    own = {id(part.root): path for path, part in parts.items()}
    sites: Parts = {
        path: (
            parts[path].root,
            [s for s in found if own.get(id(_owner(parts[path].root, s)), path) == path],
        )
        for path, (found, _) in described.items()
    }
    choices = choose(sites)
    skipped = {
        path: (*(_left_for(captured, path, s) for s in described[path][1]), *unwanted)
        for path, (_, unwanted) in choices.items()
    }
    chosen = {path: wanted for path, (wanted, _) in choices.items()}
    return Plan(captured, chosen, skipped, _outside(captured))


def assemble(plan: Plan, config: Config) -> nn.Module:
    """Put a perforated module in the place of each captured one that has sites."""
    root = plan.captured.root
    _note_kept(plan)
    places = _places(plan, config, plan.captured.parts)
    redirect([*root.modules(), *places.values()], places)
    return places.get(id(root), root)


def recapture(part: PerforatedModule, apart: frozenset[str], reason: str) -> None:
    """Capture a perforated module anew, all or nothing.

    Args:
        part: edited in place; its dendrites stay where they are.
        apart: paths of modules inside that become graphs of their own.
        reason: why.

    Raises:
        CaptureError: if its forward, as things are now, cannot be captured any more.
    """
    perforation = part.perforation
    names = {site.name for site in perforation.sites}
    release(part, perforation.absorbed)
    try:
        with _without_dendrites(part):
            captured = capture_clone(
                part.original(),
                is_op,
                hides,
                apart,
                done=lambda module: isinstance(module, PerforatedModule),
                reason=reason,
                example=perforation.example,
            )
            if "" not in captured.parts:
                where = perforation.path or type(part).__name__
                raise CaptureError(
                    f"the graph of {where!r} cannot follow this change: {captured.kept['']}; make "
                    "it before pbfx.transform"
                )
            plan = make_plan(captured, lambda parts: _choose_again(parts, names))
        places = _places(
            plan,
            perforation.config,
            [path for path in captured.parts if path],
            prefix=perforation.path,
            phase=perforation.phase,
            draws=perforation.draws,
            tracker=perforation.tracker,
        )
    except BaseException:
        absorb(part, perforation.absorbed)
        raise
    # From here on nothing can fail but rebuilding, which puts itself back.
    _note_kept(plan)
    graph = captured.parts[""].graph
    changed = str(graph) != str(perforation.source) or bool(places)
    before = {path: part.get_submodule(path) for path in apart}
    perforation.source, perforation.absorbed = graph, captured.parts[""].absorbed
    perforation.sites, perforation.skipped = plan.chosen[""], plan.skipped[""]
    redirect([*part.modules(), *places.values()], places)
    absorb(part, perforation.absorbed)
    for path, module in before.items():
        # Whoever still holds the module that was there is led to the one that is there now.
        if part.get_submodule(path) is not module:
            lead(module, part, path)
    if changed:
        part.rebuild()


@contextmanager
def _without_dendrites(part: PerforatedModule) -> Iterator[None]:
    """Take the dendrites away while the module is captured, which knows plain modules only."""
    taken = []
    for site in part.perforation.sites:
        owner, _, name = site.dendrites.rpartition(".")
        modules = part.get_submodule(owner)._modules
        taken.append((modules, name, modules.pop(name, None)))
    try:
        yield
    finally:
        for modules, name, dendrites in taken:
            if dendrites is not None:
                modules[name] = dendrites


def _choose_again(parts: Parts, names: set[str]) -> Choices:
    """Choose the sites of before, whichever graph they are in now."""
    return {
        path: (tuple(site for site in sites if join(path, site.name) in names), ())
        for path, (_, sites) in parts.items()
    }


def _places(
    plan: Plan, config: Config, paths: Iterable[str], prefix: str = "", **state: Any
) -> dict[int, nn.Module]:
    """Return the perforated modules at `paths`, by the id of the module whose place they take."""
    return {
        id(part.root): PerforatedModule.over(
            part.root,
            Perforation(
                source=part.graph,
                sites=plan.chosen[path],
                skipped=plan.skipped[path],
                config=config,
                path=join(prefix, path),
                rung=part.rung,
                reason=part.reason,
                kind=type(part.root),
                absorbed=part.absorbed,
                recapture=recapture,
                example=part.example,
                **state,
            ),
        )
        for path in paths
        if plan.chosen[path]
        for part in [plan.captured.parts[path]]
    }


def _note_kept(plan: Plan) -> None:
    """Leave the reasons on the modules that keep their own forward."""
    captured = plan.captured
    for path, left in plan.outside.items():
        module = captured.root.get_submodule(path)
        module.__dict__[ATTRIBUTE] = Kept(captured.kept.get(path, ""), left)
    for path, part in captured.parts.items():
        if not plan.chosen[path]:
            reason = "" if part.rung is Rung.OP else "no op in it can grow"
            part.root.__dict__[ATTRIBUTE] = Kept(reason, plan.skipped[path])


def _owner(root: nn.Module, site: Site) -> nn.Module:
    return root.get_submodule(site.weight.rpartition(".")[0])


def _left_for(captured: Capture, path: str, op: Skipped) -> Skipped:
    """Return `op` of the graph at `path` with the reason for which capture left it, if it did."""
    return dataclasses.replace(op, reason=captured.left.get(join(path, op.name), op.reason))


def _outside(captured: Capture) -> dict[str, tuple[Skipped, ...]]:
    """Return the layers that forwards of their own call and that cannot grow, by their owner."""
    climbed = captured.parts.keys() | captured.kept.keys()
    found: dict[str, tuple[Skipped, ...]] = {}
    for path in (*captured.kept, *_holders(captured)):
        layers = {
            name: child
            for name, child in captured.root.get_submodule(path).named_children()
            if next(child.parameters(), None) is not None
        }
        found[path] = tuple(
            _left_for(captured, path, Skipped(name, type(m).__name__, why_no_layer(m)))
            for name, m in layers.items()
            if not any(f"{known}.".startswith(f"{join(path, name)}.") for known in climbed)
        ) + _own_parameters(captured.root.get_submodule(path))
    return found


def _own_parameters(module: nn.Module) -> tuple[Skipped, ...]:
    """Return the matrices and kernels that a kept forward may use in an op of any kind."""
    if is_torch_layer(module):
        return ()
    why = "a forward that is no graph reads it"
    return tuple(
        Skipped(name, OWN_PARAMETER, why)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() > 1
    )


def _holders(captured: Capture) -> list[str]:
    """Return the containers between what keeps its forward and what was captured inside it."""
    climbed = captured.parts.keys() | captured.kept.keys()
    found: set[str] = set()
    for path in (*climbed, *captured.left):
        passed = []
        while path:
            path = path.rpartition(".")[0]
            if path in climbed:
                break
            passed.append(path)
        # Above those in a graph stands the graph's own module.
        if path not in captured.parts:
            found.update(passed)
    return sorted(found)
