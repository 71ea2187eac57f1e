"""An op and the norm that follows it are one site: where the dendrites join, and how they start."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pbfx
from models import assert_equal, assert_lowers, randomise, run
from pbfx.learning.scaling import scale_candidates
from pbfx.passes import insert_dendrites
from pbfx.pipeline import op_name
from pbfx.restructure import learners_of, start_dendrite_phase
from pbfx.sites import describe_sites
from pbfx.spread import Spread

F64 = torch.float64


class Net(nn.Module):
    """Parts for forwards that are given as functions of (self, x)."""

    def __init__(self, body) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.Linear(4, 6)
        self.bn2, self.bn1, self.ln = nn.BatchNorm2d(6), nn.BatchNorm1d(6), nn.LayerNorm(6)
        self.gn, self.inst, self.rms = nn.GroupNorm(2, 6), nn.InstanceNorm2d(6), nn.RMSNorm(6)
        self.rows, self.flat, self.act = nn.BatchNorm1d(3), nn.Flatten(2), nn.ReLU(inplace=True)
        self.w, self.scale = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.rand(6))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.5)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


IMAGE, TOKENS, ROWS = (2, 4, 5, 5), (2, 3, 4), (7, 4)
# What is written, the shape of the input, the kind of norm, views between.
JOINED = {
    "batch 2d": (lambda s, x: s.bn2(s.conv(x)), IMAGE, "BatchNorm2d", 0),
    "batch 1d": (lambda s, x: s.bn1(s.fc(x)), ROWS, "BatchNorm1d", 0),
    "group": (lambda s, x: s.gn(s.conv(x)), IMAGE, "GroupNorm", 0),
    "instance": (lambda s, x: s.inst(s.conv(x)), IMAGE, "InstanceNorm2d", 0),
    "layer": (lambda s, x: s.ln(s.fc(x)), TOKENS, "LayerNorm", 0),
    "rms": (lambda s, x: s.rms(s.fc(x)), TOKENS, "RMSNorm", 0),
    "by keyword": (lambda s, x: s.ln(input=s.fc(x)), TOKENS, "LayerNorm", 0),
    "function of a function": (
        lambda s, x: F.layer_norm(F.linear(x, s.w), (6,)),
        TOKENS,
        "layer_norm",
        0,
    ),
    "batch norm function": (
        lambda s, x: F.batch_norm(s.conv(x), s.mean, s.var, s.scale, training=s.training),
        IMAGE,
        "batch_norm",
        0,
    ),
    "group norm function": (lambda s, x: F.group_norm(s.conv(x), 3), IMAGE, "group_norm", 0),
    "instance norm function": (lambda s, x: F.instance_norm(s.conv(x)), IMAGE, "instance_norm", 0),
    "rms norm function": (lambda s, x: F.rms_norm(s.fc(x), (6,), s.scale), TOKENS, "rms_norm", 0),
    "channels last": (
        lambda s, x: s.ln(s.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        IMAGE,
        "LayerNorm",
        1,
    ),
    "permuted as a list": (
        lambda s, x: F.layer_norm(torch.permute(s.conv(x), [0, -2, 3, 1]), [6]),
        IMAGE,
        "layer_norm",
        1,
    ),
    "tokens of an image": (
        lambda s, x: s.ln(s.conv(x).flatten(2).transpose(1, 2)),
        IMAGE,
        "LayerNorm",
        2,
    ),
    "a module flattens": (
        lambda s, x: s.rms(torch.transpose(s.flat(s.conv(x)), -1, -2)),
        IMAGE,
        "RMSNorm",
        2,
    ),
    "batch norm over tokens": (
        lambda s, x: s.bn1(s.fc(x).transpose(1, 2)).transpose(1, 2),
        TOKENS,
        "BatchNorm1d",
        1,
    ),
    "rows": (lambda s, x: s.bn1(s.fc(x).reshape(-1, 6)).view(2, 3, 6), TOKENS, "BatchNorm1d", 1),
    "sizes are no readers": (
        lambda s, x: [y := s.fc(x), s.bn1(y.flatten(0, 1)).view(y.shape)][1],
        TOKENS,
        "BatchNorm1d",
        1,
    ),
    "in place afterwards": (lambda s, x: s.act(s.bn2(s.conv(x))), IMAGE, "BatchNorm2d", 0),
}
FOLDED = {"batch 2d", "batch 1d", "batch norm function", "batch norm over tokens"}
FOLDED |= {"rows", "sizes are no readers", "in place afterwards"}


@pytest.mark.parametrize("name", JOINED)
def test_dendrites_join_after_the_norm(name: str):
    body, shape, kind, views = JOINED[name]
    torch.manual_seed(0)
    model = Net(body).to(F64)
    x = torch.randn(shape, dtype=F64)
    ours = pbfx.transform(model, pbfx.Config(activation="tanh"))
    (site,) = ours.perforation.sites
    assert (site.norm, site.biased) == (kind, True)
    for training in (True, False):
        model.train(training)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        expected = run(model, x.clone())
        model.load_state_dict(state)
        ours.train(training)
        assert_equal(run(pbfx.grow(ours), x.clone()), expected)
        model.load_state_dict(state)
    nodes = list(ours.graph.nodes)
    (dendrites,) = [n for n in nodes if n.target == site.dendrites]
    undone = dendrites.args[0]
    for _ in range(views):
        undone = undone.args[0]
    norm = undone.target
    found = type(ours.get_submodule(norm)) if undone.op == "call_module" else norm
    assert found.__name__ == kind
    # A second run finds them.
    ctx = pbfx.passes.context.PassContext(ours.perforation.sites, pbfx.Phase.NEURON)
    assert insert_dendrites(ours, ctx) == 0
    # Lowered, the norm is folded into the weights, or the soma stays apart.
    randomise(ours)
    lowered = assert_lowers(ours, x)
    folds = name in FOLDED
    assert lowered.notes == ({} if folds else {site.name: f"the {kind} behind it cannot be folded"})
    assert folds != any(kind in (n.op, op_name(lowered, n)) for n in lowered.graph.nodes)
    assert_lowers(ours.train(), x)


def plainly(model: Net, name: str, x: Tensor, grown: nn.Module) -> Tensor:
    """Compute `model` with its dendrites in plain torch, where the norm is: the oracle."""
    body = JOINED[name][0]
    one = {key: getattr(grown, key)[0] for key in ("weight", "bias", "to_soma")}

    def soma(x: Tensor) -> Tensor:
        if "conv" in body.__code__.co_names:
            return F.conv2d(x, one["weight"].detach(), one["bias"].detach(), padding=1)
        return F.linear(x, one["weight"].detach(), one["bias"].detach())

    a = torch.tanh(soma(x.detach()))
    a = a * (one["to_soma"].view(-1, 1, 1) if a.dim() == 4 else one["to_soma"])
    # The same views that lie between soma and norm, and those after it.
    twin = Net(lambda s, y: body(s, y))
    fake = {"conv": nn.Identity(), "fc": nn.Identity()}
    for attribute in ("bn2", "bn1", "ln", "gn", "inst", "rms", "act"):
        fake[attribute] = nn.Identity()
    for attribute, module in fake.items():
        setattr(twin, attribute, module)
    return body(model, x) + body(twin, a)


WITH_ORACLE = [
    name
    for name in JOINED
    if "function" not in name
    and name not in ("in place afterwards", "permuted as a list", "by keyword")
]


@pytest.mark.parametrize("name", WITH_ORACLE)
def test_outputs_and_gradients_are_the_oracles(name: str):
    torch.manual_seed(0)
    model = Net(JOINED[name][0]).to(F64)
    x = torch.randn(JOINED[name][1], dtype=F64, requires_grad=True)
    ours = pbfx.grow(pbfx.transform(model))
    randomise(ours)
    (grown,) = ours.grown().values()
    named = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    results = []
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for out in (ours(x), None):
        if out is None:
            model.load_state_dict(state)
            out = plainly(model, name, x, grown)
        loss = (out**3).sum()
        grads = torch.autograd.grad(loss, [x, *named.values()], allow_unused=True)
        results.append((out, *grads))
    for found, expected, what in zip(*results, ["out", "x", *named], strict=True):
        if expected is None:
            assert found is None, what
        else:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=what)


PLAIN = {
    "two readers": (lambda s, x: [y := s.conv(x), s.bn2(y) + y][1], IMAGE),
    "an activation between": (lambda s, x: s.bn2(torch.relu(s.conv(x))), IMAGE),
    "a norm of something else": (
        lambda s, x: s.bn1(x.flatten(2)[:, [0, 1, 2, 3, 0, 1]]).sum() + s.conv(x),
        IMAGE,
    ),
    "also its scale": (lambda s, x: [y := s.fc(x), F.layer_norm(y, (6,), y[0, 0])][1], TOKENS),
    "other channels behind a view": (lambda s, x: s.rows(s.fc(x).contiguous()), TOKENS),
    "what it read is overwritten": (
        lambda s, x: [x := x * 1, y := s.fc(x), x.zero_(), s.ln(y)][3],
        TOKENS,
    ),
    "or by a module": (lambda s, x: [x := x * 1, y := s.fc(x), s.act(x), s.ln(y)][3], TOKENS),
    "or by a flag": (
        lambda s, x: [x := x * 1, y := s.fc(x), F.relu(x, True), s.ln(y)][3],
        TOKENS,
    ),
    "computed axes": (
        lambda s, x: s.ln(s.fc(x).transpose(x.dim() - 2, 1)),
        TOKENS,
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_other_ops_keep_their_dendrites_at_their_output(name: str):
    body, shape = PLAIN[name]
    model, x = Net(body).eval(), torch.randn(shape)
    model.requires_grad_(False)
    ours = pbfx.transform(model)
    (site,) = ours.perforation.sites
    assert site.norm is None
    expected = run(model, x)
    assert_equal(run(pbfx.grow(ours), x), expected)
    (dendrites,) = [n for n in ours.graph.nodes if n.target == site.dendrites]
    assert dendrites.args[0].target in (site.name, F.linear)
    randomise(ours)
    assert assert_lowers(ours, x).notes == {}


def test_an_operator_that_assigns_keeps_dendrites_where_x_is_still_x():
    """Symbolic tracing never writes these; exported graphs may."""
    for write in (operator.iadd, operator.add):
        graph = fx.Graph()
        x = graph.placeholder("x")
        y = graph.call_module("fc", (x,))
        graph.call_function(write, (x, 1))
        graph.output(graph.call_module("ln", (y,)))
        gm = fx.GraphModule(Net(None), graph)
        sites, _ = describe_sites(gm, graph)
        assert [site.norm for site in sites] == [None if write is operator.iadd else "LayerNorm"]


class Overridden(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_is_no_norm_of_torchs():
    def norm(module: nn.Module) -> str | None:
        return pbfx.transform(nn.Sequential(nn.Linear(3, 2), module)).perforation.sites[0].norm

    # Traced into: what it calls is a norm.
    assert norm(Overridden(2)) == "layer_norm"
    assert norm(nn.LocalResponseNorm(2)) is None
    replaced = nn.LayerNorm(2)
    replaced.forward = torch.tanh
    assert norm(replaced) is None


def test_each_call_joins_where_its_reader_is():
    """A conv shared by two norms and one bare call: three places, one set of dendrites."""
    torch.manual_seed(0)
    net = Net(lambda s, x: s.bn2(s.conv(x)) + s.gn(s.conv(x * 2)) + s.conv(x * 3).tanh())
    ours = pbfx.transform(net.eval())
    (site,) = ours.perforation.sites
    assert (site.calls, site.norm) == (3, "BatchNorm2d")
    pbfx.grow(ours)
    read = [str(n.args[0].target) for n in ours.graph.nodes if n.target == site.dendrites]
    assert read == ["bn2", "gn", "conv"]


def test_keys_and_costs():
    ours = pbfx.transform(Net(JOINED["batch 2d"][0]))
    report = pbfx.explain(ours).sites[0]
    weights = 6 * 4 * 9
    assert (report.parameters, report.next_dendrite) == (weights, weights + 6 + 6)
    pbfx.grow(ours, 2)
    assert ours.get_parameter("conv.dendrites.bias").shape == (2, 6)
    assert pbfx.explain(ours).sites[0].parameters == weights + 2 * (weights + 6 + 6) + 6
    fresh = pbfx.transform(Net(JOINED["batch 2d"][0]))
    fresh.load_state_dict(ours.state_dict())
    assert fresh.structure() == ours.structure()


def primed(body, shape, batches: int, **settings) -> tuple[nn.Module, list, dict]:
    """Bring candidates so many batches far; return the model, its inputs, and its learners."""
    torch.manual_seed(0)
    net = Net(body)
    # Ranges that no default initialisation gives, off centre.
    inputs = [torch.randn(shape) * 40 + 25 for _ in range(batches)]
    ours = pbfx.transform(net, pbfx.Config(**settings))
    randomise(pbfx.grow(ours, 1))
    _, learners = start_dendrite_phase(ours)
    for learner in learners.values():
        with torch.no_grad():
            learner.candidates.to_dendrite.normal_()
        learner.attach()
    for x in inputs:
        ours(x).square().mean().backward()
    return ours, inputs, learners


def preactivations(model: nn.Module, x: Tensor) -> Tensor:
    """Return z (C, P, N) of the candidates of the one site of `model`, in plain torch."""
    (grown,) = model.grown().values()
    pool = grown.candidates

    def op(w: Tensor, b: Tensor) -> Tensor:
        y = F.conv2d(x, w, b, padding=1) if w.dim() == 4 else F.linear(x, w, b)
        return y.movedim(1, -1) if w.dim() == 4 else y

    a = torch.tanh(op(grown.weight[0], grown.bias[0]))
    stack = [
        op(w, b) + u[0] * a for w, b, u in zip(*map(Tensor.unbind, pool.learnt()), strict=True)
    ]
    return torch.stack([z.flatten(0, -2) for z in stack]).detach()


@pytest.mark.parametrize("name", ["batch 2d", "batch 1d", "layer", "tokens of an image"])
def test_candidates_start_with_zero_mean_and_unit_variance(name: str):
    body, shape = JOINED[name][:2]
    settings = {"priming_batches": 8, "measure_every": 50, "candidates": 3}
    model, inputs, _ = primed(body, shape, 4, **settings)
    z = torch.cat([preactivations(model, x) for x in inputs], 1)
    torch.testing.assert_close(z.mean(1), torch.zeros(3, 6), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.var(1, correction=0), torch.ones(3, 6), atol=1e-4, rtol=0)
    # Before that, the first half of the priming, nothing has moved.
    before, inputs, learners = primed(body, shape, 3, **settings)
    z = torch.cat([preactivations(before, x) for x in inputs], 1)
    assert z.std() > 5
    ((_, learner),) = learners.items()
    assert learner.candidates.spread.open
    assert not model.grown()[learner.candidates.site.name].candidates.spread.open


def test_scaling_happens_once_and_forgets_what_was_measured_before():
    body, shape = JOINED["batch 2d"][:2]
    settings = {"priming_batches": 8, "measure_every": 3, "candidate_lr": 1e-30}
    ours, _, learners = primed(body, shape, 4, **settings)
    ((_, learner),) = learners.items()
    pool = learner.candidates
    for name in ("running", "heldout", "running_batches", "direction", "error_mean"):
        assert not getattr(pool, name).any(), name
    assert torch.equal(pool.best_weight, pool.weight)
    assert torch.equal(pool.best_bias, pool.bias)
    assert torch.equal(pool.best_to_dendrite, pool.to_dendrite)
    before, seen = copy.deepcopy(pool.state_dict()), pool.spread.count.clone()
    ours(torch.randn(shape) * 3).square().mean().backward()
    scale_candidates(pool, learner.config)
    assert torch.equal(pool.weight, before["weight"])
    assert torch.equal(pool.spread.count, seen), "it goes on measuring"
    assert pool.running_batches == 1
    assert pool.direction.any()


def test_what_a_pool_has_measured_best_stays():
    body, shape = JOINED["batch 1d"][:2]
    ours, _, learners = primed(body, shape, 3, priming_batches=8, measure_every=3)
    ((_, learner),) = learners.items()
    learner.measure()
    pool = learner.candidates
    measured = pool.best_score > 0
    assert measured.any()
    best = pool.best_weight.clone()
    ours(torch.randn(shape)).square().mean().backward()
    assert not pool.spread.open
    assert torch.equal(pool.best_weight[measured], best[measured])
    # Saturated units measured nothing, and start afresh.
    assert torch.equal(pool.best_weight[~measured], pool.weight[~measured])


def test_a_constant_preactivation_is_left_alone():
    _, _, learners = primed(lambda s, x: s.bn1(s.fc(x * 0)), ROWS, 4, priming_batches=8)
    ((_, learner),) = learners.items()
    assert all(value.isfinite().all() for value in learner.candidates.state_dict().values())
    assert not learner.candidates.spread.open


@pytest.mark.parametrize("priming", [0, 1])
def test_without_priming_the_first_batch_scales(priming: int):
    body, shape = JOINED["batch 1d"][:2]
    ours, inputs, _ = primed(body, shape, 1, priming_batches=priming)
    z = preactivations(ours, inputs[0])
    torch.testing.assert_close(z.var(1, correction=0).mean(), torch.tensor(1.0), atol=0.05, rtol=0)


def test_a_resumed_pool_scales_when_the_first_would_have():
    body, shape = JOINED["batch 2d"][:2]
    for batches in (2, 5):
        ours, inputs, learners = primed(body, shape, batches, priming_batches=8)
        twin = copy.deepcopy(ours)
        resumed = learners_of(twin)
        for name, learner in resumed.items():
            learner.load_state_dict(learners[name].state_dict())
            learner.attach()
        for model in (ours, twin):
            for x in inputs[:2]:
                model(x).square().mean().backward()
        for key, value in ours.state_dict().items():
            assert torch.equal(twin.state_dict()[key], value), key


def test_a_site_without_a_norm_has_nothing_to_measure():
    ours = pbfx.transform(nn.Linear(3, 2))
    start_dendrite_phase(ours)
    assert ours.grown()[""].candidates.spread is None


@pytest.mark.parametrize(("shape", "axis"), [((3, 5, 4), -1), ((3, 4), -1), ((3, 2, 4, 5, 6), -3)])
def test_spread_merges_batches(shape: tuple[int, ...], axis: int):
    torch.manual_seed(0)
    batches = [torch.randn(shape) * 1e-2 + 100 + batch for batch in range(5)]
    spread = Spread(3, shape[len(shape) + axis], torch.empty(0), torch.float32)
    for index, z in enumerate(batches):
        spread.add(z, axis)
        # Neither a batch of nothing nor one that overflowed leaves a trace.
        if z.dim() > 2:
            spread.add(z[:, :0], axis)
        spread.add(z.clone().fill_(torch.inf if index % 2 else torch.nan), axis)
    rows = torch.cat([z.movedim(axis, 1).reshape(3, shape[axis], -1) for z in batches], 2).double()
    torch.testing.assert_close(spread.mean.double(), rows.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        spread.variance.double(), rows.var(2, correction=0), rtol=1e-5, atol=0
    )
    assert spread.count == rows.shape[2]


def test_the_pass_undoes_and_repeats_views():
    ours = pbfx.transform(Net(JOINED["tokens of an image"][0]))
    pbfx.grow(ours)
    start_dendrite_phase(ours)
    names = [(n.op, n.target) for n in ours.graph.nodes if n.op != "placeholder"]
    assert names == [
        ("call_module", "conv"),
        ("call_method", "flatten"),
        ("call_method", "transpose"),
        ("call_module", "ln"),
        ("call_function", torch.transpose),
        ("call_method", "reshape_as"),
        ("call_module", "conv.dendrites"),
        ("call_function", operator.getitem),
        ("call_function", operator.getitem),
        ("call_module", "conv.dendrites.candidates"),
        ("call_method", "reshape_as"),
        ("call_method", "transpose"),
        ("output", "output"),
    ]
    ours.graph.lint()
    assert isinstance(ours.graph, fx.Graph)
