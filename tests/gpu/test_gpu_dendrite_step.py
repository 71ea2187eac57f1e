"""A training step of the dendrite phase on a CUDA device: no waiting, and captured in a graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx
from learning.loops import network, relative_error, same
from pbfx.candidates import Candidates

pytestmark = pytest.mark.gpu

RULES = {"measure_every": 3, "priming_batches": 4, "candidates": 2}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, groups=2)
        self.fc = nn.Linear(6 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv1(x)), inplace=True), 2)
        # Of what follows the soma some works in place, as torchvision's models do.
        x = F.relu(self.conv2(F.pad(x, (1, 0, 1, 0))), inplace=True)
        return self.fc(F.dropout(x.flatten(1), 0.25, self.training))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 64, 1, 8, 8, generator=generator)
    y = torch.randint(0, 10, (count, 64), generator=generator)
    return list(zip(x.cuda(), y.cuda(), strict=True))


class Run:
    """A model in its dendrite phase, and the step that a user's loop does."""

    def __init__(
        self, dendrites: int, dtype: torch.dtype, layout: torch.memory_format, device: str = "cuda"
    ) -> None:
        torch.manual_seed(0)
        net = Net().to(device, memory_format=layout)
        self.device = device
        # Each objective with and without a dtype of half the bits.
        objective = "correlation" if dendrites else "covariance"
        self.model = pbfx.transform(net, pbfx.Config(**RULES, objective=objective))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.dtype, self.layout = dtype, layout
        policy = pbfx.Interval(1, 10**6)
        if dendrites:
            pbfx.grow(self.model, dendrites)
        self.tracker = pbfx.Tracker(self.model, self.optimizer, policy=policy)
        assert self.tracker.step(0.0).phase is pbfx.Phase.DENDRITE
        self.model.train()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        enabled = self.dtype is not torch.float32
        # The weights' casts belong to the step: without the cache a graph makes them anew.
        with torch.autocast(self.device, self.dtype, enabled=enabled, cache_enabled=False):
            loss = F.cross_entropy(self.model(x.to(memory_format=self.layout)).float(), y)
        loss.backward()
        self.optimizer.step()
        return loss

    def candidates(self) -> dict[str, Tensor]:
        return {
            f"{path}.{name}": tensor.detach().clone()
            for path, module in self.model.named_modules()
            if isinstance(module, Candidates)
            for name, tensor in module.state_dict().items()
        }

    def batches(self) -> set[int]:
        return {learner.batches for learner in self.tracker._learners.values()}


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        # torch warns that the mode itself is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run: Run, x: Tensor, y: Tensor) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.step(x, y)
    return graph.replay


@pytest.fixture(autouse=True)
def one_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    # A graph must be compared with the same convolutions.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


each = pytest.mark.parametrize(
    ("dendrites", "dtype", "layout"),
    [
        (0, torch.float32, torch.contiguous_format),
        (2, torch.float32, torch.contiguous_format),
        (1, torch.bfloat16, torch.channels_last),
        (0, torch.float16, torch.contiguous_format),
    ],
    ids=["plain", "two dendrites", "bfloat16, channels last", "float16"],
)


