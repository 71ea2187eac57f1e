"""Linear neurons whose weights lie side by side for good, against the float64 oracle."""

import pytest
import torch
from kernel_cases import BY_NAME, Site, make_neurons
from tolerances import assert_close
from torch import Tensor, nn

from pbfx_kernels import frozen
from pbfx_kernels.frozen import frozen_neurons, lay, take_apart
from pbfx_kernels.geometry import LINEAR
from pbfx_kernels.problem import Problem
from pbfx_kernels.strategy import fuses_frozen

SITES = pytest.mark.parametrize(
    "name", ["linear", "linear-1", "linear-63-127", "linear-sequence", "linear-unbatched"]
)


def laid(site: Site, d: int, bias: bool, dtype: torch.dtype) -> tuple[list[Tensor | None], Tensor]:
    """Return the arguments of `frozen_neurons`, and what it should give."""
    case = make_neurons(site, d, bias, dtype)
    x, packed, *links = case.together
    return [x, lay(packed.unflatten(0, (1 + d, -1))), *links], case.expected


@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("neurons", [1, 4, 7, 63])
def test_rows_take_turns(neurons: int, d: int) -> None:
    stacked = torch.randn(1 + d, neurons, 3)
    rows = lay(stacked)
    roles = {1: 2, 2: 4, 3: 4, 5: 8}[d]
    assert rows.shape == (roles * (neurons + 3 & ~3), 3)
    assert rows.is_contiguous()
    for found, given in zip(take_apart(rows, -2, 1 + d, neurons), stacked, strict=True):
        assert torch.equal(found, given)
    assert rows.count_nonzero() == stacked.numel()
    # The soma and the first dendrite are neighbours.
    assert torch.equal(rows[0], stacked[0, 0])
    assert torch.equal(rows[1], stacked[1, 0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d", [1, 3])
@SITES
def test_matches_the_oracle(name: str, d: int, bias: bool) -> None:
    given, expected = laid(BY_NAME[name], d, bias, torch.float64)
    assert_close(frozen_neurons(*given, "tanh"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    given, expected = laid(BY_NAME["linear-63-127"], 3, True, dtype)
    out = frozen_neurons(*given, "tanh")
    assert out.dtype == dtype
    assert_close(out, expected)


@pytest.mark.parametrize("name", ["linear", "linear-sequence", "linear-empty"])
def test_op(name: str) -> None:
    given, expected = laid(BY_NAME[name], 2, True, torch.float64)
    op = torch.ops.pbfx.frozen_neurons.default
    assert_close(op(*given, "tanh"), expected)
    torch.library.opcheck(op, (*given, "tanh"))


def test_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    import pbfx_kernels.flops  # noqa: F401  registers the formulas

    given, _ = laid(BY_NAME["linear-sequence"], 2, True, torch.float32)
    with FlopCounterMode(display=False) as counter:
        torch.ops.pbfx.frozen_neurons.default(*given, "tanh")
    # Positions, neurons, inputs; a soma and two dendrites.
    assert counter.get_total_flops() == 2 * (2 * 7) * 3 * 5 * 3


class Module(nn.Module):
    def __init__(self, site: Site) -> None:
        super().__init__()
        (self.x, *frozen), _ = laid(site, 2, True, torch.float32)
        self.weights, self.bias, self.to_soma, self.to_dendrite = (
            nn.Parameter(tensor, requires_grad=False) for tensor in frozen
        )

    def forward(self, x: Tensor) -> Tensor:
        links = self.bias, self.to_soma, self.to_dendrite
        return frozen_neurons(x, self.weights, *links, "gelu")


@pytest.mark.parametrize("strict", [False, True])
def test_exports_to_aten_alone(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Module(BY_NAME["linear-sequence"])
    # As if the tensors were on a GPU that has the kernel.
    monkeypatch.setattr(frozen, "_on_gpu", lambda x: True)
    program = torch.export.export(model, (model.x,), strict=strict)
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert all(getattr(op, "namespace", "aten") == "aten" for op in called), called
    torch.testing.assert_close(program.module()(model.x), model(model.x))


def test_gradients_are_those_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "_on_gpu", lambda x: True)
    given, _ = laid(BY_NAME["linear"], 2, True, torch.float64)
    x, *rest = given
    assert torch.autograd.gradcheck(lambda x: frozen_neurons(x, *rest, "tanh"), x.requires_grad_())
    traced = torch.func.vmap(lambda x: frozen_neurons(x, *rest, "tanh"))(x.detach())
    torch.testing.assert_close(traced, frozen_neurons(x, *rest, "tanh"))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*:DeprecationWarning")
def test_a_tracer_that_cannot_look_into_a_launch_sees_plain_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frozen, "_on_gpu", lambda x: True)
    model = Module(BY_NAME["linear-sequence"])
    with torch.no_grad():
        traced = torch.jit.trace(model, (model.x,))
    assert "aten::linear" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(2 * model.x), model(2 * model.x))


def problem(**changes: object) -> Problem:
    given = {
        "device": "cuda",
        "capability": (9, 0),
        "dtype": torch.bfloat16,
        "tf32": False,
        "geometry": LINEAR,
        "positions": 1,
        "neurons": 10,
        "channels": 128,
        "taps": 1,
        "dendrites": 3,
    }
    return Problem(**(given | changes))


def test_where_it_is_chosen() -> None:
    assert fuses_frozen(problem())
    assert fuses_frozen(problem(positions=65536, neurons=4096))
    for change in (
        {"device": "cpu"},
        {"capability": None},
        {"dtype": torch.float64},
        {"channels": 127},
        {"channels": 1032},
        {"channels": 520, "dendrites": 2},
        {"channels": 776, "dendrites": 1},
        {"dendrites": 0},
    ):
        assert not fuses_frozen(problem(**change)), change
