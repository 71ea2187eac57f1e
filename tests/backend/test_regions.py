"""Regions: where a graph is cut, what is compiled again after a growth, and waiting for kernels."""

from __future__ import annotations

import copy
import operator
import shutil
import types
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from training_steps import QUICK, assert_alike, compiled, each_case, grown, step

import pbfx
from models import CASES, randomise
from pbfx.backend import compile_graph
from pbfx.backend.cuts import computed, cut_at_blocks, cut_at_sites
from pbfx.backend.overlap import overlapping
from pbfx.backend.regions import _compiled as compiled_regions
from pbfx.backend.regions import _surroundings, forget_regions
from pbfx.backend.settings import settings_of
from pbfx.candidates import Candidates
from pbfx.dendrites import Dendrites

needs_cxx = pytest.mark.skipif(
    not shutil.which("c++") and not shutil.which("g++"), reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    forget_regions()
    yield
    torch._dynamo.reset()


@each_case
@pytest.mark.parametrize("regional", [True, "sites"])
def test_regions(case, regional):
    model, x = grown(case), case.input()
    call = compiled(model, regional=regional, **QUICK)
    assert_alike(step(call, model, x), step(model, model, x))


def test_equal_blocks_are_compiled_once_and_a_growth_recompiles_what_changed(monkeypatch):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(self.fc(self.norm(x)))

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Sequential(*(Block() for _ in range(6))))
    model = pbfx.grow(pbfx.transform(plain))
    regions = []

    def counted(name: str):
        def compile_region(gm: fx.GraphModule, inputs: list[Tensor]):
            regions.append(gm)
            return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

        return compile_region

    monkeypatch.setattr("pbfx.backend.settings._registered", counted)
    call, x = compiled(model, regional=True, **QUICK), torch.randn(5, 3)

    def new() -> int:
        before = len(regions)
        assert_alike(step(call, model, x), step(model, model, x))
        return len(regions) - before

    # The stem, and one for all six blocks.
    assert new() == 2
    # The other five blocks need not run to be known.
    assert [known.outputs is not None for known in compiled_regions.values()] == [True, True]
    assert new() == 0
    pbfx.grow(model, 1, sites="1.3.fc")
    assert new() == 1
    pbfx.grow(model, 1, sites=["1.0.fc", "1.1.fc"])
    # They are now what that one is.
    assert new() == 0
    pbfx.grow(model)
    # The stem, and blocks of three dendrites: there are some of two already.
    assert new() == 2


def marked(value: fx.Node, path: str) -> fx.Node:
    """Give a node the module at a path as Dynamo does."""
    kind = Dendrites if path.endswith("dendrites") else nn.ReLU
    kind = Candidates if path.endswith("candidates") else kind
    value.meta["nn_module_stack"] = {"a": (path, kind)} if path else {}
    return value


# What is in sites `a` and `b`, and beside them.
A, B = (torch.exp, "a.dendrites"), (torch.exp, "b_dendrites")
SOMA, NORM = (torch.exp, "soma"), (torch.exp, "norm")


@pytest.mark.parametrize(
    ("ops", "regions"),
    [
        # What two sites have between them is one region, the soma of the second included.
        ([SOMA, A, A, (torch.add, ""), NORM, SOMA, B, NORM], [0, 1, 1, 2, 2, 2, 3, 4]),
        ([SOMA, A, B], [0, 1, 2]),
        # Activations go on with a site, and nothing after that.
        ([A, (torch.relu, "act"), (torch.tanh, ""), NORM, (torch.relu, "")], [0, 0, 0, 1, 1]),
        # Candidates are their site's.
        ([SOMA, A, (torch.exp, "a.dendrites.candidates"), B], [0, 1, 1, 2]),
        # A site that is called twice.
        ([SOMA, A, SOMA, A], [0, 1, 2, 3]),
    ],
)
def test_a_region_for_each_site(ops, regions):
    assert list(cut_at_sites(chain(*ops)).values()) == regions


def test_an_activation_is_no_part_of_an_op():
    graph = fx.Graph()
    x = graph.placeholder("x")
    op = graph.call_function(torch.ops.pbfx.dendrites.default, (x, x, x, x, x, x))
    out = marked(graph.call_function(operator.getitem, (marked(op, "a.dendrites"), 0)), "")
    relu = graph.call_function(torch.relu, (out,))
    graph.output(relu)
    assert cut_at_sites(graph) == {op.name: 0, out.name: 0, relu.name: 1}


