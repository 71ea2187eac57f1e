"""Scripts written for `perforatedai` run: with one line changed, and with none."""

from __future__ import annotations

import csv
import importlib
import logging
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pbfx
from pbfx.compat.provide import MODULES, provide

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "compat"
TUTORIAL, SEQUENCES = "mnist_tutorial.py", "norms_and_sequences.py"
QUICK = ("--real", "--quick", "--batch-size", "16", "--save-name", "R")

pytestmark = pytest.mark.usefixtures("script")


def run_with_the_import_changed(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *args: str
) -> None:
    """Change the import and nothing else, and run the script in this process."""
    text = (SCRIPTS / name).read_text(encoding="utf-8")
    changed = text.replace("from perforatedai import", "from pbfx.compat import")
    assert len(re.findall(r"^from pbfx\.compat import", changed, re.MULTILINE)) in (2, 3)
    copy = folder / name
    copy.write_text(changed, encoding="utf-8")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", [str(copy), *args])
    runpy.run_path(str(copy), run_name="__main__")


def run_unmodified(name: str, folder: Path, *args: str) -> str:
    """Run the script through `python -m pbfx.compat`, and return what it told."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pbfx.compat", str(SCRIPTS / name), *args],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr


def column(table: Path, name: str) -> list[str]:
    with open(table, newline="", encoding="utf-8") as file:
        return [row[name] for row in csv.DictReader(file)]


def parameters(dendrites: int) -> int:
    """Return how many the example's net has; 234 neurons link to each dendrite and among them."""
    links = dendrites * (dendrites + 1) // 2
    return 1_199_882 * (dendrites + 1) + 234 * links


def check_capacity(told: str, folder: Path) -> None:
    assert "added 3 dendrites to every neuron (1199882 to 4800932 parameters)" in told
    assert "set testingDendriteCapacity to False for the real run" in told
    # Each set takes a score to begin and a score to end; the last one says that all is well.
    assert len(column(folder / "PBScores.csv", "Validation Scores")) == 7
    counts = [int(count) for count in column(folder / "PBparam_counts.csv", "Param Count")]
    assert sorted(set(counts)) == [parameters(dendrites) for dendrites in range(4)]
    assert (folder / "PB.png").exists()
    assert (folder / "best.safetensors").exists()


def check_real_run(told: str, folder: Path) -> None:
    assert "training is complete" in told
    assert "testingDendriteCapacity" not in told
    scores = [float(score) for score in column(folder / "RScores.csv", "Validation Scores")]
    # Ten digits: chance is 10.
    assert max(scores) > 30
    # Both phases ran, each epoch in one of them.
    neuron, dendrite = (
        [bool(seconds) for seconds in column(folder / "RTimes.csv", f"{phase} Epoch Times")]
        for phase in ("Normal", "PAI")
    )
    assert any(neuron)
    assert any(dendrite)
    assert dendrite == [not ran for ran in neuron]


def test_the_tutorial_runs_with_only_its_import_changed(
    script: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, "pbfx.compat"):
        # Of --quick only the saves that it leaves out matter to this run.
        run_with_the_import_changed(TUTORIAL, script, monkeypatch, "--quick")
    check_capacity(caplog.text, script / "PB")
    caplog.clear()
    with caplog.at_level(logging.INFO, "pbfx.compat"):
        run_with_the_import_changed(TUTORIAL, script, monkeypatch, *QUICK)
    check_real_run(caplog.text, script / "R")


def test_the_tutorial_runs_unmodified(script: Path):
    check_capacity(run_unmodified(TUTORIAL, script), script / "PB")
    told = run_unmodified(TUTORIAL, script, *QUICK)
    check_real_run(told, script / "R")


def check_sequences(told: str, folder: Path) -> None:
    assert "training is complete" in told
    assert "learning='gradient'" in told
    counts = column(folder / "PAI_best_arch_scores.csv", "Param Counts")
    assert len(counts) > 1
    assert column(folder / "PAIScores.csv", "validation loss")[-1]
    assert column(folder / "PAI_best_arch_scores.csv", "test accuracy")[0]


def test_norms_and_3d_outputs_run_unmodified(script: Path):
    told = run_unmodified(SEQUENCES, script, "--dendrites", "1", "--patience", "2")
    check_sequences(told, script / "PAI")


def test_norms_and_3d_outputs_run_by_their_loss(
    script: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, "pbfx.compat"):
        run_with_the_import_changed(
            SEQUENCES, script, monkeypatch, "--loss", "--dendrites", "1", "--patience", "2"
        )
    check_sequences(caplog.text, script / "PAI")


@pytest.fixture
def _provided():
    """Take the names back when the test is over."""
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "perforatedai"]:
        del sys.modules[name]


@pytest.mark.usefixtures("_provided")
def test_the_names_are_those_of_pbfx_in_this_process():
    package = provide()
    assert provide() is package
    for name in MODULES:
        ours = importlib.import_module(f"pbfx.compat.{name}")
        assert importlib.import_module(f"perforatedai.{name}") is ours
        assert getattr(package, name) is ours
    with pytest.raises(ImportError, match="network_perforatedai"):
        importlib.import_module("perforatedai.network_perforatedai")


@pytest.mark.usefixtures("_provided")
def test_ours_win_over_an_installed_package_and_say_so(
    script: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (script / "perforatedai.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(str(script))
    importlib.invalidate_caches()
    provide()
    provide()
    assert caplog.text.count("perforatedai is installed here") == 1
    from perforatedai import globals_perforatedai as GPA

    assert GPA.pc.get_max_dendrites() == 100


def test_a_missing_script_is_said_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "pbfx.compat", "nowhere.py"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "there is no file nowhere.py" in done.stderr


def test_the_page_ends_in_a_script_that_runs(script: Path):
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "while" in block
    )
    x = torch.randn(32, 4)
    y = (x[:, 0] > 0).long()

    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 2), nn.LogSoftmax(1))

    names = {
        "Net": Net,
        "device": torch.device("cpu"),
        "train_loader": [(x, y)],
        "validate": lambda model: (model(x).argmax(1) == y).float().mean(),
    }
    exec(code, names)
    assert isinstance(names["tracker"], pbfx.Tracker)
    assert names["tracker"].complete
    assert (script / "run" / "history.csv").exists()


OURS = re.compile(r"^\s*(?:from|import) (pbfx[\w.]*)", re.MULTILINE)


def test_what_runs_scripts_is_built_on_the_public_api():
    readers = {"rival_files.py", "rival_layout.py", "decisions.py"}
    for path in (ROOT / "pbfx" / "compat").glob("*.py"):
        if path.name not in readers:
            for name in OURS.findall(path.read_text(encoding="utf-8")):
                assert name == "pbfx" or name.startswith("pbfx.compat"), f"{path.name}: {name}"


def test_the_import_is_lean():
    probe = (
        "import sys; from pbfx.compat import pb_globals, pb_utils, pb_models, "
        "globals_perforatedai, utils_perforatedai; "
        "sys.exit(any(name in sys.modules for name in ('matplotlib', 'triton', 'torch._dynamo')))"
    )
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    subprocess.run(
        [sys.executable, "-c", probe],
        env=os.environ | {"PYTHONPATH": paths},
        check=True,
        timeout=120,
    )
