"""The candidates' kernels against the float64 reference, on a GPU or in Triton's interpreter.

`test_candidate_kernels.py` runs this file in a process of its own: Triton reads TRITON_INTERPRET
once, and inductor's tests must not find it set.
"""

from __future__ import annotations

import os

import pytest
import torch
from kernel_cases import BY_NAME, Candidates, Site, Tensors, make_candidates, sites
from tolerances import assert_close
from torch import Tensor

from pbfx_kernels import ACTIVATIONS, candidate_autograd, reference
from pbfx_kernels.booking import Memory, Rules
from pbfx_kernels.candidate_moments import candidate_moments
from pbfx_kernels.moments import parted
from pbfx_kernels.turns import take_turn
from pbfx_kernels.turns_kernel import line_of, table_of, take_turns_fused

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
F32 = torch.float32
# exp(2 z) of a large z is infinite, which numpy reports, and leads to a tanh of 1.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels run on the CPU too, and convolve in full precision on a GPU."""
    monkeypatch.setattr(candidate_autograd, "fused", lambda tensor: tensor.dtype in DTYPES)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def tensors_of(case: Candidates, dtype: torch.dtype) -> Tensors:
    return {
        name: None if tensor is None else tensor.detach().to(DEVICE)
        for name, tensor in case.args(dtype).items()
    }


def doubled(tensors: Tensors) -> Tensors:
    return {name: None if t is None else t.double().cpu() for name, t in tensors.items()}


def check_backward(
    site: Site, tensors: Tensors, grad: Tensor, z: Tensor, activation: str = "tanh"
) -> None:
    """Compare all four results for one z with the float64 reference of the same z."""
    names = ("x", "activations", "direction", "error_mean", "regression")
    shape, geometry = tensors["weight"].shape, site.geometry
    found = candidate_autograd.differentiate(
        grad, z, *(tensors.get(n) for n in names), shape, activation, geometry
    )
    wide = doubled(tensors)
    expected = reference.candidates_backward(
        grad.double().cpu(),
        z.double().cpu(),
        *(wide.get(n) for n in names),
        shape,
        activation,
        geometry,
    )
    weight, sums = (result.cpu() for result in found)
    small = parted(sums, len(weight))
    assert_close(weight, expected[0], z.dtype)
    for result, wanted in zip(small, expected[1:], strict=True):
        assert result.dtype == F32
        # Sums, whatever the dtype of what they are made from.
        assert_close(result, wanted, F32)


@dtypes
@pytest.mark.parametrize(
    ("c", "d", "bias", "regression"),
    [(1, 0, True, False), (3, 2, True, True), (2, 1, False, False)],
)
@sites
def test_site(site: Site, c: int, d: int, bias: bool, regression: bool, dtype: torch.dtype) -> None:
    case = make_candidates(site, c, d, bias=bias, regression=regression)
    tensors = tensors_of(case, dtype)
    arguments = [tensors[n] for n in ("x", "activations", "weight", "bias", "to_dendrite")]
    z = candidate_autograd.preactivate(*arguments, site.geometry)
    wide = doubled(tensors)
    expected = reference.candidate_preactivations(
        *(wide[n] for n in ("x", "activations", "weight", "bias", "to_dendrite")), site.geometry
    )
    assert_close(z.cpu(), expected, dtype)
    check_backward(site, tensors, case.grad.to(DEVICE, dtype), z)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 20.0])
@pytest.mark.parametrize("regression", [False, True], ids=["covariance", "correlation"])
def test_activation(activation: str, scale: float, regression: bool) -> None:
    site = BY_NAME["linear-63-127"]
    case = make_candidates(site, 2, 1, activation, regression=regression)
    tensors = tensors_of(case, F32)
    # Where tanh is all cancellation, where it bends, and where it is flat.
    z = scale * torch.randn(2, *case.grad.shape, device=DEVICE)
    z[0, 0] = 0.0
    check_backward(site, tensors, case.grad.to(DEVICE, F32), z, activation)


@pytest.mark.parametrize("rows", [63, 70_000])
def test_averages_keep_within_the_range_of_float16(rows: int) -> None:
    # 1/70,000 is a subnormal of float16, and a sum of 70,000 ones is beyond its range.
    site = Site("rows", (rows, 3), (2, 3))
    case = make_candidates(site, 2, 1)
    tensors = tensors_of(case, torch.float16)
    z = torch.randn(2, *case.grad.shape, device=DEVICE, dtype=torch.float16)
    check_backward(site, tensors, case.grad.to(DEVICE, torch.float16), z)


