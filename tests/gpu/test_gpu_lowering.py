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


@pytest.mark.parametrize("name", ["convolutional", "attention"])
def test_compiled(name: str):
    model, x = grown(name), CASES[name].input()
    with torch.no_grad():
        expected = outputs(copy.deepcopy(model).double()(x.double()))
        lowered = torch.compile(pbfx.lower(model.cuda()), fullgraph=name != "attention")
        assert error(outputs(lowered(x.cuda())), expected) <= TOLERANCES[torch.float32]


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