def test_an_activation_of_what_others_read_too_is_no_part_of_a_site():
    graph = chain((torch.exp, "a.dendrites"), (torch.relu, ""))
    site, relu = (node for node in graph.nodes if node.op == "call_function")
    assert cut_at_sites(graph) == {site.name: 0, relu.name: 0}
    with graph.inserting_after(relu):
        graph.call_function(torch.add, (site, relu))
    assert list(cut_at_sites(graph).values()) == [0, 1, 1]


class Counted:
    """Stands for a compiler: keeps the regions that it compiles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.regions: list[fx.GraphModule] = []
        monkeypatch.setattr("pbfx.backend.settings._registered", lambda _: self)

    def __call__(self, gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.regions.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    def take(self) -> tuple[int, int]:
        """Return how many regions with dendrites or candidates there were, and how many others."""
        kinds = []
        for gm in self.regions:
            stacks = [node.meta.get("nn_module_stack") or {} for node in computed(gm.graph)]
            last = {list(stack.values())[-1][1] for stack in stacks if stack}
            kinds.append(bool(last & {Dendrites, Candidates}))
        self.regions.clear()
        return sum(kinds), len(kinds) - sum(kinds)


class Bottleneck(nn.Module):
    """Two alike sites whose dendrites join after a norm, all of it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.act(out)


def residual() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Dropout(0.3), nn.Flatten(), nn.Linear(36, 3))
    return nn.Sequential(stem, *(Bottleneck() for _ in range(3)), head)


@pytest.mark.parametrize("strategy", ["packed", "kernel", "fused"])
def test_a_growth_compiles_the_distinct_sites_and_nothing_else(monkeypatch, strategy):
    counted = Counted(monkeypatch)
    model = pbfx.grow(pbfx.transform(residual()), 2)
    randomise(model)
    call = compiled(model, regional="sites", strategy=strategy, **QUICK)
    x = torch.randn(2, 2, 6, 6)

    def new() -> tuple[int, int]:
        assert_alike(step(call, model, x), step(model, model, x))
        return counted.take()

    # The stem, those before a ReLU that a compiler fuses with them, those before an addition, the
    # head; an op is the same before both.
    sites = 3 if strategy == "kernel" else 4
    # The stem's soma, what leads to the first block's site, to a block's second, to the next block,
    # to the head. One kernel takes the stem's soma into its site.
    between = 4 if strategy == "fused" else 5
    assert new() == (sites, between)
    # None of them has to run to be known, though norms count their batches in place.
    assert all(known.outputs is not None for known in compiled_regions.values())
    pbfx.grow(model)
    assert new() == (sites, 0)
    pbfx.grow(model, 1, sites="3.conv2")
    assert new() == (1, 0)
    # It is now what that one is.
    pbfx.grow(model, 1, sites="2.conv2")
    assert new() == (0, 0)
    model.eval()
    new()
    pbfx.grow(model)
    torch.testing.assert_close(call(x), model(x))
    # The other sites' third became a fourth, and those two had one more.
    assert counted.take()[1] == 0


def test_phases_compile_no_more_than_sites(monkeypatch):
    counted = Counted(monkeypatch)
    model = pbfx.transform(residual(), pbfx.Config(priming_batches=1))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    policy = pbfx.Interval(neuron_epochs=1, dendrite_epochs=1)
    tracker = pbfx.Tracker(model, optimizer, policy=policy, max_dendrites=3)
    call = compiled(model, regional="sites", **QUICK)
    x, found = torch.randn(2, 2, 6, 6), []
    while not tracker.complete:
        assert_alike(step(call, model, x), step(model, model, x))
        found.append(counted.take())
        tracker.step(0.0)
    # What lies between is compiled once for each phase: it learns in one of them only.
    assert [others for _, others in found] == [1, 5, 5, *[0] * (len(found) - 3)]
    assert len(found) > 5
    assert all(sites for sites, _ in found[1:])


