"""What each pass writes into a graph, what it leaves alone, and that a second run does nothing."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import pbfx
from pbfx.candidates import Candidates
from pbfx.dendrites import Dendrites
from pbfx.passes import attach_candidates, hold_eval, insert_dendrites
from pbfx.passes.context import PassContext
from pbfx.phase import Phase
from pbfx.sites import describe_sites

Rows = list[tuple[str, object, tuple, dict]]


def rows(graph: fx.Graph) -> Rows:
    """Return a graph as (op, target, args, kwargs), nodes in arguments by their names."""
    named = lambda value: fx.node.map_arg(value, lambda node: node.name)  # noqa: E731
    return [(n.op, n.target, named(n.args), named(n.kwargs)) for n in graph.nodes]


class Parts(nn.Module):
    """What the graphs below call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 1)})
        self.w = nn.Parameter(torch.randn(4, 4))


def grow(gm: fx.GraphModule, *names: str, candidates: int = 0, phase: Phase = Phase.NEURON):
    """Give the named sites of `gm` one dendrite each, and return the context for the passes."""
    sites, _ = describe_sites(gm, gm.graph)
    assert {*names} <= {site.name for site in sites}
    for site in sites:
        if site.name in names:
            weight = gm.get_parameter(site.weight)
            dendrites = Dendrites(site, pbfx.Config(), weight)
            dendrites.resize(1)
            if candidates:
                dendrites.candidates = Candidates(
                    site,
                    pbfx.Config(),
                    torch.randn(candidates, *weight.shape),
                    torch.randn(candidates, site.neurons) if site.biased else None,
                    1,
                )
            owner, _, name = site.dendrites.rpartition(".")
            gm.get_submodule(owner).add_module(name, dendrites)
    return PassContext(sites, phase)


def by_hand(build) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return fx.GraphModule(Parts(), graph)


def check(gm: fx.GraphModule) -> None:
    """Check that a rewritten graph is whole."""
    gm.graph.lint()
    gm.recompile()


def two_readers(g: fx.Graph, x: fx.Node) -> fx.Node:
    y = g.call_module("fc", (x,))
    return g.call_function(operator.add, (g.call_function(F.relu, (y,), {"inplace": True}), y))


def test_dendrites_stand_between_a_soma_and_its_readers():
    gm = by_hand(two_readers)
    x = torch.randn(3, 4)
    expected = gm(x)
    ctx = grow(gm, "fc")
    assert insert_dendrites(gm, ctx) == 1
    assert rows(gm.graph) == [
        ("placeholder", "x", (), {}),
        ("call_module", "fc", ("x",), {}),
        ("call_module", "fc.dendrites", ("fc", "x"), {}),
        ("call_function", operator.getitem, ("fc_dendrites", 0), {}),
        ("call_function", F.relu, ("getitem",), {"inplace": True}),
        ("call_function", operator.add, ("relu", "getitem"), {}),
        ("output", "output", ("add",), {}),
    ]
    check(gm)
    assert torch.equal(gm(x), expected)
    assert insert_dendrites(gm, ctx) == 0


def test_every_call_of_a_soma_gets_the_same_dendrites():
    gm = by_hand(lambda g, x: g.call_module("fc", (g.call_module("fc", (x,)),)))
    assert insert_dendrites(gm, grow(gm, "fc")) == 2
    assert rows(gm.graph) == [
        ("placeholder", "x", (), {}),
        ("call_module", "fc", ("x",), {}),
        ("call_module", "fc.dendrites", ("fc", "x"), {}),
        ("call_function", operator.getitem, ("fc_dendrites", 0), {}),
        ("call_module", "fc", ("getitem",), {}),
        ("call_module", "fc.dendrites", ("fc_1", "getitem"), {}),
        ("call_function", operator.getitem, ("fc_dendrites_1", 0), {}),
        ("output", "output", ("getitem_1",), {}),
    ]
    check(gm)


def test_readers_inside_nested_outputs_read_the_neuron():
    gm = by_hand(lambda g, x: {"y": [g.call_module("fc", (x,))], "x": x})
    assert insert_dendrites(gm, grow(gm, "fc")) == 1
    assert rows(gm.graph)[-1] == ("output", "output", ({"y": ["getitem"], "x": "x"},), {})
    check(gm)


@pytest.mark.parametrize("named", [True, False])
def test_functional_and_keyword_somas(named: bool):
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        w = g.get_attr("w")
        y = (
            g.call_function(F.linear, (), {"weight": w, "input": x})
            if named
            else g.call_function(F.linear, (x, w))
        )
        return g.call_module("inner.conv", (), {"input": y})

    gm = by_hand(build)
    assert insert_dendrites(gm, grow(gm, "w", "inner.conv")) == 2
    inserted = [row for row in rows(gm.graph) if "dendrites" in str(row[1])]
    assert inserted == [
        ("call_module", "w_dendrites", ("linear", "x"), {}),
        ("call_module", "inner.conv.dendrites", ("inner_conv", "getitem"), {}),
    ]
    check(gm)
    assert gm(torch.randn(4, 4)).shape == (4, 4)


