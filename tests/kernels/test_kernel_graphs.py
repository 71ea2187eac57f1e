"""The ops in graphs: opcheck, symbolic_trace, torch.compile, export."""

from typing import Any

import pytest
import torch
from kernel_cases import BY_NAME, Site, Tensors, make_candidates, make_dendrites
from tolerances import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from pbfx_kernels import Geometry, candidates, dendrites, perforated_conv2d

OPS = torch.ops.pbfx
FORMS = [
    BY_NAME[name]
    for name in (
        "linear",
        "linear-unbatched",
        "conv1d",
        "conv2d-form",
        "conv2d-unbatched",
        "transposed2d-form",
    )
]
forms = pytest.mark.parametrize("site", FORMS, ids=lambda site: site.name)


@pytest.mark.parametrize("d", [0, 1, 3])
@forms
def test_opcheck_dendrites(site: Site, d: int) -> None:
    args = make_dendrites(site, d, bias=d != 1).args(torch.float32)
    torch.library.opcheck(OPS.dendrites.default, (*args.values(), "silu", *site.op_geometry))
    soma = args["soma"].detach()
    activations = torch.randn(d, *soma.shape)
    torch.library.opcheck(
        OPS.dendrites_backward.default, (soma, activations, site.geometry.channel_axis)
    )


@pytest.mark.parametrize(("c", "d"), [(1, 0), (3, 2)])
@forms
def test_opcheck_candidates(site: Site, c: int, d: int) -> None:
    case = make_candidates(site, c, d, bias=d != 0, regression=d != 0)
    args = case.args(torch.float32)
    args.setdefault("regression", None)
    torch.library.opcheck(OPS.candidates.default, (*args.values(), "gelu", *site.op_geometry))
    plain: Tensors = {name: None if t is None else t.detach() for name, t in args.items()}
    z = torch.randn(c, *plain["neuron"].shape)
    names = ("x", "activations", "direction", "error_mean", "regression")
    torch.library.opcheck(
        OPS.candidates_backward.default,
        (
            case.grad.float(),
            z,
            *(plain[name] for name in names),
            plain["weight"].shape,
            "gelu",
            *site.op_geometry,
            torch.float32,
        ),
    )


def test_opcheck_channels_last() -> None:
    site = BY_NAME["conv2d"]
    args = make_dendrites(site, 2).args(torch.float32)
    args["soma"] = args["soma"].detach().to(memory_format=torch.channels_last)
    torch.library.opcheck(OPS.dendrites.default, (*args.values(), "tanh", *site.op_geometry))


class Neuron(nn.Module):
    """A convolution with two dendrites and three candidates."""

    def __init__(self) -> None:
        super().__init__()
        self.soma = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        n, d, c = 6, 2, 3
        self.weight = nn.Parameter(torch.randn(d, n, 2, 3, 3) / 4)
        self.to_soma = nn.Parameter(torch.randn(d, n))
        self.to_dendrite = nn.Parameter(torch.randn(d, d, n))
        self.candidate_weight = nn.Parameter(torch.randn(c, n, 2, 3, 3) / 4)
        self.candidate_bias = nn.Parameter(torch.randn(c, n))
        self.candidate_to_dendrite = nn.Parameter(torch.randn(c, d, n))
        self.moments = nn.Parameter(torch.zeros(6 * c, n))
        self.register_buffer("direction", torch.randn(c, n))
        self.register_buffer("error_mean", torch.randn(n))
        self.geometry = Geometry.convolution(2, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        soma = self.soma(x)
        neuron, a = dendrites(
            soma, x, self.weight, None, self.to_soma, self.to_dendrite, "tanh", self.geometry
        )
        out, _ = candidates(
            neuron,
            x,
            a,
            self.candidate_weight,
            self.candidate_bias,
            self.candidate_to_dendrite,
            self.moments,
            self.get_buffer("direction"),
            self.get_buffer("error_mean"),
            "tanh",
            self.geometry,
        )
        return torch.relu(out)


def _run(module: Any, parameters: dict[str, nn.Parameter], x: Tensor) -> dict[str, Tensor]:
    for parameter in parameters.values():
        parameter.grad = None
    out = module(x)
    out.square().mean().backward()
    grads = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    return {"out": out.detach(), **grads}


def test_symbolic_trace_keeps_one_node_each() -> None:
    module = Neuron()
    traced = torch.fx.symbolic_trace(module)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets.count(OPS.dendrites.default) == 1
    assert targets.count(OPS.candidates.default) == 1
    traced.graph.lint()
    x = torch.randn(2, 4, 5, 5)
    parameters = dict(module.named_parameters())
    expected, got = _run(module, parameters, x), _run(traced, parameters, x)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("frozen", [False, True], ids=["open", "frozen"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str, frozen: bool) -> None:
    torch._dynamo.reset()
    module = Neuron()
    if frozen:
        # The dendrite phase: only candidates learn, and they keep the backward alive.
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith("candidate") or name == "moments")
    parameters = dict(module.named_parameters())
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for batch in (3, 4, 5, 7):
        x = torch.randn(batch, 4, 5, 5)
        expected, got = _run(module, parameters, x), _run(compiled, parameters, x)
        assert expected.keys() == got.keys()
        assert "moments" in got
        assert ("to_soma" in got) is not frozen
        for name in expected:
            assert_close(got[name], expected[name])
    # One for the first batch size, one when Dynamo makes it a symbol.
    assert counter.frame_count <= 2


def test_compile_survives_growth_without_a_graph_per_count() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dendrites, backend=counter, fullgraph=True)
    for d in (2, 3, 4, 5):
        args = make_dendrites(BY_NAME["linear"], d).args(torch.float32)
        out = compiled(**args)[0]
        assert_close(out, dendrites(**args)[0])
    # One for the first count, one when Dynamo makes D a symbol.
    assert counter.frame_count <= 2


def test_compile_builds_geometry_inside() -> None:
    torch._dynamo.reset()
    args = make_dendrites(BY_NAME["conv2d-depthwise"], 2).args(torch.float32)
    links = (args["weight"], args["bias"], args["to_soma"], args["to_dendrite"])

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return perforated_conv2d(x, weight, None, *links, "gelu", padding=1, groups=4)

    x, weight = torch.randn(2, 4, 7, 7), torch.randn(4, 1, 3, 3)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, weight), run(x, weight))


def test_compile_under_autocast() -> None:
    torch._dynamo.reset()
    module, x = Neuron(), torch.randn(2, 4, 5, 5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(x), module(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert_close(out, expected.double())
    out.float().sum().backward()
    assert module.candidate_weight.grad is not None


def test_export() -> None:
    module, x = Neuron(), torch.randn(2, 4, 5, 5)
    program = torch.export.export(module, (x,))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert OPS.dendrites.default in targets
    assert torch.equal(program.module()(x), module(x))