class Positions(nn.Module):
    """Adds what is made of nothing, and at last may keep what is positive."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(3, 4), nn.Embedding(5, 4)
        self.fc, self.keep = nn.Linear(4, 2), keep

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(x)) + self.place(torch.arange(5))
        hidden = hidden[hidden[:, 0] > 0] if self.keep else hidden
        return self.fc(hidden)


@pytest.mark.parametrize("regional", [True, "sites"])
@pytest.mark.parametrize("keep", [False, True])
def test_what_is_made_of_nothing_and_sizes_that_depend_on_values(regional, keep):
    model = pbfx.grow(pbfx.transform(Positions(keep)), 2)
    randomise(model)
    x = torch.linspace(-1, 1, 15).reshape(5, 3)
    call = compiled(model, regional=regional, **QUICK)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_alike(step(call, model, x), step(model, model, x))


class Scaled(nn.Module):
    """Learns nothing of its scale: gradients are off as it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.norm(x).abs()
        return torch.tanh(self.fc(x)) * scale


def test_gradients_that_are_switched_off():
    """What switches them off for the next block is the end of the one before it, which learns."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model, x = nn.Sequential(first, Scaled(), Scaled(), Scaled()), torch.randn(3, 4)
    call = compiled(model, regional=True, **QUICK)
    assert_alike(step(call, model, x), step(model, model, x))


@pytest.mark.parametrize("regional", [True, "sites"])
def test_autocast_within_the_graph(regional):
    torch.manual_seed(0)
    model = pbfx.grow(pbfx.transform(residual()), 2).eval()
    randomise(model)
    x = torch.randn(2, 2, 6, 6)

    def run(call: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(x)

    @torch.compile(backend=compile_graph, fullgraph=True, options={"regional": regional, **QUICK})
    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    exact = model(x)
    error = (run(model) - exact).norm()
    for out in (inside(x), run(compiled(model, regional=regional, **QUICK))):
        assert out.dtype is torch.bfloat16
        assert 0 < (out - exact).norm() <= 2 * error


def test_options_are_compared_by_value():
    def surroundings(**options: object) -> object:
        return _surroundings(settings_of(None, options))

    listed = {"aot_inductor.presets": {"a": [1]}}
    for options in ({}, {"max_autotune": True}, {"post_grad_custom_post_pass": print}, listed):
        assert surroundings(**options) == surroundings(**copy.deepcopy(options))
        assert hash(surroundings(**options))
    assert surroundings(post_grad_custom_post_pass=print) != surroundings()
    assert surroundings(max_autotune=True) != surroundings(max_autotune=False)


@needs_cxx
def test_sites_by_inductor():
    model, x = grown(CASES["convolutional"]), CASES["convolutional"].input()
    with torch._inductor.config.patch(fallback_random=True, compile_threads=1):
        call = compiled(model, regional="sites")
        assert_alike(step(call, model, x), step(model, model, x))
        before = set(compiled_regions)
        pbfx.grow(model)
        randomise(model)
        assert_alike(step(call, model, x), step(model, model, x))
        # Its three sites, and not what lies before, between and after them.
        assert len(before) == 7
        assert len(set(compiled_regions) - before) == 3


def test_work_in_place_stays_in_one_region():
    graph = fx.Graph()
    x = graph.placeholder("x")
    relu = graph.call_function(torch.relu, (x,))
    relu.meta["nn_module_stack"] = {"a": ("blocks.0.act", nn.ReLU)}
    other = graph.call_function(torch.tanh, (relu,))
    other.meta["nn_module_stack"] = {"a": ("blocks.1.act", nn.Tanh)}
    added = graph.call_method("add_", (relu, other))
    added.meta["nn_module_stack"] = {"a": ("blocks.2.act", nn.ReLU)}
    graph.output(added)
    assert set(cut_at_blocks(graph).values()) == {0}
    graph.erase_node(added) if not added.users else added.replace_all_uses_with(other)
    graph.erase_node(added)
    assert cut_at_blocks(graph) == {relu.name: 0, other.name: 1}


def chain(*ops: tuple[object, str]) -> fx.Graph:
    """A graph that applies functions one after the other, each in the module at a path."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for function, path in ops:
        value = graph.call_function(function, (value,))
        marked(value, path)
    graph.output(value)
    return graph


