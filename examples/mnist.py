"""The PyTorch MNIST example with dendrites: every line that pbfx changes ends in `# pbfx`.

    python examples/mnist.py --data-dir DIR                     # perforated, three growths
    python examples/mnist.py --data-dir DIR --plain             # the same net without pbfx
    python examples/mnist.py --data-dir DIR --arms plain,sham,perforated --seeds 5 --device cuda

DIR holds MNIST's four idx files, gzipped or not. The net and its training are those of the
well-known example: conv 32, conv 64, fc 128, fc 10, dropout 0.25 and 0.5, Adadelta from rate 1.0,
StepLR with gamma 0.7, batches of 64. Three things differ: 5,000 of the training images choose the
epoch, the test images are read once when a run is over, and the data lies on the device, so that a
GPU does not wait for a loader.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim.lr_scheduler import StepLR

import pbfx  # pbfx
from pbfx.demo.arms import PlainTracker
from pbfx.demo.command import choose_device, positive, whole
from pbfx.demo.data import Digits, Split, load_mnist
from pbfx.demo.report import versions, write_atomically
from pbfx.demo.summary import summarise
from pbfx.demo.table import print_summary
from pbfx.parts import parameter_count

ARMS = ("plain", "sham", "perforated", "gradient")


class Net(nn.Module):
    """The example's net, its layers scaled by `width`."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        first, second, hidden = int(32 * width), int(64 * width), int(128 * width)
        self.conv1 = nn.Conv2d(1, first, 3, 1)
        self.conv2 = nn.Conv2d(first, second, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(second * 12 * 12, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2)
        x = self.dropout1(x)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = self.dropout2(x)
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)


def train(model, optimizer, split: Split, batch_size: int, generator: torch.Generator) -> None:
    """Train one epoch."""
    model.train()
    order = torch.randperm(len(split), generator=generator).to(split.labels.device)
    for rows in order.split(batch_size):
        optimizer.zero_grad()
        loss = F.nll_loss(model(split.images[rows]), split.labels[rows])
        loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model, split: Split) -> float:
    """Return the accuracy in percent."""
    model.eval()
    right = torch.zeros((), device=split.labels.device)
    for images, labels in zip(split.images.split(1000), split.labels.split(1000), strict=True):
        right += (model(images).argmax(dim=1) == labels).sum()
    return 100 * right.item() / len(split)


@dataclass(frozen=True)
class Result:
    """One run. `error` is the test error in percent, read once with the best epoch's weights."""

    arm: str
    seed: int
    error: float
    validation: float
    dendrites: int
    parameters: int
    epochs: int
    seconds: float