LAYOUTS = {
    "channels last": lambda t, lead: t.movedim(lead + 1, -1).contiguous().movedim(-1, lead + 1),
    "transposed space": lambda t, lead: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other": lambda t, lead: t.repeat_interleave(2, -1)[..., ::2],
    "batch inside": lambda t, lead: t.movedim(lead, -1).contiguous().movedim(-1, lead),
}


@dtypes
@pytest.mark.parametrize("which", ["grad", "z", "activations", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, which: str, dtype: torch.dtype) -> None:
    site = BY_NAME["conv2d"]
    case = make_candidates(site, 2, 2)
    tensors, laid = tensors_of(case, dtype), LAYOUTS[layout]
    grad = case.grad.to(DEVICE, dtype)
    z = torch.randn(2, *grad.shape, device=DEVICE, dtype=dtype)
    if which in ("grad", "all"):
        grad = laid(grad, 0)
    if which in ("z", "all"):
        z = laid(z, 1)
    if which in ("activations", "all"):
        tensors["activations"] = laid(tensors["activations"], 1)
    check_backward(site, tensors, grad, z)


def test_expanded_error() -> None:
    site = BY_NAME["conv2d-form"]
    case = make_candidates(site, 2, 1)
    z = torch.randn(2, *case.grad.shape, device=DEVICE)
    grad = torch.ones((), device=DEVICE).expand(case.grad.shape)
    check_backward(site, tensors_of(case, F32), grad, z)


def test_many_older_dendrites() -> None:
    site = BY_NAME["linear-63-127"]
    case = make_candidates(site, 2, 9)
    tensors = tensors_of(case, F32)
    arguments = [tensors[n] for n in ("x", "activations", "weight", "bias", "to_dendrite")]
    z = candidate_autograd.preactivate(*arguments, site.geometry)
    check_backward(site, tensors, case.grad.to(DEVICE, F32), z)


@pytest.mark.parametrize("name", ["conv2d", "linear-63-127"])
def test_every_run_gives_the_same_bits(name: str) -> None:
    site = BY_NAME[name]
    case = make_candidates(site, 3, 1)
    tensors = tensors_of(case, F32)
    # Enough positions for many shares.
    shape = (64, *case.grad.shape[1:])
    grad, z = torch.randn(shape, device=DEVICE), torch.randn(3, *shape, device=DEVICE)
    older = torch.randn(1, *shape, device=DEVICE)
    runs = [
        candidate_moments(
            grad,
            z,
            older,
            tensors["direction"],
            tensors["error_mean"],
            None,
            "tanh",
            site.geometry.channel_axis,
        )
        for _ in range(3)
    ]
    for run in runs[1:]:
        for field in ("dz", "sums"):
            assert torch.equal(getattr(run, field), getattr(runs[0], field)), field


@pytest.mark.parametrize("name", ["conv2d", "conv2d-1x1", "linear-sequence", "conv2d-unbatched"])
@pytest.mark.parametrize("last", [False, True], ids=["as it is", "channels last"])
def test_the_weight_gradient_takes_dz_without_a_copy(name: str, last: bool) -> None:
    site = BY_NAME[name]
    case = make_candidates(site, 3, 0)
    tensors = tensors_of(case, F32)
    z = torch.randn(3, *case.grad.shape, device=DEVICE)
    if last and site.geometry.spatial:
        axis = site.geometry.channel_axis
        z = z.movedim(axis, -1).contiguous().movedim(-1, axis)
    signal = candidate_moments(
        case.grad.to(DEVICE, F32),
        z,
        z[:0],
        tensors["direction"],
        tensors["error_mean"],
        None,
        "tanh",
        site.geometry.channel_axis,
    )
    flat = reference.flatten_stack(signal.dz, site.geometry.channel_axis, 1)
    assert flat.data_ptr() == signal.dz.data_ptr()


# Sizes of (C, N) of three sites; the largest needs more than one step of its program.
SITES_OF_A_MODEL = ((1, 1), (2, 3), (4, 300))
RULES = Rules(measure_every=3, priming_batches=2, moment_decay=0.9)


def memories_of(dtype: torch.dtype, device: str) -> list[Memory]:
    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return [
        Memory(
            zeros(6 * c, n),
            zeros(6, c, n),
            zeros(),
            zeros(6, c, n),
            zeros(),
            zeros(c, n),
            zeros(n),
            zeros(dtype=torch.int64),
            tuple(zeros(dtype=F32) for _ in range(steps)),
            # Candidates of one of them climb the covariance.
            None if steps == 1 else zeros(2, c, n),
        )
        for steps, (c, n) in zip((1, 2, 3), SITES_OF_A_MODEL, strict=True)
    ]


def sums(c: int, n: int, positions: int, generator: torch.Generator) -> Tensor:
    """Sum the moments of activations that have something to do with the errors."""
    error = torch.randn(positions, n, generator=generator, dtype=torch.float64) + 0.2
    noise = torch.randn(c, positions, n, generator=generator, dtype=torch.float64)
    pull = torch.where(torch.rand(c, 1, n, generator=generator) < 0.5, -1.0, 1.0)
    a = torch.tanh(pull * error + 0.1 * noise)
    g = error.expand_as(a)
    return torch.stack([t.sum(1) for t in (torch.ones_like(a), a, a * a, g, g * g, a * g)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_turns_are_those_of_the_reference(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    fused, plain = memories_of(dtype, DEVICE), memories_of(dtype, "cpu")
    lines, tables = [line_of(memory) for memory in fused], {}
    bad = {4: torch.inf, 5: torch.nan, 6: -torch.inf}
    for batch in range(1, 13):
        drawn = []
        for site, (c, n) in enumerate(SITES_OF_A_MODEL):
            s = sums(c, n, 40 if batch == 9 else 200, generator)
            if batch in bad and site != 1:
                s[batch % 6, c - 1, n - 1] = bad[batch]
            drawn.append(s.to(dtype).flatten(0, 1))
        fused = [m._replace(sums=s.to(DEVICE)) for m, s in zip(fused, drawn, strict=True)]
        plain = [m._replace(sums=s) for m, s in zip(plain, drawn, strict=True)]
        found = take_turns_fused(fused, table_of(lines, tables), RULES)
        for memory, twin, verdict in zip(fused, plain, found, strict=True):
            wanted = take_turn(twin, RULES)
            assert torch.equal(verdict.idle.cpu(), wanted.idle), batch
            assert torch.equal(verdict.overflow.cpu(), wanted.overflow), batch
            assert_close(verdict.share.cpu(), wanted.share)
            assert (twin.regression is None) == (len(twin.steps) == 1)
            for out, expected in zip(memory.kept, twin.kept, strict=True):
                assert_close(out.cpu().double(), expected, dtype)
            for step, expected in zip(memory.steps, twin.steps, strict=True):
                assert torch.equal(step.cpu(), expected), batch
    # The batches that neither measured nor primed nor overflowed.
    assert [float(m.steps[0]) for m in plain] == [4.0, 6.0, 4.0]
    assert [int(m.turns) for m in plain] == [12] * 3


def test_a_turn_touches_no_other_memory() -> None:
    """Sites whose tensors are neighbours in memory must not write into one another."""
    c, n = 2, 5
    pool = torch.full((3, 6 * c * n), 7.0, device=DEVICE)
    memory = memories_of(F32, DEVICE)[1]
    memory = memory._replace(
        sums=torch.ones(6 * c, n, device=DEVICE),
        running=pool[1].view(6, c, n),
        heldout=torch.zeros(6, c, n, device=DEVICE),
        direction=torch.zeros(c, n, device=DEVICE),
        error_mean=torch.zeros(n, device=DEVICE),
        regression=None,
    )
    take_turns_fused([memory], line_of(memory), RULES)
    assert (pool[[0, 2]] == 7.0).all()
    assert_close(pool[1].cpu(), torch.full_like(pool[1], 0.9 * 7 + 1).cpu().double(), F32)


def test_tables_are_remembered_and_never_dropped() -> None:
    memories, tables = memories_of(F32, DEVICE), {}
    lines = [line_of(memory) for memory in memories]
    whole = table_of(lines, tables)
    assert table_of(lines, tables) is whole
    some = [table_of(lines[:count], tables) for count in (1, 2)]
    assert [table.numel() for table in (*some, whole)] == [13, 26, 39]
    assert table_of(lines, tables) is whole
    # Sites met in ever other combinations get a table each time, and it is right.
    for index in range(100):
        table = table_of([lines[index % 3].clone()], tables)
        assert torch.equal(table, lines[index % 3])
    assert len(tables) == 64