@pytest.mark.parametrize(
    ("ops", "regions"),
    [
        # What both have belongs to both; the mean is the head's.
        (
            [
                *[(torch.relu, "blocks.0.act"), (torch.exp, "")],
                *[(torch.relu, "blocks.1.act"), (torch.exp, ""), (torch.mean, "")],
                (torch.tanh, "head"),
            ],
            [0, 0, 1, 1, 2, 2],
        ),
        # Nothing follows.
        ([(torch.relu, "b.0.act"), (torch.relu, "b.1.act"), (torch.mean, "")], [0, 1, 2]),
        # The last one lacks what the first has: the mean is in the place of it.
        (
            [(torch.relu, "b.0.act"), (torch.exp, ""), (torch.relu, "b.1.act"), (torch.mean, "")],
            [0, 0, 1, 1],
        ),
        # Alone in its container, it may be that a block ends so.
        ([(torch.relu, "b.0.act"), (torch.mean, "")], [0, 0]),
        # Between two containers, and in the midst of a block.
        (
            [
                *[(torch.relu, "b.0.act"), (torch.exp, ""), (torch.relu, "b.0.act")],
                *[(torch.relu, "b.1.act"), (torch.exp, ""), (torch.relu, "c.0.act")],
            ],
            [0, 0, 0, 1, 1, 2],
        ),
    ],
)
def test_what_follows_the_last_block_is_no_part_of_it(ops, regions):
    assert list(cut_at_blocks(chain(*ops)).values()) == regions


class Workers:
    """Stands for Inductor's: notes when they are waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._inductor.async_compile import AsyncCompile

        self.waited: list[str] = []
        self.kind = AsyncCompile

        def wait(kernels: object, scope: dict[str, str]) -> None:
            self.waited.append(scope["name"])

        monkeypatch.setattr(AsyncCompile, "wait", wait)
        self.wait = wait

    def compile(self, name: str) -> None:
        self.kind().wait({"name": name})


def test_kernels_of_all_regions_are_waited_for_at_the_end(monkeypatch):
    workers = Workers(monkeypatch)
    with overlapping():
        workers.compile("stem")
        workers.compile("block")
        assert not workers.waited
        assert torch._functorch.config.force_non_lazy_backward_lowering
    assert workers.waited == ["stem", "block"]
    assert workers.kind.wait is workers.wait
    assert not torch._functorch.config.force_non_lazy_backward_lowering


def test_where_a_region_fails_those_before_it_get_their_kernels(monkeypatch):
    workers = Workers(monkeypatch)

    def fail() -> None:
        with overlapping():
            workers.compile("stem")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert workers.waited == ["stem"]
    assert workers.kind.wait is workers.wait


def test_a_region_whose_kernels_fail_is_forgotten(monkeypatch):
    from torch._inductor.codecache import PyCodeCache

    monkeypatch.setattr(PyCodeCache, "modules_no_attr", {})
    workers = Workers(monkeypatch)
    for name in ("stem", "block"):
        module = PyCodeCache.modules_no_attr[name] = types.ModuleType(name)
        vars(module).update(name=name)

    def fail() -> None:
        with overlapping():
            for module in list(PyCodeCache.modules_no_attr.values()):
                workers.kind().wait(vars(module))
            monkeypatch.setattr(workers, "waited", None)

    # Nothing can be noted any more.
    with pytest.raises(AttributeError, match="append"):
        fail()
    assert PyCodeCache.modules_no_attr == {}


def test_regions_are_compiled_anew_after_a_failure(monkeypatch):
    model, x = grown(CASES["residual"]), CASES["residual"].input()

    def crashes(*_: object) -> None:
        raise OSError("a worker has died")

    forget_regions()
    with monkeypatch.context() as patch:
        patch.setattr("pbfx.backend.overlap._finish", crashes)
        with pytest.raises(BackendCompilerFailed, match="a worker has died"):
            compiled(model, regional=True, **QUICK)(x)
    assert not compiled_regions
    torch._dynamo.reset()
    assert_alike(step(compiled(model, regional=True, **QUICK), model, x), step(model, model, x))


@needs_cxx
def test_regions_whose_kernels_workers_compile():
    """Kernels, forward and backward, are there when the compiled model is first called."""
    case = CASES["residual"]
    model, x = grown(case), case.input()
    with torch._inductor.config.patch(fallback_random=True, compile_threads=2):
        assert_alike(step(compiled(model, regional=True), model, x), step(model, model, x))
