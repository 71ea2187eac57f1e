"""What a compiled graph calls, and what it keeps, so that a step costs the host little."""

from __future__ import annotations

import copy
import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch._inductor.utils import run_and_get_code

import pbfx
from models import randomise
from pbfx.backend import bare, compile_graph
from pbfx.backend.bare import CallBare
from pbfx.backend.compiler import lower
from pbfx.backend.regions import compile_regions, forget_regions
from pbfx.backend.settings import settings_of
from pbfx_kernels import Geometry, candidates, conv_neuron_op

needs_cxx = pytest.mark.skipif(
    not shutil.which("c++") and not shutil.which("g++"), reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def grown(*layers: nn.Module, dendrites: int = 3) -> nn.Module:
    model = pbfx.grow(pbfx.transform(nn.Sequential(*layers)), dendrites)
    randomise(model)
    return model.train()


def convolutions() -> nn.Module:
    return grown(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


def called(code: list[str]) -> list[str]:
    return sorted(set(re.findall(r"torch\.ops\.pbfx\.([a-z0-9_.]*)", "\n".join(code))))


@needs_cxx
@pytest.mark.parametrize(
    ("strategy", "ops"),
    [
        ("kernel", ["dendrites.bare", "dendrites_backward.bare"]),
        (
            "fused",
            [
                "dendrites_backward.bare",
                "link_and_bias_gradients.bare",
                "perforated_conv2d.bare",
                "perforated_linear.bare",
            ],
        ),
    ],
)
def test_code_calls_ops_bare(strategy: str, ops: list[str]):
    model = convolutions()
    run = torch.compile(
        model, backend=compile_graph, fullgraph=True, options={"strategy": strategy}
    )
    x = torch.randn(2, 2, 6, 6)
    expected = model(x)

    def step() -> Tensor:
        out = run(x)
        out.square().sum().backward()
        return out

    out, code = run_and_get_code(step)
    assert called(code) == ops
    assert torch.allclose(out, expected, atol=1e-5)


@needs_cxx
def test_a_pass_of_the_users_runs_before():
    seen: list[str] = []
    options = {
        "strategy": "kernel",
        "post_grad_custom_post_pass": lambda graph: seen.extend(str(n.target) for n in graph.nodes),
    }
    run = torch.compile(grown(nn.Linear(4, 4)), backend=compile_graph, options=options)
    _, code = run_and_get_code(lambda: run(torch.randn(2, 4)).sum().backward())
    assert "pbfx.dendrites.default" in seen
    assert "dendrites.bare" in called(code)


def test_settings_that_are_alike_share_what_is_compiled():
    plain, other = settings_of(None, {}), settings_of(None, {})
    assert plain.inner == other.inner
    with_pass = settings_of(None, {"post_grad_custom_post_pass": print})
    assert with_pass.inner != plain.inner
    assert CallBare().uuid() == CallBare().uuid()
    assert CallBare().uuid() is not None
    assert CallBare(print).uuid() is None


def test_code_of_another_version_is_not_taken_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    before = CallBare().uuid()
    changed = tmp_path / "ops.py"
    changed.write_text("# another gradient\n", encoding="utf-8")
    monkeypatch.setattr(bare, "sources", lambda: (str(changed),))
    assert CallBare().uuid() != before


@pytest.mark.parametrize("regional", [False, "sites"])
def test_a_lowered_graph_knows_its_parameters(regional: Any):
    """Or CUDA graphs copy each of them at every step, and a backward keeps copies."""
    static: list[int] = []

    def record(gm: torch.fx.GraphModule, _: Any) -> Any:
        metadata = TracingContext.get().fw_metadata
        assert metadata is not None
        static.append(len(metadata.static_input_indices))
        return make_boxed_func(gm.forward)

    inner = aot_autograd(fw_compiler=record, bw_compiler=lambda gm, _: make_boxed_func(gm.forward))
    settings = settings_of(None, {"strategy": "packed"})
    settings = dataclasses.replace(settings, regional=regional, inner=inner)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        lowered = lower(gm, inputs, settings)
        assert lowered is not gm
        if regional:
            return compile_regions(lowered, inputs, settings)
        return inner(lowered, inputs)

    forget_regions()
    model = grown(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(2, 4)).sum().backward()
    # Two somas, the first one's dendrites with their activation, and the second one's.
    assert len(static) == (4 if regional else 1)
    # The input is none, and neither is what one region gives to the next.
    assert sum(static) == len(list(model.parameters()))
    forget_regions()


@pytest.mark.parametrize("strategy", ["packed", "looped"])
def test_a_backward_keeps_parameters_whole(strategy: str):
    """Each tensor that is kept costs the host time, and parts of links are many."""
    model = convolutions()
    settings = settings_of(None, {"strategy": strategy})
    partitioned = lookup_backend("aot_eager_decomp_partition")
    run = torch.compile(
        model, backend=lambda gm, xs: partitioned(lower(gm, xs, settings), xs), fullgraph=True
    )
    out: Any = run(torch.randn(2, 2, 6, 6))
    kept = out.grad_fn.saved_tensors
    sizes = {p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}
    parts = [t.shape for t in kept if t.numel() < sizes.get(t.untyped_storage().data_ptr(), 0)]
    assert kept
    assert not parts


def test_fused_convolutions_walk_nhwc(monkeypatch: pytest.MonkeyPatch):
    """The graph's own copies are fused with its neighbours; an op's copies are kernels."""
    seen: list[tuple[int, ...]] = []
    evaluate = conv_neuron_op._evaluated

    def noted(tensors: Any, *rest: Any) -> Any:
        seen.append(tensors[0].stride())
        return evaluate(tensors, *rest)

    monkeypatch.setattr(conv_neuron_op, "_evaluated", noted)
    model = grown(nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).bfloat16()
    options = {"strategy": "fused", "compiler": "aot_eager"}
    run = torch.compile(model, backend=compile_graph, fullgraph=True, options=options)
    x = torch.randn(2, 16, 9, 9, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        expected = model(x)
    out = run(x)
    assert out.stride() == expected.stride()
    assert torch.allclose(out, expected, atol=2e-2)
    out.float().square().sum().backward()
    found = [p.grad for p in (x, *model.parameters()) if p.grad is not None]
    model.zero_grad()
    x.grad = None
    model(x).float().square().sum().backward()
    wanted = [p.grad for p in (x, *model.parameters()) if p.grad is not None]
    assert len(found) == len(wanted) > 4
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).float().norm() <= 2e-2 * other.float().norm()
    assert seen == [(16 * 81, 1, 9 * 16, 16), (8 * 49, 1, 7 * 8, 8)]


def test_a_convolution_in_nhwc_stays_as_it_is():
    model = grown(nn.Conv2d(16, 8, 3)).to(torch.bfloat16, memory_format=torch.channels_last)
    options = {"strategy": "fused", "compiler": "aot_eager"}
    run = torch.compile(model, backend=compile_graph, fullgraph=True, options=options)
    x = torch.randn(2, 16, 9, 9, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert run(x).stride() == model(x).stride() == (8 * 49, 1, 7 * 8, 8)


def in_the_dendrite_phase(*layers: nn.Module) -> tuple[nn.Module, pbfx.Tracker]:
    model = grown(*layers, dendrites=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    policy = pbfx.Interval(neuron_epochs=1, dendrite_epochs=9)
    tracker = pbfx.Tracker(model, optimizer, policy=policy, max_dendrites=2)
    assert tracker.step(0.0).phase is pbfx.Phase.DENDRITE
    return model.train(), tracker


@needs_cxx
@pytest.mark.parametrize(
    ("layers", "handed_on"),
    [
        # What is returned is the neuron's output, a norm's input is saved, and so is a view of it.
        ((nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 4)), 2),
        ((nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), 1),
        ((nn.Linear(4, 4), nn.Flatten(0)), 1),
    ],
    ids=["linear", "norm", "view"],
)
def test_candidates_copy_nothing(layers: tuple[nn.Module, ...], handed_on: int):
    model, _tracker = in_the_dendrite_phase(*layers)
    x = torch.randn(2, 4, 4, 4)
    run = torch.compile(model, backend=compile_graph, fullgraph=True)
    out, code = run_and_get_code(lambda: run(x))
    assert "\n".join(code).count("pbfx.candidate_preactivations.bare(") == handed_on
    assert "pbfx.candidates.bare(" not in "\n".join(code)
    out.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("candidates" in name for name in found)
    expected, _ = in_the_dendrite_phase(*copy.deepcopy(layers))
    expected.load_state_dict(model.state_dict())
    wanted = expected(x)
    assert torch.allclose(out, wanted, atol=1e-5)
    wanted.square().sum().backward()
    for name, parameter in expected.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(found[name], parameter.grad, atol=1e-5), name


@needs_cxx
def test_a_neuron_that_is_returned_as_well_is_copied():
    def both(x: Tensor, view: bool) -> tuple[Tensor, Tensor]:
        neuron = x @ torch.eye(4)
        out, _ = candidates(neuron, x, torch.empty(0, 2, 4), *pool, "tanh", Geometry())
        return out, neuron.t() if view else neuron

    weight, links = torch.randn(3, 4, 4), torch.randn(3, 0, 4)
    moments, direction = torch.zeros(18, 4), torch.ones(3, 4)
    learning = (t.requires_grad_() for t in (weight, links, moments))
    weight, links, moments = learning
    pool = weight, None, links, moments, direction, torch.zeros(4)
    run = torch.compile(both, backend=compile_graph, fullgraph=True)
    for view in (False, True):
        x = torch.randn(2, 4, requires_grad=True)
        (out, neuron), code = run_and_get_code(lambda x=x, view=view: run(x, view))
        assert "pbfx.candidates.bare(" in "\n".join(code)
        assert out.data_ptr() != neuron.data_ptr()
        assert torch.allclose(out, neuron.t() if view else neuron)
