"""Runs that can be stopped after any epoch; as a script, a process that continues them.

    python continued.py KIND FOLDER

loads every `<epoch>.safetensors` in FOLDER, continues each run to its end, and writes what became
of it to `<epoch>.pt`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

sys.path[:0] = [str(Path(__file__).parents[1])]

import pbfx  # noqa: E402
from learning.loops import Around, Cnn, Mlp, Task, images, regression  # noqa: E402


class Run:
    """Everything that a training script makes, built the same way every time."""

    def __init__(self, kind: str, directory: Path | None = None) -> None:
        torch.manual_seed(3)
        build, self.per_batch = KINDS[kind]
        self.task, model, optimizer, scheduler, policy, settings = build()
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.tracker = pbfx.Tracker(
            model, optimizer, scheduler, policy=policy, directory=directory, **settings
        )

    def epoch(self) -> None:
        """Train with dropout, and shuffle by torch's global stream."""
        self.model.train()
        for x, y in self.task.batches():

            def closure(x=x, y=y):
                self.optimizer.zero_grad()
                loss = self.task.loss(self.model(x), y)
                loss.backward()
                return loss.detach()

            self.optimizer.step(closure)
            if self.per_batch:
                self.scheduler.step()
        self.tracker.step(self.task.score(self.model))

    def finish(self) -> dict[str, Any]:
        while not self.tracker.complete:
            self.epoch()
        return {
            # Times differ from run to run, and nothing else does.
            "history": [
                {k: v for k, v in epoch.to_json().items() if k != "seconds"}
                for epoch in self.tracker.history
            ],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stream": torch.get_rng_state(),
        }


Parts = tuple[Task, nn.Module, torch.optim.Optimizer, Any, pbfx.Policy, dict[str, Any]]


def momentum() -> Parts:
    model = pbfx.transform(Cnn(), pbfx.Config(priming_batches=2, measure_every=2))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    scheduler = lrs.CosineAnnealingLR(optimizer, 3)
    return images(48), model, optimizer, scheduler, pbfx.Interval(2, 2), {"max_dendrites": 2}


def rolled_back() -> Parts:
    """Sets that do not help are dropped: the state of retries has to come back as well."""
    model = pbfx.transform(Mlp(), pbfx.Config(priming_batches=2, candidates=2))
    names = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [(n, p) for n, p in names.items() if "weight" in n], "weight_decay": 0.1},
            {"params": [(n, p) for n, p in names.items() if "bias" in n], "lr": 0.02},
        ],
        lr=0.03,
        amsgrad=True,
    )
    scheduler = lrs.ReduceLROnPlateau(optimizer, "max", 0.5, patience=0)
    policy = pbfx.Plateau(
        patience=1, relative_threshold=0.5, tries=2, candidate_patience=1, max_candidate_epochs=2
    )
    return regression(96), model, optimizer, scheduler, policy, {"max_dendrites": 2}


def by_batch() -> Parts:
    model = pbfx.transform(Mlp(), pbfx.Config(priming_batches=2))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scheduler = lrs.OneCycleLR(optimizer, 0.1, epochs=3, steps_per_epoch=3)
    return regression(96), model, optimizer, scheduler, pbfx.Interval(2, 1), {"max_dendrites": 2}


def gradient() -> Parts:
    model = pbfx.transform(Mlp(), pbfx.Config(learning="gradient"))
    optimizer = torch.optim.Adagrad(model.parameters(), 0.05, initial_accumulator_value=0.1)
    scheduler = lrs.SequentialLR(
        optimizer, [lrs.ConstantLR(optimizer, 0.5, 1), lrs.ExponentialLR(optimizer, 0.9)], [1]
    )
    settings = {"max_dendrites": 2, "reset_optimizer_state": True}
    return regression(96), model, optimizer, scheduler, pbfx.Interval(2), settings


def inside() -> Parts:
    """A perforated part in a larger module, which has a norm and dropouts of its own."""
    model = Around(pbfx.transform(Mlp(outputs=5), pbfx.Config(priming_batches=2)))
    optimizer = torch.optim.NAdam(model.parameters(), 0.01)
    return regression(96), model, optimizer, None, pbfx.Interval(2, 2), {"max_dendrites": 1}


def lbfgs() -> Parts:
    model = pbfx.transform(Mlp(), pbfx.Config(priming_batches=2))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4)
    return regression(96), model, optimizer, None, pbfx.Interval(3, 2), {"max_dendrites": 1}


def auto() -> Parts:
    """Dendrites on some channels of some sites, in the best network and in the present one."""
    config = pbfx.Config(
        priming_batches=2, measure_every=2, candidate_lr=1e-2, sites="auto", growth_parameters=20
    )
    model = pbfx.transform(Mlp(), config)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    return regression(384), model, optimizer, None, pbfx.Interval(2, 3), {"max_dendrites": 2}


# How each kind is built, and whether its loop steps the scheduler.
KINDS: dict[str, tuple[Callable[[], Parts], bool]] = {
    "momentum": (momentum, False),
    "rolled back": (rolled_back, False),
    "by batch": (by_batch, True),
    "gradient": (gradient, False),
    "inside": (inside, False),
    "lbfgs": (lbfgs, False),
    "auto": (auto, False),
}


def continue_all(kind: str, folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        run = Run(kind)
        pbfx.load(path, run.model, run.tracker)
        torch.save(run.finish(), path.with_suffix(".pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    continue_all(sys.argv[1], Path(sys.argv[2]))
