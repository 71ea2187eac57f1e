"""What README tells a newcomer to type has to work as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import pbfx

ROOT = Path(__file__).parents[1]


class Net(nn.Sequential):
    """The user's model."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_the_ten_lines_run_to_completion() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = (x[:, 0] * x[:, 1] > 0).long()
    calls = {"train": 0, "validate": 0}

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        calls["train"] += 1
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def validate(model: nn.Module) -> float:
        calls["validate"] += 1
        model.eval()
        return (model(x).argmax(1) == y).float().mean().item()

    names: dict[str, object] = {"Net": Net, "train": train, "validate": validate}
    exec(code, names)
    tracker = names["tracker"]
    assert isinstance(tracker, pbfx.Tracker)
    assert tracker.complete
    assert calls["train"] == calls["validate"] == len(tracker.history)


def test_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
