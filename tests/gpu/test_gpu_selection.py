"""Dendrites on some channels on a CUDA device: kernels, mixed precision, graphs, choosing sites."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx
from models import randomise
from pbfx.restructure import learners_of, start_dendrite_phase
from selection.subsets import dendrites_of, grow_some, relative, restrict

pytestmark = pytest.mark.gpu


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.groups = nn.Conv2d(16, 16, 3, groups=4)
        self.up = nn.ConvTranspose2d(16, 12, 2)
        self.fc = nn.Linear(12 * 49, 70)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.fc(F.relu(self.up(F.relu(self.groups(x)))).flatten(1))


def images(count: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, 8, 8, generator=generator)
    return x.cuda(), torch.randint(0, 70, (count,), generator=generator).cuda()


def pair() -> tuple[nn.Module, nn.Module]:
    """Return dendrites on all channels, silent but on some, and dendrites on those only."""
    torch.manual_seed(0)
    plain = Net()
    whole = pbfx.grow(pbfx.transform(copy.deepcopy(plain)), 2)
    part = grow_some(pbfx.transform(plain), 2)
    randomise(whole, scale=0.1)
    restrict(whole, part)
    return whole.cuda().eval(), part.cuda().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_subset_is_the_whole_with_other_links_at_zero(dtype, layout, monkeypatch) -> None:
    # cuDNN's default for float32 convolutions is TF32, which the float32 tolerance excludes.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    whole, part = pair()
    x = images()[0].to(memory_format=layout)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    found = []
    for model in (part, whole):
        model.to(memory_format=layout)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32):
            out = model(x)
        out.float().square().mean().backward()
        found.append(out)
    assert relative(*found) <= tolerance
    for name, some in dendrites_of(part).items():
        full = dendrites_of(whole)[name].to_soma.grad
        kept = slice(None) if some.site.channels is None else list(some.site.channels)
        # The error has been through every layer behind.
        assert relative(some.to_soma.grad, full[:, kept]) <= 10 * tolerance, name


def test_compiled() -> None:
    torch._dynamo.reset()
    _, part = pair()
    x = images()[0]
    compiled = torch.compile(part, fullgraph=True)
    assert relative(compiled(x), part(x)) <= 1e-5


def test_a_step_of_the_dendrite_phase_is_captured() -> None:
    _, model = pair()
    x, y = images()
    start_dendrite_phase(model)
    learners = learners_of(model)
    for learner in learners.values():
        learner.attach()

    def step() -> None:
        F.cross_entropy(model(x), y).backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(8):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = {n: d.candidates.weight.clone() for n, d in dendrites_of(model).items()}
    turns = {n: learner.batches for n, learner in learners.items()}
    for _ in range(4):
        graph.replay()
    for name, dendrites in dendrites_of(model).items():
        assert learners[name].batches == turns[name] + 4
        assert not torch.equal(dendrites.candidates.weight, before[name]), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_that_chooses(precision: str) -> None:
    torch.manual_seed(0)
    config = pbfx.Config(sites="auto", growth_parameters=20_000, measure_every=2)
    model = pbfx.transform(Net(), config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(2, 3), max_dendrites=2)
    x, y = images(512)
    while not tracker.complete:
        model.train()
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            enabled = precision == "bfloat16"
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
                loss = F.cross_entropy(model(x[rows]).float(), y[rows])
            loss.backward()
            optimizer.step()
        tracker.step(-loss.item())
    for dendrites in dendrites_of(model).values():
        assert dendrites.to_soma.isfinite().all()
        if dendrites.site.channels is not None:
            assert dendrites.channels.is_cuda
