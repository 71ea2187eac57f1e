"""`torch.compile(model, backend="pbfx")`: options, forms, faces, dynamic sizes, failures."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from training_steps import QUICK, assert_alike, compiled, each_case, grown, step

import pbfx
from models import CASES, randomise, run
from pbfx.backend import compile_graph, compiler
from pbfx.backend.settings import settings_of
from pbfx.errors import ConfigError, PassError
from pbfx.passes.lower_dendrites import LoweringContext, lower_dendrites

ROOT = Path(__file__).resolve().parents[2]
needs_cxx = pytest.mark.skipif(
    not shutil.which("c++") and not shutil.which("g++"), reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_torch_finds_it_by_its_entry_point(tmp_path):
    """A program that never imports pbfx: torch loads the backend itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"]["torch_dynamo_backends"]
    assert points == {"pbfx": "pbfx.backend:compile_graph"}
    # As an installer writes it: the checkout may have been installed before there was one.
    info = tmp_path / "points-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: points\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[torch_dynamo_backends]\n" + "\n".join(f"{k} = {v}" for k, v in points.items())
    )
    program = (
        "import sys, torch\n"
        "f = torch.compile(torch.nn.Linear(2, 3), backend='pbfx', fullgraph=True,"
        " options={'compiler': 'eager'})\n"
        "assert f(torch.ones(1, 2)).shape == (1, 3)\n"
        "assert 'pbfx.backend' in sys.modules\n"
    )
    path = ":".join([str(tmp_path), *(entry for entry in sys.path if entry)])
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr


@each_case
@pytest.mark.parametrize("strategy", ["auto", "fused", "kernel", "packed", "looped"])
def test_training_is_as_in_eager(case, strategy):
    model, x = grown(case), case.input()
    assert_alike(step(compiled(model, strategy=strategy, **QUICK), model, x), step(model, model, x))


@each_case
def test_growth_leaves_the_output_alone(case):
    """Links of zero: the lowered graph gives the soma's bits, signed zeros included."""
    model = pbfx.transform(case.build()).eval()
    wanted = run(model, case.input())
    pbfx.grow(model, 2)
    for strategy in ("packed", "looped"):
        found = run(compiled(model, strategy=strategy, compiler="eager"), case.input())
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one.signbit(), other.signbit())


@pytest.mark.parametrize("strategy", ["auto", "packed"])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_convolutions_with_groups_and_transposed(spatial, strategy):
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]
    plain = nn.Sequential(
        conv(4, 6, 3, padding=1, groups=2), nn.ReLU(), transposed(6, 4, 3, stride=2, groups=2)
    )
    model = pbfx.grow(pbfx.transform(plain), 3)
    randomise(model)
    x = torch.randn(2, 4, *(5,) * spatial)
    assert_alike(step(compiled(model, strategy=strategy, **QUICK), model, x), step(model, model, x))
    # Without a batch.
    assert_alike(step(compiled(model, **QUICK), model, x[0]), step(model, model, x[0]))


def test_a_depthwise_soma_is_computed_with_its_dendrites():
    model = pbfx.grow(pbfx.transform(nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1, groups=4))), 3)
    randomise(model)
    x = torch.randn(2, 4, 5, 6)
    gm = graph_of(model, x)
    assert lower_dendrites(gm, LoweringContext("fused")) == 1
    targets = [node.target for node in gm.graph.nodes]
    assert torch.ops.pbfx.perforated_depthwise.default in targets
    assert F.conv2d not in targets
    assert_alike(step(compiled(model, strategy="fused", **QUICK), model, x), step(model, model, x))


