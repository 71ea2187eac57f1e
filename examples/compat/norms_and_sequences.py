"""A 3.x script on which `perforatedai` stops in a debugger: batch norms, and 3-D linear outputs.

    python -m pbfx.compat examples/compat/norms_and_sequences.py

It makes its own optimizer and steps its own scheduler, groups nothing and declares no dimensions:
the norm after a layer and the axis of its neurons are found in the graph.
"""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from perforatedai import globals_perforatedai as GPA
from perforatedai import utils_perforatedai as UPA


class Net(nn.Module):
    """Classify sequences (batch, 12 steps, 5 features)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 16)
        self.mix = nn.Conv1d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)
        self.step = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        # (batch, steps, features): a linear layer on three axes.
        x = torch.tanh(self.embed(x))
        x = F.relu(self.norm(self.mix(x.transpose(1, 2))))
        x = torch.tanh(self.step(x.transpose(1, 2)))
        return self.head(x.mean(1))


def make_data(count, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 12, 5, generator=draw)
    trend = (x[:, 6:, 0] * x[:, :6, 1]).sum(1)
    return x, torch.bucketize(trend, torch.tensor([-1.0, 1.0]))


def make_optimizer(model, args):
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    GPA.pai_tracker.set_optimizer_instance(optimizer)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 10, gamma=0.5)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--dendrites", type=int, default=2)
    parser.add_argument("--patience", type=int, default=3)
    parser.add_argument("--save-name", default="PAI")
    parser.add_argument("--loss", action="store_true", help="score by the loss: smaller is better")
    args = parser.parse_args()
    torch.manual_seed(0)
    (x, y), (x_valid, y_valid), (x_test, y_test) = (
        make_data(count, seed) for seed, count in enumerate((256, 128, 128))
    )

    GPA.pc.set_testing_dendrite_capacity(False)
    GPA.pc.set_n_epochs_to_switch(args.patience)
    GPA.pc.set_max_dendrites(args.dendrites)
    GPA.pc.set_improvement_threshold([0.01, 0.001, 0.0001])
    GPA.pc.set_pai_forward_function(torch.tanh)
    GPA.pc.append_module_ids_to_track([".head"])
    model = UPA.perforate_model(Net(), save_name=args.save_name, maximizing_score=not args.loss)
    optimizer, scheduler = make_optimizer(model, args)

    while True:
        model.train()
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        scheduler.step()
        model.eval()
        with torch.no_grad():
            output = model(x_valid)
            loss = F.cross_entropy(output, y_valid).item()
            accuracy = (output.argmax(1) == y_valid).float().mean().item()
            tested = (model(x_test).argmax(1) == y_test).float().mean().item()
        GPA.pai_tracker.add_extra_score(loss, "validation loss")
        GPA.pai_tracker.add_test_score(tested, "test accuracy")
        score = loss if args.loss else accuracy
        model, restructured, training_complete = GPA.pai_tracker.add_validation_score(score, model)
        if training_complete:
            break
        if restructured:
            optimizer, scheduler = make_optimizer(model, args)


if __name__ == "__main__":
    main()