def fit(
    arm: str, seed: int, data: Digits, device: torch.device, args: argparse.Namespace
) -> Result:
    """Train one arm with one seed; the same seed gives every arm the same weights and batches."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data = data.to(device)
    model = Net(args.width).to(device)
    if arm != "plain":
        model = pbfx.transform(model, pbfx.Config(learning=arm, seed=seed))  # pbfx

    optimizer = optim.Adadelta(model.parameters(), lr=args.lr)
    if arm == "plain":
        # As many epochs as the others have; over all of them the rate falls as far as theirs does
        # in one phase.
        gamma = args.gamma ** (args.neuron_epochs / args.epochs)
        scheduler = StepLR(optimizer, step_size=1, gamma=gamma)
        tracker = PlainTracker(model, optimizer, scheduler, epochs=args.epochs)
    else:
        scheduler = StepLR(optimizer, step_size=1, gamma=args.gamma)
        policy = pbfx.Interval(args.neuron_epochs, args.dendrite_epochs)  # pbfx
        tracker = pbfx.Tracker(  # pbfx
            model,  # pbfx
            optimizer,  # pbfx
            scheduler,  # pbfx
            policy=policy,  # pbfx
            max_dendrites=args.dendrites,  # pbfx
        )  # pbfx

    started = time.perf_counter()
    while not tracker.complete:  # pbfx
        train(model, optimizer, data.train, args.batch_size, generator)
        validation = evaluate(model, data.validation)
        step = tracker.step(validation)  # pbfx: replaces scheduler.step()
        epoch = tracker.history[-1]
        print(
            f"{arm} seed {seed}  epoch {len(tracker.history):3}  validation {validation:6.2f} %  "
            f"{epoch.phase.name.lower():8} phase  {epoch.dendrites} dendrites"
            + (f"  | {step.reason}" if getattr(step, "restructured", False) else ""),
            flush=True,
        )
    seconds = time.perf_counter() - started

    result = Result(
        arm=arm,
        seed=seed,
        error=100 - evaluate(model, data.test),
        validation=max(epoch.score for epoch in tracker.history),
        dendrites=max(epoch.dendrites for epoch in tracker.history),
        parameters=parameter_count(model),
        epochs=len(tracker.history),
        seconds=seconds,
    )
    print(
        f"result: arm={result.arm} seed={result.seed} width={args.width:g} "
        f"test_error={result.error:.2f}% parameters={result.parameters} "
        f"dendrites={result.dendrites} epochs={result.epochs} seconds={result.seconds:.1f}",
        flush=True,
    )
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; `epochs` is filled in from the phases if it was not given."""
    parser = argparse.ArgumentParser(
        description="PyTorch's MNIST example, growing dendrites while it trains.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data-dir", required=True, help="folder with MNIST's idx files")
    arms = parser.add_mutually_exclusive_group()
    arms.add_argument("--learning", choices=ARMS[1:], default="perforated", help="pbfx's mode")
    arms.add_argument("--plain", action="store_true", help="train the net without pbfx")
    arms.add_argument("--arms", metavar="A,B", help=f"several of {','.join(ARMS)}, compared")
    parser.add_argument("--width", type=positive, default=1.0, help="factor on the layers")
    parser.add_argument("--neuron-epochs", type=whole(1), default=10, help="epochs a neuron phase")
    parser.add_argument(
        "--dendrite-epochs", type=whole(1), default=4, help="epochs a dendrite phase"
    )
    parser.add_argument("--dendrites", type=whole(1), default=3, help="dendrites to grow")
    parser.add_argument(
        "--epochs", type=whole(1), help="epochs of a plain run (None: as the others)"
    )
    parser.add_argument("--batch-size", type=whole(1), default=64, help="images a step")
    parser.add_argument("--lr", type=positive, default=1.0, help="Adadelta's first rate")
    parser.add_argument("--gamma", type=positive, default=0.7, help="the rate's factor an epoch")
    parser.add_argument("--seed", type=whole(0), default=0, help="first seed")
    parser.add_argument("--seeds", type=whole(1), default=1, help="seeds for each arm")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--jobs", type=whole(1), default=1, help="runs at a time")
    parser.add_argument("--json", metavar="PATH", help="write the results here")
    args = parser.parse_args(argv)
    args.arms = args.arms.split(",") if args.arms else ["plain" if args.plain else args.learning]
    unknown = [arm for arm in args.arms if arm not in ARMS]
    if unknown:
        parser.error(f"--arms: unknown {', '.join(unknown)}; valid: {', '.join(ARMS)}")
    if int(32 * args.width) < 1:
        parser.error(f"--width {args.width:g} leaves conv1 no channel; the least is 0.03125")
    if args.epochs is None:
        grown = args.dendrites * (args.neuron_epochs + args.dendrite_epochs)
        args.epochs = grown + args.neuron_epochs
    return args


def main(argv: list[str] | None = None) -> int:
    """Run every arm with every seed, then compare them."""
    args = parse(argv)
    try:
        data, device = load_mnist(args.data_dir), choose_device(args.device)
    except pbfx.PbfxError as error:
        print(error, file=sys.stderr)
        return 2
    seeds = range(args.seed, args.seed + args.seeds)
    # Seed by seed, so that an interrupted comparison has whole pairs.
    runs = [(arm, seed, data, device, args) for seed in seeds for arm in args.arms]
    if args.jobs == 1:
        results = [fit(*run) for run in runs]
    else:
        # A net this small leaves a GPU idle most of the time; several runs share it.
        with get_context("spawn").Pool(args.jobs) as pool:
            results = pool.starmap(fit, runs, chunksize=1)
    results.sort(key=lambda result: args.arms.index(result.arm))
    print()
    print_summary(summarise(results), sys.stdout, title=f"mnist, width {args.width:g}, test split")
    if args.json:
        report = {
            "arguments": vars(args),
            "versions": versions(),
            "runs": [asdict(result) for result in results],
        }
        write_atomically(Path(args.json), (json.dumps(report, indent=2) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
