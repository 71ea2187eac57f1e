"""The PyTorch MNIST example with the five steps of the dendrite tutorial of 2025 applied to it.

    python -m pbfx.compat examples/compat/mnist_tutorial.py           # the first run: a smoke test
    python -m pbfx.compat examples/compat/mnist_tutorial.py --real    # the second: the experiment

It is written for `perforatedai` and runs on pbfx unmodified, as above, or by itself once the import
below says `pbfx.compat` in place of `perforatedai`. Nothing but the data set differs from the
article: `local_data` needs no download.
"""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from local_data import MNIST
from perforatedai import pb_globals as PBG
from perforatedai import pb_models as PBM  # noqa: F401  # the article imports it
from perforatedai import pb_utils as PBU
from torch.optim.lr_scheduler import StepLR


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        x = self.fc2(self.dropout2(x))
        return F.log_softmax(x, dim=1)


def train(args, model, device, train_loader, optimizer, epoch):
    model.train()
    correct = 0
    for data, target in train_loader:
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = model(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        correct += output.argmax(1).eq(target).sum().item()
    PBG.pbTracker.addExtraScore(100.0 * correct / len(train_loader.dataset), "Train")


def test(model, device, test_loader, optimizer, scheduler, args):
    model.eval()
    correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            data, target = data.to(device), target.to(device)
            correct += model(data).argmax(1).eq(target).sum().item()
    score = 100.0 * correct / len(test_loader.dataset)

    # Step 4: the score goes to the tracker, which may change the model.
    model, restructured, trainingComplete = PBG.pbTracker.addValidationScore(score, model)
    model.to(device)
    if restructured:
        optimArgs = {"params": model.parameters(), "lr": args.lr}
        schedArgs = {"step_size": 1, "gamma": args.gamma}
        optimizer, scheduler = PBG.pbTracker.setupOptimizer(model, optimArgs, schedArgs)
    return model, optimizer, scheduler, trainingComplete


def main():
    parser = argparse.ArgumentParser(description="PyTorch MNIST example with dendrites")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--test-batch-size", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=10_000)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--gamma", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", default="../data", help="folder of MNIST's idx files, if any")
    parser.add_argument("--save-name", default="PB")
    parser.add_argument("--real", action="store_true", help="step 5: the smoke test is over")
    parser.add_argument("--quick", action="store_true", help="one dendrite, short phases")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader = torch.utils.data.DataLoader(
        MNIST(args.data, train=True), batch_size=args.batch_size, shuffle=True
    )
    test_loader = torch.utils.data.DataLoader(
        MNIST(args.data, train=False), batch_size=args.test_batch_size
    )

    # Step 1: the first run tests whether the dendrites fit; the second trains.
    if args.real:
        PBG.testingDendriteCapacity = False
    if args.quick:
        PBG.nEpochsToSwitch = 1
        PBG.pEpochsToSwitch = 1
        PBG.maxDendrites = 1
        PBG.maxDendriteTries = 1
        PBG.testSaves = False

    # Step 2: convert.
    model = Net().to(device)
    model = PBU.initializePB(model, saveName=args.save_name)

    # Step 3: the tracker makes optimizer and scheduler; no scheduler.step() below.
    PBG.pbTracker.setOptimizer(optim.Adadelta)
    PBG.pbTracker.setScheduler(StepLR)
    optimArgs = {"params": model.parameters(), "lr": args.lr}
    schedArgs = {"step_size": 1, "gamma": args.gamma}
    optimizer, scheduler = PBG.pbTracker.setupOptimizer(model, optimArgs, schedArgs)

    for epoch in range(1, args.epochs + 1):
        train(args, model, device, train_loader, optimizer, epoch)
        model, optimizer, scheduler, trainingComplete = test(
            model, device, test_loader, optimizer, scheduler, args
        )
        if trainingComplete:
            break


if __name__ == "__main__":
    main()
