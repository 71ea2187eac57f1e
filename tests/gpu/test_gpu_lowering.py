"""Lowered models on a GPU, in eager mode and compiled, against the transformed one in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pbfx
from models import CASES, TOLERANCES, outputs, randomise, run
from zoo.registry import ZOO

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
# The tokens' norms and softmaxes amplify what 16 bits round; they are compared in float32.
NAMES = ("perceptron", "convolutional", "functional", "shared")


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    # cuDNN's default for float32 convolutions is TF32, which the float32 tolerance excludes.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def grown(name: str) -> nn.Module:
    model = pbfx.transform(CASES[name].build())
    with torch.no_grad():
        run(model, CASES[name].input(2))
    randomise(pbfx.grow(model, 3))
    return model.eval()


def error(found, expected) -> float:
    found, expected = (
        torch.cat([t.double().cpu().flatten() for t in x]) for x in (found, expected)
    )
    return ((found - expected).norm() / expected.norm()).item()


@DTYPES
@pytest.mark.parametrize("name", NAMES)
def test_eager(name: str, dtype: torch.dtype):
    model, x = grown(name), CASES[name].input()
    model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad():
        expected = outputs(copy.deepcopy(model).double()(x.double()))
        eager = error(outputs(copy.deepcopy(model).cuda()(x.cuda())), expected)
        lowered = pbfx.lower(copy.deepcopy(model).cuda())
        found = error(outputs(lowered(x.cuda())), expected)
        moved = error(outputs(pbfx.lower(model).cuda()(x.cuda())), expected)
    # Folding rounds a weight where the norm rounds its output, once each.
    assert max(found, moved) <= max(TOLERANCES[dtype], 2 * eager)


def test_the_epilogue_is_one_kernel():
    lowered = pbfx.lower(grown("perceptron").cuda())
    x = CASES["perceptron"].input().cuda()
    with torch.no_grad():
        lowered(x)
        with torch.profiler.profile(acc_events=True) as profile:
            lowered(x)
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert sum("_dendrites_epilogue_kernel" in name for name in names) == 2
    assert not any("tanh" in name for name in names)


LOW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
fused = pytest.mark.skipif(not _HOPPER, reason="the fused kernel runs on Hopper")


def linear(dtype: torch.dtype, dendrites: int) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Return a grown model of linear layers, its twin in float64, and an input."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU()), nn.Linear(96, 130), nn.Linear(130, 10)
    )
    model, x = pbfx.transform(net), torch.randn(33, 64)
    with torch.no_grad():
        model(x)
    randomise(pbfx.grow(model, dendrites), scale=0.2)
    model = model.to(dtype).eval()
    return copy.deepcopy(model).cuda(), copy.deepcopy(model).double(), x.to(dtype)


def launched(call: nn.Module, x: torch.Tensor) -> list[str]:
    call(x)
    with torch.profiler.profile(acc_events=True) as profile:
        call(x)
    return [event.name for event in profile.events() if event.device_type.name == "CUDA"]


@fused
@LOW
@pytest.mark.parametrize("dendrites", [1, 2, 3])
def test_linear_neurons_are_one_kernel(dendrites: int, dtype: torch.dtype):
    model, wide, x = linear(dtype, dendrites)
    with torch.no_grad():
        expected = [wide(x.double())]
        eager = error([model(x.cuda())], expected)
        lowered = pbfx.lower(model)
        # Rows of 130 elements do not start at multiples of 16 bytes.
        kinds = [type(m).__name__ for m in lowered.modules() if hasattr(m, "to_soma")]
        assert kinds == ["FusedNeurons", "FusedNeurons", "Neurons"]
        limit = max(TOLERANCES[dtype], 2 * eager)
        assert error([lowered(x.cuda())], expected) <= limit
        names = launched(lowered, x.cuda())
        assert sum("_neuron_kernel" in name for name in names) == 2
        assert sum("_dendrites_epilogue_kernel" in name for name in names) == 1
        compiled = torch.compile(lowered, fullgraph=True)
        assert error([compiled(x.cuda())], expected) <= limit
        program = torch.export.export(lowered, (x.cuda(),))
        assert not any("pbfx" in str(node.target) for node in program.graph.nodes)
        assert error([program.module()(x.cuda())], expected) <= limit
        portable = pbfx.lower(model, portable=True)
        assert not any("_neuron_kernel" in name for name in launched(portable, x.cuda()))
        # Elsewhere it is plain torch over the same weights.
        assert error([lowered.float().cpu()(x.float())], expected) <= limit


@fused
def test_a_compiled_model_launches_it_too():
    model, _, x = linear(torch.bfloat16, 3)
    with torch.no_grad():
        names = launched(torch.compile(pbfx.lower(model), fullgraph=True), x.cuda())
    assert sum("_neuron_kernel" in name for name in names) == 2


@pytest.mark.parametrize("name", ["convolutional", "attention"])
def test_compiled(name: str):
    model, x = grown(name), CASES[name].input()
    with torch.no_grad():
        expected = outputs(copy.deepcopy(model).double()(x.double()))
        lowered = torch.compile(pbfx.lower(model.cuda()), fullgraph=name != "attention")
        assert error(outputs(lowered(x.cuda())), expected) <= TOLERANCES[torch.float32]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["perceptron", "convolutional"])
def test_a_tracer_that_cannot_look_into_a_launch_sees_plain_torch(name: str):
    lowered, case = pbfx.lower(grown(name).cuda()), CASES[name]
    with torch.no_grad():
        traced = torch.jit.trace(lowered, (case.input(0).cuda(),), check_trace=False)
        x = case.input(1).cuda()
        assert error(outputs(traced(x)), outputs(lowered(x))) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("name", ["resnet", "unet", "mobilenet", "vit"])
def test_the_zoo(name: str):
    model = pbfx.transform(ZOO[name].fresh())
    (x, *_), _ = ZOO[name].arguments(training=True)
    with torch.no_grad():
        model.train()(x)
        randomise(pbfx.grow(model, 3), scale=0.1)
        expected = [copy.deepcopy(model.eval()).double()(x.double())]
        lowered = pbfx.lower(model.cuda())
        assert error([lowered(x.cuda())], expected) <= TOLERANCES[torch.float32]
        half = lowered.to(torch.bfloat16)
        assert half(x.cuda().bfloat16()).isfinite().all()
