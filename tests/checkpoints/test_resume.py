"""Stop after any epoch, in either phase, and continue: bit for bit the uninterrupted run."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pbfx
from checkpoints import continued
from checkpoints.continued import KINDS, Run
from learning.loops import Cnn, copied, equal, same
from pbfx import Phase


def check(found: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    for part in wanted:
        assert equal(found[part], wanted[part]), f"{where}: {part} differs"


def uninterrupted(kind: str, folder: Path) -> tuple[Run, dict[str, Any]]:
    """Run to the end; save after every epoch on the way, which must not disturb the run."""
    run = Run(kind)
    while not run.tracker.complete:
        run.epoch()
        number = len(run.tracker.history)
        pbfx.save(run.model, folder / f"{number:02}.safetensors", run.tracker)
    return run, run.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_after_every_epoch_and_continued(kind: str, tmp_path: Path) -> None:
    run, wanted = uninterrupted(kind, tmp_path)
    check(wanted, Run(kind).finish(), f"{kind}, saved after every epoch, against not saved at all")
    epochs = len(run.tracker.history)
    phases = {epoch.phase for epoch in run.tracker.history}
    assert phases == ({Phase.NEURON} if kind == "gradient" else set(Phase))
    assert max(epoch.dendrites for epoch in run.tracker.history) >= 1
    for path in sorted(tmp_path.iterdir()):
        other = Run(kind)
        # A process that has drawn other numbers in between.
        torch.rand(7)
        assert pbfx.load(path, other.model, other.tracker) is other.model
        check(other.finish(), wanted, f"{kind}, stopped after epoch {path.stem} of {epochs}")


def test_rolled_back_runs_do_roll_back(tmp_path: Path) -> None:
    """So that the test above says what it should."""
    run, _ = uninterrupted("rolled back", tmp_path)
    assert "retry" in {str(epoch.action) for epoch in run.tracker.history}


def test_continued_in_another_process(tmp_path: Path) -> None:
    _, wanted = uninterrupted("momentum", tmp_path)
    script, root = Path(continued.__file__), Path(pbfx.__file__).parents[1]
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), "momentum", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = sorted(tmp_path.glob("*.pt"))
    assert len(results) == len(wanted["history"])
    for path in results:
        check(torch.load(path), wanted, f"another process, after epoch {path.stem}")


@pytest.mark.parametrize("stop", [1, 3, 5, 7])
def test_state_dicts_through_torch_save(tmp_path: Path, stop: int) -> None:
    """Without a file of ours: both state dicts are plain data, which a safe unpickler reads."""
    first = Run("momentum")
    for _ in range(stop):
        first.epoch()
    state = {
        "model": first.model.state_dict(),
        "tracker": first.tracker.state_dict(),
        "stream": torch.get_rng_state(),
    }
    torch.save(state, tmp_path / "state.pt")
    wanted = first.finish()
    second = Run("momentum")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.model.load_state_dict(state["model"])
    second.tracker.load_state_dict(state["tracker"])
    torch.set_rng_state(state["stream"])
    kept = copied(state["model"])
    check(second.finish(), wanted, f"after epoch {stop}")
    # What was loaded from is not what is trained.
    assert same(kept, state["model"])


def test_a_tracker_can_go_back_in_its_own_time(tmp_path: Path) -> None:
    """Into the same live objects, from any epoch to any other."""
    run, wanted = uninterrupted("momentum", tmp_path)
    for path in sorted(tmp_path.iterdir(), reverse=True)[::2]:
        pbfx.load(path, run.model, run.tracker)
        check(run.finish(), wanted, f"back to epoch {path.stem}")


def test_the_directory_of_a_tracker_resumes_the_run(tmp_path: Path) -> None:
    wanted = Run("momentum").finish()
    folder = tmp_path / "new" / "run"
    for stop in range(1, len(wanted["history"]) + 1):
        run = Run("momentum", folder)
        if stop > 1:
            pbfx.load(folder / "last.safetensors", run.model, run.tracker)
        # One epoch per process.
        run.epoch()
        names = ["best.safetensors", "history.csv", "last.safetensors"]
        names += ["sites.csv"] * any(epoch.sites for epoch in run.tracker.history)
        assert sorted(os.listdir(folder)) == names
        with open(folder / "history.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["number"]) for row in rows] == list(range(1, stop + 1))
    check(run.finish(), wanted, "one epoch at a time")
    assert rows[-1]["action"] == "complete"
    assert float(rows[0]["score"]) == wanted["history"][0]["score"]
    assert rows[2]["phase"] == "dendrite"
    assert rows[2]["candidate_score"] != ""
    assert rows[0]["candidate_score"] == ""
    assert float(rows[1]["learning_rates"]) == pytest.approx(0.0375)


def test_best_is_the_network_of_the_best_epoch_so_far(tmp_path: Path) -> None:
    """Even when that epoch is the one that a growth follows."""
    run = Run("momentum", tmp_path)
    best = None
    while not run.tracker.complete:
        run.model.train()
        run.epoch()
        last = run.tracker.history[-1]
        loaded = pbfx.load(tmp_path / "best.safetensors", Cnn())
        assert loaded.perforation.phase is Phase.NEURON
        found = run.task.score(loaded)
        if last.improved:
            best = last
        assert found == pytest.approx(best.score, rel=1e-5)
        assert loaded.structure().dendrites == best.dendrites
    grown = [e for e in run.tracker.history if e.improved and str(e.action) == "grow"]
    assert grown, "no epoch was the best and followed by a growth: nothing was tested"


def test_the_random_stream_is_restored_on_request_only(tmp_path: Path) -> None:
    run = Run("momentum")
    run.epoch()
    saved = torch.get_rng_state()
    pbfx.save(run.model, tmp_path / "m", run.tracker)
    for restore in (False, True):
        other = Run("momentum")
        torch.manual_seed(77)
        before = torch.get_rng_state()
        pbfx.load(tmp_path / "m", other.model, other.tracker, restore_rng=restore)
        assert torch.equal(torch.get_rng_state(), saved if restore else before)
