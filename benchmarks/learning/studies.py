"""The studies: a data set, a net, how it is trained, and which arms at which widths by default."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Adadelta, AdamW, Optimizer

from benchmarks.learning.nets import NETS, Net


@dataclass(frozen=True)
class Study:
    """What the arms of one study share.

    Attributes:
        name: what a user types, and the file's name.
        data: a name in `benchmarks.learning.data.DATA`.
        nets: a name in `NETS`; that of the data where it is empty.
        arms, widths: by default.
        optimizer: `adadelta` or `adamw`.
        rate: the first learning rate.
        gamma: the rate's factor an epoch of a neuron phase; over the one long schedule of a plain
            arm the rate falls by as much in all.
        batch_size: rows a step.
        steps: steps an epoch, None for as many as there are full batches.
        neuron_epochs, dendrite_epochs, dendrites: of the arms with phases, by default.
        score: what chooses the epoch on the validation split, the lower the better.
        selections: names of sets of sites, as globs over module paths.
        config: settings of `pbfx.Config` that differ from its defaults.
    """

    name: str
    data: str
    arms: tuple[str, ...]
    widths: tuple[float, ...]
    optimizer: Literal["adadelta", "adamw"]
    rate: float
    gamma: float
    batch_size: int
    neuron_epochs: int
    dendrite_epochs: int
    dendrites: int
    nets: str = ""
    steps: int | None = None
    score: Literal["error", "loss"] = "error"
    selections: dict[str, tuple[str, ...]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def net(self) -> Net:
        """Return the study's net."""
        return NETS[self.nets or self.data][0]

    @property
    def deeper(self) -> Net:
        """Return the deeper rival."""
        return NETS[self.nets or self.data][1]

    def make_optimizer(
        self, parameters: Iterable[nn.Parameter], device: torch.device, own_kernels: bool = True
    ) -> Optimizer:
        """Return the optimizer; on CUDA one that a graph can hold, with its rate on the device.

        Args:
            parameters: what it steps.
            device: where they lie.
            own_kernels: on CUDA, whether to step Adadelta by `FusedAdadelta`.
        """
        captured = device.type == "cuda"
        # A rate that is a number would be part of the graph, and no schedule could change it.
        rate: Any = torch.tensor(self.rate, device=device) if captured else self.rate
        if self.optimizer == "adadelta":
            if captured and own_kernels:
                # Triton is there wherever torch has CUDA, and may be absent elsewhere.
                from benchmarks.learning.adadelta import FusedAdadelta

                return FusedAdadelta(parameters, lr=rate, capturable=True)
            return Adadelta(parameters, lr=rate, capturable=captured)
        return AdamW(parameters, lr=rate, weight_decay=0.01, capturable=captured, fused=captured)


_CONTROLLED = ("plain", "sham", "perforated", "gradient", "perforated-last")

_ABLATIONS = (
    *("sham", "perforated"),
    *(f"perforated[tuning={tuning}]" for tuning in ("newest", "all", "full")),
    *("perforated[finish=True]", "perforated[finish=True,tuning=full]", "sham[finish=True]"),
    *("perforated[reset_learning_rate=False]", "sham[reset_learning_rate=False]"),
    *("perforated[spare=0.2]", "sham[spare=0.2]"),
    *("perforated[candidates=1]", "perforated[candidates=8]"),
    *("perforated[objective=correlation]", "perforated[initial_link=0.1]"),
    *("perforated[policy.dendrite_epochs=2]", "perforated[policy.dendrite_epochs=8]"),
    *("perforated[max_dendrites=5]", "sham[max_dendrites=5]"),
    *("perforated[finish=True,max_dendrites=5]", "sham[finish=True,max_dendrites=5]"),
    "perforated[activation=relu]",
    *("perforated[trial.groups=4]", "perforated[max_dendrites=5,trial.groups=4]"),
    *("perforated[trial.rank=8]", "perforated[trial.rank=2]"),
    "perforated[max_dendrites=5,trial.rank=8]",
    *("perforated[trial.line_search=links]", "perforated[trial.line_search=both]"),
    "sham[trial.line_search=soma]",
)

_MNIST = Study(
    "mnist",
    data="mnist",
    arms=(*_CONTROLLED, "wider2", "deeper2"),
    widths=(1.0, 0.61, 0.25, 0.1, 0.05),
    optimizer="adadelta",
    rate=1.0,
    gamma=0.7,
    batch_size=64,
    neuron_epochs=8,
    dendrite_epochs=4,
    dendrites=2,
    selections={"last": ("fc2",), "cheap": ("conv1", "conv2", "fc2"), "linear": ("fc1", "fc2")},
)

STUDIES = {
    study.name: study
    for study in (
        _MNIST,
        replace(
            _MNIST,
            name="bare",
            nets="bare",
            arms=("plain", "sham", "perforated", "perforated[tuning=full]", "gradient", "wider2"),
            widths=(0.25, 0.1, 0.05),
        ),
        replace(_MNIST, name="ablations", arms=_ABLATIONS, widths=(1.0, 0.25, 0.1)),
        replace(
            _MNIST,
            name="compression",
            arms=("plain", "perforated", "perforated-cheap", "perforated-last"),
            widths=(1.0, 0.8, 0.73, 0.61, 0.5, 0.35, 0.25, 0.165, 0.1),
        ),
        Study(
            "adult",
            data="adult",
            arms=(*_CONTROLLED, "wider2", "deeper2"),
            widths=(1.0, 0.25, 0.0625),
            optimizer="adamw",
            rate=2e-3,
            gamma=0.75,
            batch_size=128,
            neuron_epochs=8,
            dendrite_epochs=4,
            dendrites=2,
            selections={"last": ("fc3",), "hidden": ("fc1", "fc2")},
        ),
        Study(
            "shakespeare",
            data="tiny_shakespeare",
            arms=(*_CONTROLLED, "wider2", "deeper2"),
            widths=(1.0, 0.5),
            optimizer="adamw",
            rate=2e-3,
            gamma=0.75,
            batch_size=64,
            steps=400,
            neuron_epochs=8,
            dendrite_epochs=4,
            dendrites=2,
            score="loss",
            selections={
                "last": ("head",),
                "mlp": ("*.fc1", "*.fc2"),
                "attention": ("*.attend", "*.project"),
            },
        ),
        Study(
            "digits",
            data="digits",
            arms=(*_CONTROLLED, "wider3", "deeper3"),
            widths=(1.0,),
            optimizer="adamw",
            rate=0.05,
            gamma=0.86,
            batch_size=64,
            neuron_epochs=20,
            dendrite_epochs=10,
            dendrites=3,
            selections={"last": ("fc",)},
            # A dendrite phase has 140 batches here, too few for steps of 1e-3.
            config={"candidate_lr": 2e-2},
        ),
    )
}
