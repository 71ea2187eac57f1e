"""A transformed model moves, narrows and is laid out as the plain one, in both phases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pbfx
from models import Case, assert_equal, outputs, run
from pbfx.candidates import Candidates
from pbfx.parts import candidate_parameters
from subjects import STAGES, SUBJECTS, bring, each_stage, each_subject, gradients, loss_of, make

DTYPES = (torch.float64, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_subject
@each_dtype
def test_every_dtype_gives_what_the_plain_model_gives(case: Case, dtype: torch.dtype):
    plain, model, x = case.build().to(dtype), make(case, "plain").to(dtype), case.input().to(dtype)
    for training in (True, False):
        expected = run(plain.train(training), x)
        found = run(model.train(training), x)
        assert [value.dtype for value in found] == [value.dtype for value in expected]
        assert_equal(found, expected)


@each_subject
@each_dtype
@pytest.mark.parametrize("stage", ["grown", "dendrite"])
def test_dendrites_change_dtype_with_the_model(case: Case, stage: str, dtype: torch.dtype):
    model, x = make(case, stage).eval(), case.input()
    exact = run(model, x)
    model.to(dtype)
    sums = {id(t) for m in model.modules() if isinstance(m, Candidates) for t in wide(m)}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        expected = torch.promote_types(dtype, torch.float32) if id(tensor) in sums else dtype
        assert tensor.dtype == (expected if tensor.is_floating_point() else tensor.dtype), name
    found = run(model, x.to(dtype))
    for one, other in zip(found, exact, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < {torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    loss_of(model, x.to(dtype)).backward()
    grads = gradients(model)
    assert grads
    assert all(torch.isfinite(value).all() for value in grads.values())


def wide(pool: Candidates) -> list[Tensor]:
    narrow = ("best_weight", "best_bias", "best_to_dendrite")
    return [pool.moments, *(t for name, t in pool.named_buffers() if name not in narrow)]


def test_sums_survive_half_precision_bit_for_bit():
    model = make(SUBJECTS["parts"], "dendrite")
    pool = next(m for m in model.modules() if isinstance(m, Candidates))
    pool.running.copy_(torch.full_like(pool.running, 1 / 3))
    model.half()
    assert torch.equal(pool.running, torch.full_like(pool.running, 1 / 3))
    assert pool.weight.dtype is torch.float16
    model.double()
    assert pool.running.dtype is torch.float64


class Shifted(nn.Module):
    """Adds a constant that it makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.linspace(0, 1, 3) + torch.zeros(x.shape[0], 1)


@pytest.mark.parametrize("stage", STAGES)
def test_constants_of_a_forward_keep_their_dtype(stage: str):
    torch.manual_seed(0)
    plain = Shifted()
    model = bring(pbfx.transform(plain), "plain").bfloat16()
    x = torch.randn(2, 4).bfloat16()
    assert model(x).dtype is torch.float32
    assert torch.equal(model(x), plain.bfloat16()(x))
    assert bring(model, stage)(x).dtype is torch.float32


def test_constants_of_a_forward_have_numbers_on_meta():
    torch.manual_seed(0)
    plain = Shifted()
    with torch.device("meta"):
        model = pbfx.transform(Shifted())
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    x = torch.randn(2, 4)
    assert torch.equal(model(x), plain(x))
    model.to("meta").to_empty(device="cpu").load_state_dict(plain.state_dict())
    assert torch.equal(model(x), plain(x))


@each_subject
@each_stage
@pytest.mark.parametrize("assign", [False, True])
def test_a_meta_model_takes_a_state(case: Case, stage: str, assign: bool):
    source = make(case, stage).eval()
    with torch.device("meta"):
        model = pbfx.transform(case.build()).eval()
    assert all(p.is_meta for p in model.parameters())
    if not assign:
        model.to_empty(device="cpu")
    state = {name: value.clone() for name, value in source.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert not any(value.is_meta for value in tensors.values())
    if assign:
        given = {value.data_ptr() for value in state.values()}
        assert {tensors[name].data_ptr() for name in tensors if name in state} <= given
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(source.get_parameter(name).requires_grad)
    assert_equal(run(model, case.input()), run(source, case.input()))


def test_a_meta_model_grows_on_meta():
    with torch.device("meta"):
        model = bring(pbfx.transform(SUBJECTS["nested"].build()), "dendrite")
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(5, 4, device="meta")).is_meta


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