def test_the_dendrite_phase():
    case = CASES["convolutional"]
    model = pbfx.transform(case.build())
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    policy = pbfx.Interval(neuron_epochs=1, dendrite_epochs=10)
    tracker = pbfx.Tracker(model, optimizer, policy=policy)
    pbfx_model = compiled(model, **QUICK)
    for phase in (pbfx.Phase.NEURON, pbfx.Phase.DENDRITE):
        assert_alike(step(pbfx_model, model, case.input()), step(model, model, case.input()))
        assert tracker.phase is phase
        if phase is pbfx.Phase.NEURON:
            tracker.step(0.0)


def test_a_model_without_dendrites_is_left_to_the_compiler():
    seen = []

    def inner(gm: fx.GraphModule, inputs: list[Tensor]):
        seen.append(gm)
        return gm.forward

    settings = settings_of(None, {"compiler": "eager"})
    gm = fx.symbolic_trace(nn.Linear(2, 3))
    assert compiler.lower(gm, [torch.ones(1, 2)], settings) is gm


def test_autocast_casts_products_once():
    case = CASES["normed"]
    model, x = grown(case), case.input()

    def call(module: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    @torch.compile(backend=compile_graph, fullgraph=True, options=QUICK)
    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    exact = copy.deepcopy(model.eval()).double()(x.double())
    eager = call(model)
    # The graph adds the bias after the product, in float32: other roundings, and no more of them.
    for out in (call(compiled(model, **QUICK)), inside(x)):
        assert out.dtype is eager.dtype
        assert (out - exact).norm() <= 2 * (eager - exact).norm()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precision_rounds_the_dendrites_and_not_the_soma(precision):
    case = CASES["perceptron"]
    model, x = grown(case).eval(), case.input()
    wanted, plain = model(x), pbfx.transform(case.build()).eval()(x)
    found = compiled(model, precision=precision, **QUICK)(x)
    error = (found - wanted).norm() / wanted.norm()
    assert 0 < error < 1e-2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("to_soma"):
                parameter.zero_()
    assert torch.equal(compiled(model, precision=precision, compiler="eager")(x), plain)


@pytest.mark.parametrize("regional", [False, True, "sites"])
def test_dynamic_batch_sizes(regional):
    case = CASES["convolutional"]
    model = grown(case).eval()
    options = {"regional": regional, **QUICK}
    call = torch.compile(
        model, backend=compile_graph, fullgraph=True, dynamic=True, options=options
    )
    for batch in (4, 3, 7, 2):
        x = torch.randn(batch, 2, 6, 5)
        torch.testing.assert_close(call(x), model(x))
    code = type(model).forward.__code__
    assert len(torch._dynamo.eval_frame._debug_get_cache_entry_list(code)) == 1


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        (None, {"strategy": "pakced"}, "strategy is unknown, got 'pakced': did you mean 'packed'"),
        (None, {"precision": "fp8"}, "precision is unknown, got 'fp8'"),
        (None, {"strategy": "kernel", "precision": "bfloat16"}, "goes with strategy 'packed'"),
        (None, {"compiler": "gcc"}, "compiler is unknown, got 'gcc'"),
        (None, {"regional": 1}, "regional must be True, False or 'sites', got 1"),
        ("fastest", None, "mode is unknown, got 'fastest'"),
        (None, {"max_autotun": True}, "neither ours nor Inductor's: did you mean 'max_autotune'"),
        (None, {"max_autotune": "yes"}, "Inductor refuses an option"),
        (None, {"compiler": "eager", "max_autotune": True}, "is for compiler 'inductor'"),
        ("max-autotune", {"compiler": "eager"}, "mode 'max-autotune' is for compiler 'inductor'"),
        ("reduce-overhead", {"regional": True}, "regional cannot be combined with CUDA graphs"),
        (None, [1], "options must be a dict, got [1]"),
    ],
)
def test_options_are_checked(mode, options, words):
    with pytest.raises(ConfigError) as error:
        settings_of(mode, options)
    assert words in str(error.value)


