"""Whole runs on a CUDA device: phases, mixed precision, compilation, checkpoints."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx

pytestmark = pytest.mark.gpu


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.fc(F.dropout(x.flatten(1), 0.25, self.training))


def batches(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 64, 1, 8, 8, generator=generator)
    y = torch.randint(0, 10, (count, 64), generator=generator)
    return list(zip(x.cuda(), y.cuda(), strict=True))


@pytest.mark.parametrize("learning", ["perforated", "gradient", "sham"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_run(learning: str, precision: str, compiled: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = pbfx.transform(Net(), pbfx.Config(learning=learning, priming_batches=2)).cuda()
    call = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tracker = pbfx.Tracker(call, optimizer, policy=pbfx.Interval(2, 2), max_dendrites=2)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "float16")
    dtype = getattr(torch, precision)
    frozen: dict[str, Tensor] = {}
    while not tracker.complete:
        model.train()
        for x, y in batches():
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32):
                loss = F.cross_entropy(call(x).float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        for name, tensor in frozen.items():
            assert torch.equal(model.state_dict()[name], tensor), name
        step = tracker.step(-loss.item())
        frozen = {}
        if step.phase is pbfx.Phase.DENDRITE:
            frozen = {k: v.clone() for k, v in model.state_dict().items() if "candid" not in k}
    scores = [epoch.candidate_score for epoch in tracker.history]
    if learning == "gradient":
        assert scores == [None] * len(scores)
    else:
        assert all(0 < s < 1 for s in scores if s is not None)
        assert sum(s is not None for s in scores) == 4
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_eager_and_compiled_gradients_agree() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = pbfx.transform(Net()).cuda()
    pbfx.grow(model, 2)
    for module in model.grown().values():
        nn.init.normal_(module.to_soma)
    x, y = batches(1)[0]
    model.eval()
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        F.cross_entropy(call(x), y).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, eager in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], eager, msg=name, rtol=2e-3, atol=1e-5)


def test_no_host_synchronisation_in_a_dendrite_step() -> None:
    model = pbfx.transform(Net(), pbfx.Config(priming_batches=0)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 5))
    tracker.step(0.0)
    assert tracker.phase is pbfx.Phase.DENDRITE
    data = batches()
    for x, y in data[:2]:
        F.cross_entropy(model(x), y).backward()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        # torch warns that the mode itself is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_checkpoint_moves_between_devices(tmp_path: Path) -> None:
    model = pbfx.transform(Net()).cuda()
    pbfx.grow(model, 1)
    pbfx.save(model, tmp_path / "net.safetensors")
    there = pbfx.load(tmp_path / "net.safetensors", Net())
    assert all(t.device.type == "cpu" for t in there.state_dict().values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(there.state_dict()[name], tensor.cpu()), name
    back = pbfx.load(tmp_path / "net.safetensors", Net().cuda())
    assert all(t.device.type == "cuda" for t in back.state_dict().values())