@each_stage
def test_channels_last_stays_channels_last(stage: str):
    torch.manual_seed(0)
    plain = Convolutions()
    x = torch.randn(2, 3, 6, 5).to(memory_format=torch.channels_last)
    model = make(Case(Convolutions, (2, 3, 6, 5), ()), stage).to(memory_format=torch.channels_last)
    plain.load_state_dict(model.state_dict(), strict=False)
    expected = plain.to(memory_format=torch.channels_last)(x)
    assert model.first.weight.is_contiguous(memory_format=torch.channels_last)
    found = model(x)
    assert found.stride() == expected.stride()
    assert found.is_contiguous(memory_format=torch.channels_last)
    if stage == "plain":
        assert_equal([found], [expected])
    ordinary = make(Case(Convolutions, (2, 3, 6, 5), ()), stage)(x.contiguous())
    torch.testing.assert_close(found, ordinary, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    if stage != "plain":
        stack = model.first.dendrites.weight
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in stack)


@each_subject
@each_stage
def test_autocast_gives_the_plain_models_dtypes(case: Case, stage: str):
    plain, model, x = case.build(), make(case, stage), case.input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = run(plain, x), run(model, x)
    assert [value.dtype for value in found] == [value.dtype for value in expected]
    if stage == "plain":
        assert_equal(found, expected)
    torch.stack([value.float().sum() for value in found]).sum().backward()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == model.get_parameter(name).dtype
        assert gradient.isfinite().all(), name
    assert gradients(model)


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: str,
    dtype: torch.dtype,
    x: Tensor,
) -> None:
    """A training epoch as torch's documentation of mixed precision writes it."""
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            out = outputs(model(x))
        loss = torch.stack([value.float().pow(2).mean() for value in out]).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


def whole_run(case: Case, device: str, dtype: torch.dtype) -> None:
    config = pbfx.Config(priming_batches=1, measure_every=2)
    model, x = make(case, "plain", config).to(device), case.input().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=2)
    while not tracker.complete:
        pools = {name: p.detach().clone() for name, p in candidate_parameters(model).items()}
        base = {n: p.detach().clone() for n, p in model.named_parameters() if "dendrites" not in n}
        loop(model.train(), optimizer, scaler, device, dtype, x)
        moved = {
            name
            for name, value in base.items()
            if not torch.equal(value, model.get_parameter(name))
        }
        assert bool(moved) is not bool(pools), "the base moves in the neuron phase, and only there"
        learnt = [n for n, value in pools.items() if not torch.equal(value, model.get_parameter(n))]
        assert bool(learnt) is bool(pools)
        tracker.step(float(len(tracker.history)))
    assert scaler.get_scale() == 2.0**8, "nothing overflowed"
    assert tracker.dendrites == 2


@pytest.mark.parametrize("name", ["functional", "parts", "nested", "convolutional"])
def test_a_scaled_run_through_both_phases(name: str):
    whole_run(SUBJECTS[name], "cpu", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["functional", "parts", "nested"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_scaled_run_on_a_gpu(name: str, dtype: torch.dtype):
    whole_run(SUBJECTS[name], "cuda", dtype)


@pytest.mark.gpu
@each_subject
@each_stage
def test_a_model_moves_to_a_gpu_and_back(case: Case, stage: str):
    model, x = make(case, stage).eval(), case.input()
    expected = run(model, x)
    found = run(model.cuda(), x.cuda())
    assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)
    assert_equal(run(model.cpu(), x), expected)