def test_another_weight_of_the_same_function_is_not_touched():
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        return g.call_function(F.linear, (g.call_module("fc", (x,)), g.get_attr("w")))

    gm = by_hand(build)
    before = rows(gm.graph)
    # Neither a site without a module, nor no site at all.
    assert insert_dendrites(gm, grow(gm)) == 0
    assert insert_dendrites(gm, PassContext((), Phase.NEURON)) == 0
    assert rows(gm.graph) == before
    assert insert_dendrites(gm, grow(gm, "fc")) == 1
    assert rows(gm.graph)[-2] == ("call_function", F.linear, ("getitem", "w"), {})


def test_inserted_nodes_point_to_the_line_of_their_soma():
    model = pbfx.transform(nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU()))
    pbfx.grow(model)
    model.new_candidates([(model.perforation.sites[0], 2)])
    model.rebuild()
    nodes = {node.name: node for node in model.graph.nodes}
    soma = nodes["_0_0"]
    assert "container.py" in soma.meta["stack_trace"]
    added = ["_0_0_dendrites", "getitem", "getitem_1", "_0_0_dendrites_candidates"]
    for name in added:
        assert nodes[name].meta["stack_trace"] == soma.meta["stack_trace"]
        assert nodes[name].meta["nn_module_stack"] == soma.meta["nn_module_stack"]


def test_candidates_stand_in_the_path_of_the_error():
    gm = by_hand(two_readers)
    ctx = grow(gm, "fc", candidates=3)
    insert_dendrites(gm, ctx)
    assert attach_candidates(gm, ctx) == 1
    assert rows(gm.graph) == [
        ("placeholder", "x", (), {}),
        ("call_module", "fc", ("x",), {}),
        ("call_module", "fc.dendrites", ("fc", "x"), {}),
        ("call_function", operator.getitem, ("fc_dendrites", 0), {}),
        ("call_function", operator.getitem, ("fc_dendrites", 1), {}),
        ("call_module", "fc.dendrites.candidates", ("getitem", "x", "getitem_1"), {}),
        ("call_function", F.relu, ("fc_dendrites_candidates",), {"inplace": True}),
        ("call_function", operator.add, ("relu", "fc_dendrites_candidates"), {}),
        ("output", "output", ("add",), {}),
    ]
    check(gm)
    assert attach_candidates(gm, ctx) == 0
    # Their output is used, so what fx takes for dead does not include them.
    assert not gm.graph.eliminate_dead_code()


def test_candidates_attach_at_every_call_and_only_where_they_are():
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        y = g.call_module("fc", (g.call_module("fc", (x,)),))
        return g.call_function(F.linear, (y, g.get_attr("w")))

    gm = by_hand(build)
    ctx = grow(gm, "w")
    grow(gm, "fc", candidates=2)
    assert attach_candidates(gm, ctx) == 0, "there is no dendrites node yet"
    assert insert_dendrites(gm, ctx) == 3
    assert attach_candidates(gm, ctx) == 2
    called = [node.target for node in gm.graph.nodes if str(node.target).endswith("candidates")]
    assert called == ["fc.dendrites.candidates"] * 2
    check(gm)
    assert insert_dendrites(gm, ctx) == attach_candidates(gm, ctx) == 0


class Modes(nn.Module):
    """One module or function whose result depends on a mode, called as given."""

    def __init__(self, body, module: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.body = module, body
        # Something to make sites of.
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", torch.rand(4))
        self.register_buffer("variance", torch.rand(4) + 0.5)

    def forward(self, x):
        return self.fc(self.body(self, x))


def called(self, x):
    return self.layer(x)


def by_keyword(self, x):
    return self.layer(input=x)


class MyDropout(nn.Dropout):
    pass


class MyNorm(nn.BatchNorm2d):
    def __init__(self):
        super().__init__(4, eps=1e-2)

    def extra_repr(self):
        return "mine"


HELD = {
    "Dropout": (nn.Dropout(0.5), (3, 4)),
    "Dropout1d": (nn.Dropout1d(0.5), (3, 4, 4)),
    "Dropout2d": (nn.Dropout2d(0.5), (3, 4, 4, 4)),
    "Dropout3d": (nn.Dropout3d(0.5), (3, 4, 2, 4, 4)),
    "AlphaDropout": (nn.AlphaDropout(0.5), (3, 4)),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout(0.5), (3, 4, 4, 4)),
    "inplace": (nn.Dropout(0.5, inplace=True), (3, 4)),
    "subclass": (MyDropout(0.5), (3, 4)),
    "BatchNorm1d": (nn.BatchNorm1d(4), (3, 4)),
    "BatchNorm1d over time": (nn.BatchNorm1d(4), (3, 4, 4)),
    "BatchNorm2d": (nn.BatchNorm2d(4, affine=False), (3, 4, 4, 4)),
    "BatchNorm3d": (nn.BatchNorm3d(4, eps=1e-1, momentum=None), (3, 4, 2, 4, 4)),
    "SyncBatchNorm": (nn.SyncBatchNorm(4), (3, 4, 4)),
    "norm subclass": (MyNorm(), (3, 4, 4, 4)),
}


