"""Predicted gains of dendrites against measured ones, site by site: what `sites="auto"` rests on.

A small convolutional net learns scikit-learn's digits for some epochs, and its candidates at every
site for some more. What `pbfx.learning.select` would be told is compared with what a dendrite at
each neuron of one site alone brings, the rest of the network held fast:

    gain = min over b of L - min over b, T of L      b the site's biases, T its new links

on the training images, by L-BFGS from where the network stands, and the same networks' difference
on validation images.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx
from benchmarks.benchmark import Benchmark, Case
from benchmarks.gate import require, same_bits
from benchmarks.options import count, positive
from pbfx.demo.data import Split, load_digits
from pbfx.learning import Prospect, SiteLearner, predicted_gains, prospect_of, samples_per_batch
from pbfx.restructure import promote, thaw

COLUMNS = (
    *("width", "epochs", "candidate_epochs", "candidate_lr", "batch_size"),
    *("train_loss", "validation_loss", "site", "neurons", "parameters", "positions"),
    *("correlation", "chance", "predicted", "gain_train", "gain_validation"),
)
LEARNING_RATE = 3e-3


class Net(nn.Module):
    """Two convolutions and two linear layers; every site has another number of positions or inputs.

    Args:
        width: factor on the number of neurons of all but the last layer.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        first, second, hidden = (max(1, round(n * width)) for n in (3, 4, 8))
        self.conv1 = nn.Conv2d(1, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2)
        self.fc1 = nn.Linear(second * 9, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 10) of images (B, 1, 8, 8)."""
        x = F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


@dataclasses.dataclass(frozen=True)
class Grown:
    """A network with a dendrite at every neuron, the images, and what was measured before."""

    model: pbfx.PerforatedModule
    train: Split
    validation: Split
    prospects: list[Prospect]

    def losses(self) -> tuple[float, float]:
        """Return the loss on training and validation images."""
        with torch.no_grad():
            return tuple(  # pyright: ignore[reportReturnType]
                float(F.cross_entropy(self.model(split.images), split.labels))
                for split in (self.train, self.validation)
            )


def run(args: argparse.Namespace) -> Iterator[Case]:
    """Train, measure and grow once for each number of epochs, then measure site by site.

    Raises:
        GateError: if a promotion changes an output.
    """
    for epochs in args.epochs:
        yield _case(args, epochs, _grow(args, epochs))


def _grow(args: argparse.Namespace, epochs: int) -> Grown:
    data = load_digits()
    torch.manual_seed(args.seed)
    settings = pbfx.Config(seed=args.seed, candidate_lr=args.candidate_lr)
    model = pbfx.transform(Net(args.width), settings).to(args.device)
    assert isinstance(model, pbfx.PerforatedModule)
    train, validation = (s.to(torch.device(args.device)) for s in (data.train, data.validation))
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    policy = pbfx.Interval(epochs, args.candidate_epochs)
    tracker = pbfx.Tracker(model, optimizer, policy=policy, max_dendrites=1)
    for epoch in range(epochs + args.candidate_epochs):
        if epoch:
            # A score that rises: the network of the last epoch is the one that grows.
            tracker.step(float(epoch))
        _train(model, optimizer, train, args.batch_size)
    learners: dict[str, SiteLearner] = tracker._learners
    for learner in learners.values():
        learner.measure()
    prospects = [prospect_of(name, learner) for name, learner in learners.items()]
    model.eval()
    wanted = model(train.images)
    promote(model, learners)
    assert tracker._frozen is not None
    thaw(model, tracker._frozen)
    same = same_bits(model.eval()(train.images), wanted)
    require([] if same else ["promotion changes the output"])
    # In double precision, so that small gains are no rounding errors.
    model.double()
    train, validation = (Split(s.images.double(), s.labels) for s in (train, validation))
    return Grown(model, train, validation, prospects)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, split: Split, batch: int) -> None:
    model.train()
    for rows in torch.randperm(len(split)).split(batch):
        optimizer.zero_grad()
        F.cross_entropy(model(split.images[rows]), split.labels[rows]).backward()
        optimizer.step()


def _gain(grown: Grown, site: str) -> tuple[float, float]:
    """Return by how much the links of one site lower the losses, beside what its biases do."""
    dendrites, soma = grown.model.grown()[site], grown.model.get_submodule(site)
    assert isinstance(soma.bias, nn.Parameter)
    start = soma.bias.detach().clone()
    found = []
    for fitted in ([soma.bias], [soma.bias, dendrites.to_soma]):
        _fit(grown, fitted)
        found.append(grown.losses())
        with torch.no_grad():
            soma.bias.copy_(start)
            dendrites.to_soma.zero_()
    (train, validation), (train_grown, validation_grown) = found
    return train - train_grown, validation - validation_grown


def _fit(grown: Grown, parameters: list[nn.Parameter]) -> None:
    for parameter in grown.model.parameters():
        parameter.requires_grad_(any(parameter is p for p in parameters))
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(grown.model(grown.train.images), grown.train.labels)
        value.backward()
        return value

    optimizer.step(loss)


def _case(args: argparse.Namespace, epochs: int, grown: Grown) -> Case:
    train_loss, validation_loss = grown.losses()
    samples = samples_per_batch(grown.prospects)
    rows: list[dict[str, object]] = []
    cells: list[tuple[str, ...]] = []
    for prospect in grown.prospects:
        gain_train, gain_validation = _gain(grown, prospect.site)
        neurons = len(prospect.correlations)
        rms = (sum(r**2 for r in prospect.correlations) / neurons) ** 0.5
        predicted = sum(predicted_gains(prospect, samples))
        rows.append(
            {
                "width": args.width,
                "epochs": epochs,
                "candidate_epochs": args.candidate_epochs,
                "candidate_lr": args.candidate_lr,
                "batch_size": args.batch_size,
                "train_loss": train_loss,
                "validation_loss": validation_loss,
                "site": prospect.site,
                "neurons": neurons,
                "parameters": prospect.cost * neurons,
                "positions": round(prospect.positions_per_batch / samples),
                "correlation": rms,
                "chance": prospect.chance,
                "predicted": predicted,
                "gain_train": gain_train,
                "gain_validation": gain_validation,
            }
        )
        cells.append(
            (
                *(prospect.site, str(prospect.cost * neurons)),
                *(str(rows[-1]["positions"]), f"{rms:.3f}", f"{prospect.chance:.3f}"),
                *(f"{predicted:.4f}", f"{gain_train:.4f}", f"{gain_validation:.4f}"),
            )
        )
    return Case(
        title=(
            f"{epochs} epochs: loss {train_loss:.3f}, on validation images {validation_loss:.3f}; "
            f"{args.candidate_epochs} epochs of candidate learning"
        ),
        headings=(
            *("site", "parameters", "space", "r (rms)", "chance"),
            *("predicted", "gain", "validation"),
        ),
        cells=cells,
        notes=[
            "gains in nats per sample, of a dendrite at every neuron of one site alone; space: "
            "positions per sample"
        ],
        rows=rows,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs", type=count, nargs="+", default=[8, 20, 40], help="of the network (8 20 40)"
    )
    parser.add_argument("--candidate-epochs", type=count, default=8, help="(default 8)")
    parser.add_argument("--candidate-lr", type=positive, default=3e-3, help="(default 0.003)")
    parser.add_argument("--batch-size", type=count, default=32, help="(default 32)")
    parser.add_argument("--width", type=positive, default=1.0, help="of the network (default 1)")


BENCHMARK = Benchmark(
    name="selection",
    summary="predicted and measured gains of dendrites, site by site",
    columns=COLUMNS,
    add_arguments=_add_arguments,
    run=run,
)