@each
def test_a_captured_step_learns_as_the_step_itself(
    dendrites: int, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    data = batches(15)
    eager, graphed = (Run(dendrites, dtype, layout) for _ in range(2))
    assert same(eager.candidates(), graphed.candidates())
    base = network(graphed.model)
    x, y = (t.clone() for t in data[0])
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for batch in data[:3]:
            x.copy_(batch[0])
            y.copy_(batch[1])
            graphed.step(x, y)
    torch.cuda.current_stream().wait_stream(aside)
    replay = captured(graphed, x, y)
    # Capturing ran nothing: three batches are done.
    assert graphed.batches() == {3}
    for number, batch in enumerate(data):
        before = eager.candidates()
        eager.step(*batch)
        if number < 3:
            continue
        x.copy_(batch[0])
        y.copy_(batch[1])
        replay()
        after, found = eager.candidates(), graphed.candidates()
        # Every turn is among them: priming, measuring, learning.
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        measures, primes = (number + 1) % 3 == 0, number + 1 <= 4
        assert any(name.endswith(".weight") for name in moved) == (not measures and not primes)
        assert any(name.endswith(".heldout") for name in moved) == measures
        for name, wanted in after.items():
            torch.testing.assert_close(found[name], wanted, msg=f"{name} at batch {number}")
    assert graphed.batches() == eager.batches() == {len(data)}
    assert same(network(graphed.model), base), "a replay moved the network"
    scores = [run.tracker.step(0.0) and run.tracker.history[-1] for run in (eager, graphed)]
    assert scores[0].candidate_score == pytest.approx(scores[1].candidate_score, rel=1e-3)
    # And back to eager steps with the same memory.
    for batch in data[:3]:
        eager.step(*batch)
        graphed.step(*batch)
    for name, wanted in eager.candidates().items():
        torch.testing.assert_close(graphed.candidates()[name], wanted, msg=name)


@each
def test_no_step_waits_for_the_device(
    dendrites: int, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    run, data = Run(dendrites, dtype, layout), batches(10)
    # The first launches compile, and load their code.
    for batch in data[:1]:
        run.step(*batch)
    before = run.candidates()
    with no_waiting():
        for batch in data[1:]:
            run.step(*batch)
    after = run.candidates()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert run.batches() == {len(data)}


def test_a_capture_before_candidates_are_scaled_is_refused() -> None:
    run, data = Run(0, torch.float32, torch.contiguous_format), batches(3)
    run.step(*data[0])
    # conv1 has a norm; half of the priming batches show the scale.
    with pytest.raises(pbfx.errors.RestructureError, match=r"after 2 batches, and this is batch 2"):
        captured(run, *data[1])


@pytest.mark.parametrize("position", [4, 6, 8], ids=["priming", "measuring", "learning"])
def test_an_overflow_leaves_no_trace_in_a_replay(position: int) -> None:
    run, data = Run(0, torch.float32, torch.contiguous_format), batches(10)
    x, y = (t.clone() for t in data[0])
    for batch in data[:2]:
        run.step(*batch)
    replay = captured(run, x, y)
    moments = next(m for m in run.model.modules() if isinstance(m, Candidates)).moments
    for number, batch in enumerate(data[2:], 3):
        before = run.candidates()
        x.copy_(batch[0] * torch.inf if number == position else batch[0])
        y.copy_(batch[1])
        replay()
        after = run.candidates()
        if number == position:
            assert all(
                torch.equal(before[n], after[n]) for n in before if not n.endswith("moments")
            )
            # What a loss scaler finds; the user's optimizer must not step on it.
            assert moments.grad.isinf().all()
        else:
            assert not moments.grad.any()
            assert any(not torch.equal(before[n], after[n]) for n in before)


def test_accumulation_counts_as_on_a_cpu() -> None:
    """Gradients that nobody zeroes: the sums add to what a loss scaler was left, a zero."""
    runs = [Run(0, torch.float32, torch.contiguous_format, device) for device in ("cpu", "cuda")]
    for x, y in batches(7):
        for run in runs:
            run.optimizer.zero_grad = lambda *_: None
            run.step(x.to(run.device), y.to(run.device))
    cpu, cuda = (run.candidates() for run in runs)
    for name, wanted in cpu.items():
        if name.endswith((".running", ".heldout", "running_batches", "heldout_batches")):
            assert relative_error(cuda[name].cpu(), wanted) < 1e-3, name


def test_eager_output_shares_the_memory_of_the_neuron() -> None:
    run, (batch, *_) = Run(0, torch.float32, torch.contiguous_format), batches(1)
    seen = []
    module = next(m for m in run.model.modules() if isinstance(m, Candidates))
    handle = module.register_forward_hook(
        lambda _, inputs, out: seen.append((inputs[0].data_ptr(), out.data_ptr()))
    )
    run.step(*batch)
    handle.remove()
    assert seen
    assert all(into == out for into, out in seen)
