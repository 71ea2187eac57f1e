"""The console: help, versions, exit codes, and one small study from end to end."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pbfx
from pbfx.cli import main
from pbfx.demo import command, study
from pbfx.demo.arms import ARMS, PLAIN, PlainTracker, begin
from pbfx.demo.data import Digits, Split, load_digits
from pbfx.demo.recipes import RECIPES
from pbfx.demo.settings import DEFAULTS, Settings
from pbfx.demo.study import EpochRow, accuracy, run_arm, run_study, shuffled

SMALL = Settings(seeds=1, neuron_epochs=2, dendrite_epochs=1, dendrites=1, width=1.0, batch_size=64)
SMALL_OPTIONS = [
    "--seeds=1",
    "--neuron-epochs=1",
    "--dendrite-epochs=1",
    "--dendrites=2",
    "--batch-size=128",
]


@pytest.fixture(scope="module")
def digits() -> Digits:
    whole = load_digits()
    few = (
        Split(s.images[:200], s.labels[:200]) for s in (whole.train, whole.validation, whole.test)
    )
    return Digits("digits", *few)


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_help_names_the_default_of_every_number(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"(digits {DEFAULTS['digits'].seeds}, mnist {DEFAULTS['mnist'].seeds})" in text


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"pbfx {pbfx.__version__}\n"


def test_no_command_prints_help_and_fails(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert "usage: pbfx" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option",
    ["--seeds=0", "--neuron-epochs=x", "--width=0", "--width=inf", "--seed=-1", "--data=cifar"],
)
def test_wrong_options_are_refused(option: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        main(["demo", option])
    assert done.value.code == 2
    assert option.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data=mnist"], "--data-dir DIR"),
        (["--data=mnist", "--data-dir=nowhere"], "nowhere is not a folder"),
        (["--device=toaster"], "torch knows no such device"),
        (["--device=meta"], "--device meta cannot be used"),
        (["--out=a-file"], "a-file is a file"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(
    options: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("")
    assert main(["demo", *options]) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.startswith("pbfx: ")
    assert shown.count("\n") == 1


def test_missing_packages_are_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found = importlib.util.find_spec
    absent = {"rich", "sklearn"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else found(name)
    )
    assert main(["demo"]) == 2
    expected = "pbfx demo needs scikit-learn, rich: pip install 'pbfx[demo]'\n"
    assert capsys.readouterr().err == expected


def test_interruption_exits_130_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls = []

    def interrupted(*arguments: object) -> float:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.5

    monkeypatch.setattr(study, "train_epoch", interrupted)
    out = tmp_path / "out"
    assert main(["demo", *SMALL_OPTIONS, "--out", str(out)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not out.exists()


def test_console_script_imports_nothing_optional(tmp_path: Path):
    probe = "import sys, pbfx.cli; pbfx.cli.build_parser(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert not loaded & {"matplotlib", "scipy", "sklearn", "rich"}


def test_every_needed_package_is_in_the_demo_extra():
    metadata = pytest.importorskip("importlib.metadata")
    try:
        requirements = metadata.requires("pbfx") or []
    except metadata.PackageNotFoundError:
        pytest.skip("pbfx runs from its folder here, not installed")
    extra = " ".join(line for line in requirements if "demo" in line)
    # scikit-learn brings scipy.
    for package in set(command._PACKAGES.values()) - {"scipy"}:
        assert package in extra


def test_batches_are_the_same_for_every_arm_and_differ_by_seed():
    def order(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        epochs = [shuffled(100, 16, generator, torch.device("cpu")) for _ in range(2)]
        return torch.cat([torch.cat(batches) for batches in epochs])

    assert torch.equal(order(3), order(3))
    assert not torch.equal(order(3), order(4))
    assert torch.equal(order(3)[:100].sort().values, torch.arange(100))


def test_plain_tracker_keeps_the_best_weights_and_stretches_the_rate():
    net = RECIPES["digits"].net(1.0)
    model, optimizer, tracker = begin(PLAIN, net, RECIPES["digits"], SMALL, seed=0)
    assert isinstance(tracker, PlainTracker)
    first_rate = optimizer.param_groups[0]["lr"]
    scores = [0.1, 0.5, 0.9, 0.3, 0.9]
    assert len(scores) == SMALL.epochs
    for number, score in enumerate(scores):
        assert not tracker.complete
        with torch.no_grad():
            model.fc.bias.fill_(number)
        optimizer.step()
        tracker.step(score)
    assert tracker.complete
    # The first of two equal scores wins, as in pbfx's tracker.
    assert float(model.fc.bias[0].detach()) == 2
    last_rate = optimizer.param_groups[0]["lr"]
    assert last_rate == pytest.approx(first_rate * RECIPES["digits"].final_rate)
    with pytest.raises(ValueError, match="finite"):
        tracker.step(float("nan"))


def test_study_pairs_its_arms_and_leaves_the_random_streams_alone(digits: Digits):
    before = torch.get_rng_state()
    rows: list[EpochRow] = []
    runs = run_study(
        digits, RECIPES["digits"], SMALL, device=torch.device("cpu"), on_epoch=rows.append
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert [run.arm for run in runs] == [arm.name for arm in ARMS]
    assert len(rows) == 3 * SMALL.epochs
    plain, sham, dendritic = runs
    assert {run.epochs for run in runs} == {SMALL.epochs}
    # Same weights, same batches: sham and dendritic do not differ until dendrites carry weight.
    until = SMALL.neuron_epochs
    for left, right in zip(sham.history[:until], dendritic.history[:until], strict=True):
        assert left.train_loss == right.train_loss
        assert left.validation_accuracy == right.validation_accuracy
    assert plain.history[0].train_loss == sham.history[0].train_loss
    assert [row.phase for row in dendritic.history] == ["neuron"] * 2 + ["dendrite"] + [
        "neuron"
    ] * 2
    assert {row.dendrites for row in plain.history} == {0}
    assert dendritic.history[-1].dendrites == 1
    assert dendritic.candidate_scores[0] is not None


def test_a_run_repeats_itself(digits: Digits):
    first, again = (
        run_arm(ARMS[-1], 5, digits, RECIPES["digits"], SMALL, device=torch.device("cpu"))
        for _ in range(2)
    )
    assert first.test_accuracy == again.test_accuracy
    assert [r.train_loss for r in first.history] == [r.train_loss for r in again.history]


def test_accuracy_is_the_share_of_right_answers(digits: Digits):
    labels = digits.test.labels

    class Oracle(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            answers = torch.nn.functional.one_hot(labels, 10).float()
            answers[:50] = answers[:50].roll(1, dims=1)
            return answers

    assert accuracy(Oracle(), digits.test) == 0.75


def test_demo_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *SMALL_OPTIONS]) == 0
    shown = capsys.readouterr()
    assert max(map(len, shown.out.splitlines())) <= 80
    for arm in ("plain", "sham", "dendritic", "dendritic - plain", "dendritic - sham"):
        assert arm in shown.out
    assert "15/15 epochs" in shown.err
    out = tmp_path / "pbfx-demo"
    assert {path.name for path in out.iterdir()} == {"report.json", "history.csv", "plot.png"}
    report = json.loads((out / "report.json").read_text())
    assert report["command"].startswith("pbfx demo --seeds=1")
    assert report["arguments"]["dendrites"] == 2
    assert len(report["runs"]) == 3
    with (out / "history.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 15
    assert (out / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_quiet_prints_the_table_and_no_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["demo", *SMALL_OPTIONS, "--quiet", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "images train" not in shown.out
    assert "paired difference" in shown.out