def test_all_faults_are_named_at_once_and_reach_the_user():
    model = pbfx.transform(CASES["perceptron"].build())
    call = torch.compile(model, backend=compile_graph, options={"strategy": 1, "precision": 2})
    with pytest.raises(BackendCompilerFailed, match=r"strategy is unknown.*precision is unknown"):
        call(CASES["perceptron"].input())


def test_mode_and_options_reach_inductor():
    settings = settings_of("max-autotune-no-cudagraphs", {"epilogue_fusion": False})
    assert settings.inner.config["max_autotune"] is True
    assert settings.inner.config["epilogue_fusion"] is False
    settings = settings_of(None, {"mode": "reduce-overhead", "strategy": "packed"})
    assert settings.inner.config["triton.cudagraphs"] is True


def graph_of(model: nn.Module, x: Tensor) -> fx.GraphModule:
    found = []

    def keep(gm: fx.GraphModule, inputs: list[Tensor]):
        found.append(gm)
        return gm.forward

    torch.compile(model, backend=keep, fullgraph=True)(x)
    return found[0]


def ops(gm: fx.GraphModule) -> int:
    op = torch.ops.pbfx.dendrites.default
    return sum(node.target is op for node in gm.graph.nodes)


def test_what_the_pass_does_not_know_stays_and_is_recorded():
    case = CASES["perceptron"]
    model, x = grown(case).eval(), case.input()
    gm = graph_of(model, x)
    assert ops(gm) == 2
    first = next(n for n in gm.graph.nodes if n.target is torch.ops.pbfx.dendrites.default)
    values = first.args[0].meta.pop("example_value")
    context = LoweringContext("packed")
    assert lower_dendrites(gm, context) == 1
    assert lower_dendrites(gm, context) == 0
    assert ops(gm) == 1
    assert context.records[first.name].form == "kernel"
    assert "does not say which shapes" in context.records[first.name].reason
    assert context.records[first.name].site == "0"
    first.args[0].meta["example_value"] = values
    assert lower_dendrites(gm, LoweringContext("kernel")) == 0
    assert lower_dendrites(gm, LoweringContext("looped")) == 1
    gm.graph.lint()


def test_what_is_absorbed_is_recorded():
    case = CASES["convolutional"]
    context = LoweringContext()
    lower_dendrites(graph_of(grown(case).eval(), case.input()), context)
    reasons = {record.site: record.reason for record in context.records.values()}
    assert reasons["conv1"] == "fused with relu"
    assert reasons["fc"] == "fused with mul"
    assert all(record.form == "packed" for record in context.records.values())


def test_a_crash_in_a_pass_leaves_the_graph_as_it_was(monkeypatch):
    case = CASES["perceptron"]
    model, x = grown(case).eval(), case.input()

    def crashes(gm: fx.GraphModule, ctx: LoweringContext) -> int:
        lower_dendrites(gm, LoweringContext("packed"))
        raise KeyError("a bug")

    gm = graph_of(model, x)
    before = str(gm.graph)
    monkeypatch.setattr(compiler, "LOWERING", (crashes,))
    with pytest.raises(PassError, match="pass crashes failed"):
        compile_graph(gm, [], options=QUICK)
    assert str(gm.graph) == before
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="pass crashes failed"):
        compiled(model, **QUICK)(x)
    assert torch.equal(model(x), grown(case).eval()(x))


@needs_cxx
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("perceptron", {}),
        ("convolutional", {"strategy": "looped"}),
        ("residual", {"regional": True}),
    ],
)
def test_inductor(name, options):
    case = CASES[name]
    model, x = grown(case), case.input()
    # Its dropout draws other numbers than eager's unless told not to.
    with torch._inductor.config.patch(fallback_random=True, compile_threads=1):
        assert_alike(step(compiled(model, **options), model, x), step(model, model, x))


@needs_cxx
def test_plain_inductor_takes_it_too():
    case = CASES["perceptron"]
    model, x = grown(case).eval(), case.input()
    with torch._inductor.config.patch(compile_threads=1):
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
