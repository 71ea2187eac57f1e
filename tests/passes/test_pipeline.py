"""The runner checks every pass, names the one that failed, and leaves the old graph running."""

from __future__ import annotations

import functools

import pytest
from torch import fx, nn

import pbfx
from models import CASES, Case, assert_equal, each_case, perceptron, run
from pbfx import perforated
from pbfx.derived import DerivedGraphs
from pbfx.errors import PassError
from pbfx.passes import attach_candidates, hold_eval, insert_dendrites, unfold_layers
from pbfx.passes.context import PassContext
from pbfx.phase import Phase
from pbfx.pipeline import PASSES, run_passes
from pbfx.restructure import start_dendrite_phase


def raises(gm: fx.GraphModule, ctx: PassContext) -> int:
    # Half of the work is done when it fails.
    next(n for n in gm.graph.nodes if n.op == "call_module").replace_all_uses_with(
        next(iter(gm.graph.nodes))
    )
    raise KeyError("no such thing")


def breaks_the_graph(gm: fx.GraphModule, ctx: PassContext) -> int:
    nodes = list(gm.graph.nodes)
    nodes[0].append(nodes[-2])
    return 0


def calls_what_is_not_there(gm: fx.GraphModule, ctx: PassContext) -> int:
    output = list(gm.graph.nodes)[-1]
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_module("nowhere", output.args),)
    return 0


BAD = {
    raises: "KeyError: 'no such thing'",
    breaks_the_graph: "RuntimeError: Argument '_4_dendrites' of Node",
    calls_what_is_not_there: "nowhere",
}


@pytest.mark.parametrize("bad", BAD)
def test_a_failing_pass_names_itself_and_leaves_the_old_graph(bad, monkeypatch):
    model, x = pbfx.grow(pbfx.transform(perceptron())).eval(), CASES["perceptron"].input()
    graph, code, records = model.graph, model.code, model.perforation.records
    nodes, expected = [n.format_node() for n in graph.nodes], run(model, x)
    monkeypatch.setattr(
        perforated, "run_passes", functools.partial(run_passes, passes=(*PASSES, bad))
    )
    # Passes run where a graph is derived, and this one has been before.
    model.perforation.graphs = DerivedGraphs()
    with pytest.raises(PassError, match=f"pass {bad.__name__} .*on Sequential") as caught:
        model.rebuild()
    assert BAD[bad] in str(caught.value)
    assert model.graph is graph
    assert [n.format_node() for n in graph.nodes] == nodes
    assert model.code == code
    assert model.perforation.records is records
    assert_equal(run(model, x), expected)
    # Nor has the source graph suffered: the next attempt succeeds.
    monkeypatch.undo()
    model.rebuild()
    assert model.code == code


def test_growing_under_a_failing_pass_changes_nothing(monkeypatch):
    model, x = pbfx.transform(perceptron()).eval(), CASES["perceptron"].input()
    keys, code, expected = list(model.state_dict()), model.code, run(model, x)
    monkeypatch.setattr(perforated, "run_passes", functools.partial(run_passes, passes=(raises,)))
    with pytest.raises(pbfx.RestructureError, match="pass raises failed on Sequential: KeyError"):
        pbfx.grow(model)
    assert list(model.state_dict()) == keys
    assert model.structure().sites == {}
    assert model.code == code
    assert_equal(run(model, x), expected)
    monkeypatch.undo()
    assert pbfx.grow(model).structure().dendrites == 1


def test_the_order_is_data():
    assert (unfold_layers, insert_dendrites, attach_candidates, hold_eval) == PASSES
    model = pbfx.transform(perceptron())
    assert [record.name for record in model.perforation.records] == [p.__name__ for p in PASSES]


def test_records_say_what_changed():
    model = pbfx.transform(perceptron())
    assert [(r.rewrites, r.added, r.removed) for r in model.perforation.records] == [
        (0, {}, {}) for _ in PASSES
    ]
    pbfx.grow(model)
    start_dendrite_phase(model)
    unfold, insert, attach, hold = model.perforation.records
    assert unfold.rewrites == 0
    assert (insert.rewrites, insert.removed) == (2, {})
    assert insert.added == {"Dendrites": 2, "getitem": 2}
    assert (attach.rewrites, attach.removed) == (2, {})
    assert attach.added == {"Candidates": 2, "getitem": 2}
    assert hold.rewrites == 2
    assert hold.removed == {"BatchNorm1d": 1, "Dropout": 1}
    assert hold.added == {"get_attr": 1, "held_norm": 1}
    assert hold.diff() == "+1 get_attr +1 held_norm -1 BatchNorm1d -1 Dropout"
    assert all(record.seconds >= 0 for record in model.perforation.records)


@each_case
def test_the_source_graph_is_never_edited(case: Case):
    model = pbfx.transform(case.build())
    source = model.perforation.source
    before = [node.format_node() for node in source.nodes]
    pbfx.grow(model, 2)
    start_dendrite_phase(model)
    assert model.perforation.source is source
    assert [node.format_node() for node in source.nodes] == before
    assert source is not model.graph


@each_case
def test_an_ungrown_model_runs_the_source_graph(case: Case):
    model = pbfx.transform(case.build())
    assert [(n.op, n.target) for n in model.graph.nodes] == [
        (n.op, n.target) for n in model.perforation.source.nodes
    ]


@each_case
@pytest.mark.parametrize("phase", Phase)
def test_passes_do_nothing_to_what_they_made(case: Case, phase: Phase):
    model = pbfx.grow(pbfx.transform(case.build()))
    if phase is Phase.DENDRITE:
        start_dendrite_phase(model)
    records = run_passes(model, PassContext(model.perforation.sites, phase))
    assert [(record.name, record.rewrites) for record in records] == [
        (rewrite.__name__, 0) for rewrite in PASSES
    ]
    assert all(not record.added and not record.removed for record in records)


def test_a_rebuild_keeps_the_object_its_hooks_and_its_modules():
    model, x = pbfx.transform(perceptron()), CASES["perceptron"].input()
    modules, calls = dict(model.named_modules()), []
    model.register_forward_hook(lambda *_: calls.append(1))
    holder = nn.Sequential(model)
    pbfx.grow(model)
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    holder(x)
    assert calls == [1]