def held(model: Modes) -> tuple[fx.GraphModule, int]:
    """Return the source graph of `model` with hold_eval run over it, and its count."""
    ours = pbfx.transform(model)
    gm = fx.GraphModule(ours, ours.perforation.source)
    gm.graph = fx.Graph()
    gm.graph.output(gm.graph.graph_copy(ours.perforation.source, {}))
    rewrites = hold_eval(gm, PassContext(ours.perforation.sites, Phase.DENDRITE))
    assert hold_eval(gm, PassContext(ours.perforation.sites, Phase.DENDRITE)) == 0
    check(gm)
    return gm, rewrites


def settle(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Give running statistics values of their own."""
    torch.manual_seed(0)
    if getattr(module, "running_mean", None) is not None:
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)


@pytest.mark.parametrize("body", [called, by_keyword])
@pytest.mark.parametrize("kind", HELD)
def test_modules_are_held_in_eval(kind: str, body):
    module, shape = HELD[kind]
    settle(module, shape)
    model = Modes(body, module)
    x = torch.randn(shape)
    expected = model.eval()(x.clone())
    gm, rewrites = held(model.train())
    assert rewrites == 1
    assert "layer" not in {node.target for node in gm.graph.find_nodes(op="call_module")}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for training in (True, False):
        for part in gm.modules():
            part.train(training)
        assert torch.equal(gm(x.clone()), expected)
    # Counters included: nothing moved.
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


FUNCTIONS = {
    "dropout": lambda s, x: F.dropout(x, 0.5, s.training),
    "dropout by keyword": lambda s, x: F.dropout(x, p=0.5, training=s.training),
    "torch.dropout": lambda s, x: torch.dropout(x, 0.5, s.training),
    "alpha": lambda s, x: F.alpha_dropout(x, 0.5, s.training),
    "feature alpha": lambda s, x: F.feature_alpha_dropout(x[..., None], 0.5, s.training)[..., 0],
    "batch norm": lambda s, x: F.batch_norm(x, s.mean, s.variance, training=s.training),
    "rrelu": lambda s, x: F.rrelu(x, training=s.training),
    "arithmetic": lambda s, x: x * (1 + s.training),
    "two readers": lambda s, x: F.dropout(F.dropout(x, 0.2, s.training), 0.2, s.training),
    "of a part": lambda s, x: F.dropout(x, 0.5, s.fc.training),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_are_held_in_eval(kind: str):
    torch.manual_seed(0)
    model, x = Modes(FUNCTIONS[kind]), torch.randn(3, 4)
    expected = model.eval()(x)
    torch.manual_seed(1)
    statistics = model.mean.clone()
    noisy = model.train()(x)
    assert not torch.equal(noisy, expected), "the mode makes a difference in the plain model"
    model.mean.copy_(statistics)
    expected = model.eval()(x)
    gm, rewrites = held(model.train())
    assert rewrites == 1
    assert not [n for n in gm.graph.nodes if str(n.target).endswith("training")]
    assert torch.equal(gm.train()(x), expected)
    assert torch.equal(model.mean, statistics)


UNTOUCHED = {
    "BatchNorm without statistics": (called, nn.BatchNorm1d(4, track_running_stats=False)),
    "LayerNorm": (called, nn.LayerNorm(4)),
    "GroupNorm": (called, nn.GroupNorm(2, 4)),
    "Identity": (called, nn.Identity()),
    "a constant mode": (lambda s, x: F.dropout(x, 0.5, False), None),
    "always on": (lambda s, x: F.dropout(x, 0.0, True), None),
    "statistics of the batch": (lambda s, x: F.batch_norm(x, None, None, training=True), None),
}


@pytest.mark.parametrize("kind", UNTOUCHED)
def test_what_has_no_mode_stays(kind: str):
    body, module = UNTOUCHED[kind]
    model, x = Modes(body, module), torch.randn(3, 4)
    gm, rewrites = held(model)
    assert rewrites == 0
    assert rows(gm.graph) == rows(pbfx.transform(model).perforation.source)
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_modules_with_hooks_stay(register: str):
    for module in (nn.Dropout(0.5), nn.BatchNorm1d(4)):
        getattr(module, register)(lambda *_: None)
        assert held(Modes(called, module))[1] == 0


def test_the_neuron_phase_reads_the_mode():
    model = pbfx.transform(Modes(FUNCTIONS["dropout"], None))
    before = rows(model.graph)
    assert hold_eval(model, PassContext(model.perforation.sites, Phase.NEURON)) == 0
    assert rows(model.graph) == before
