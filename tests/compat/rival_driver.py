"""Drive `perforatedai` 3.2.9 in a process of its own: jobs as JSON on stdin, results as JSON.

    PYTHONPATH=.:kernels:tests python -m compat.rival_driver RESULTS < JOBS

It keeps its state in globals, reads settings that an earlier run left in its folder, opens
debuggers and exits the process on errors: each job runs in a forked child, in an empty folder,
without a terminal, and whatever goes wrong is that job's result. Written from its public documents,
from `dir()` and from what it was seen to do.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from compat.rival_nets import INPUTS, NETS

# A job takes well under a second once the package is imported.
JOB_SECONDS = 120
# So that it opens no terminal UI, asks for no confirmation and stops for no capacity test.
QUIET = {
    "testing_dendrite_capacity": False,
    "unwrapped_modules_confirmed": True,
    "weight_decay_accepted": True,
    "configuration_confirmed": True,
    "silent": True,
}


def configure(settings: dict[str, Any]) -> Any:
    """Set it up and return its globals; a switch mode is named, as in its documents."""
    from perforatedai import globals_perforatedai as theirs

    for name, value in (QUIET | settings).items():
        named = getattr(theirs.pc, value) if name == "switch_mode" else value
        getattr(theirs.pc, f"set_{name}")(named)
    return theirs


def perforate(model: nn.Module, name: str, maximize: bool = True) -> nn.Module:
    """Wrap the layers of `model`."""
    from perforatedai import utils_perforatedai as tools

    return tools.perforate_model(
        model, save_name=name, making_graphs=False, maximizing_score=maximize
    )


def add_score(theirs: Any, model: nn.Module, inputs: Any, score: float) -> tuple[Any, bool, bool]:
    """Do a training step, which growing needs to have seen, and hand in a score."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs.pai_tracker.set_optimizer_instance(optimizer)
    model.train()
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()
    model, restructured, complete = theirs.pai_tracker.add_validation_score(score, model)
    return model, bool(restructured), bool(complete)


def grow(theirs: Any, model: nn.Module, inputs: Any, dendrites: int) -> nn.Module:
    """Add dendrites, one per call; needs DOING_SWITCH_EVERY_TIME."""
    for epoch in range(dendrites):
        model, restructured, _ = add_score(theirs, model, inputs, float(epoch))
        assert restructured, f"no dendrite after epoch {epoch}"
    return model


def count(model: nn.Module) -> int:
    """Return how many dendrites each neuron has."""
    layers = {k.split(".layers.")[1].split(".")[0] for k in model.state_dict() if ".layers." in k}
    return len(layers)


def decisions(job: dict[str, Any]) -> list[list[int]]:
    """Return [restructured, complete, dendrites] after each score, until it is complete."""
    torch.manual_seed(0)
    theirs = configure({"find_best_lr": False} | job["settings"])
    model = perforate(nn.Sequential(nn.Linear(3, 2)), "decisions", job["maximize"])
    found = []
    for score in job["scores"]:
        model, restructured, complete = add_score(theirs, model, torch.randn(4, 3), score)
        found.append([int(restructured), int(complete), count(model)])
        if complete:
            break
    return found


def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter and every running statistic a value that shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
            # Norms scale by about one.
            if parameter.dim() == 1 and name.endswith(("norm.weight", ".1.weight", ".0.weight")):
                parameter.add_(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                shape = module.running_mean.shape
                module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)


def grown(job: dict[str, Any]) -> tuple[Any, nn.Module, torch.Tensor]:
    """Return its globals, the net `job["net"]` with `job["dendrites"]` dendrites, and an input."""
    torch.manual_seed(job["seed"])
    every = {"switch_mode": "DOING_SWITCH_EVERY_TIME"}
    theirs = configure(job.get("settings", {}) | every)
    activation = job.get("activation", "sigmoid")
    function = getattr(torch, activation, None) or getattr(nn.functional, activation)
    theirs.pc.set_pai_forward_function(function)
    kind = NETS[job["net"]]
    model = perforate(kind(theirs.PAISequential), job["net"])
    for name, axes in getattr(kind, "axes", {}).items():
        model.get_submodule(name).set_this_output_dimensions(axes)
    x = torch.randn(INPUTS[job["net"]])
    model = grow(theirs, model, x, job["dendrites"])
    randomise(model, job["seed"])
    return theirs, model, x


def write_files(job: dict[str, Any]) -> list[str]:
    """Let it write its files into the folder `job["folder"]`, and add what it computes there."""
    theirs, model, x = grown(job)
    model.eval()
    x.requires_grad_()
    y = model(x)
    y.square().sum().backward()
    expected = {"x": x.detach(), "y": y.detach(), "dx": x.grad}
    expected |= {
        f"grad/{name}": parameter.grad
        for name, parameter in model.named_parameters()
        if job.get("gradients") and parameter.grad is not None
    }
    # A score that beats all others has the best model saved, and no mode but this saves it alone.
    theirs.pc.set_switch_mode(theirs.pc.DOING_NO_SWITCH)
    theirs.pai_tracker.set_optimizer_instance(torch.optim.SGD(model.parameters(), lr=0.1))
    theirs.pai_tracker.add_validation_score(1e6, model)
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    names = ["best_model.pt", f"{job['net']}_config.json"]
    for name in names:
        (folder / name).write_bytes(Path(job["net"], name).read_bytes())
    save_file(expected, folder / "expected.safetensors")
    return names


JOBS = {"decisions": decisions, "files": write_files}


def _child(job: dict[str, Any], send: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, open(os.devnull) as nothing:
        os.chdir(folder)
        sys.stdin = nothing
        log = os.open("log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        warnings.simplefilter("ignore")
        try:
            send.send({"result": JOBS[job["kind"]](job)})
        # It calls sys.exit, and its debugger without a terminal ends in BdbQuit.
        except BaseException as error:
            sys.stdout.flush()
            tail = Path(folder, "log").read_text()[-400:]
            last = traceback.extract_tb(error.__traceback__)[-1].name
            send.send({"error": f"{type(error).__name__}: {error} in {last}: {tail}"})
        finally:
            os.chdir("/")


def run(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run every job in a child of its own."""
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        import perforatedai.utils_perforatedai  # noqa: F401

    fork, results = multiprocessing.get_context("fork"), []
    for job in jobs:
        receive, send = fork.Pipe(duplex=False)
        child = fork.Process(target=_child, args=(job, send))
        child.start()
        answered = receive.poll(JOB_SECONDS)
        results.append(receive.recv() if answered else {"error": "no answer in time"})
        if not answered:
            child.terminate()
        child.join()
    return results


def main() -> None:
    jobs = json.load(sys.stdin)
    Path(sys.argv[1]).write_text(json.dumps(run(jobs)))


if __name__ == "__main__":
    main()
