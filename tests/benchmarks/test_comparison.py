"""The comparison of training runs: what it measures, and what it refuses to report."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks import comparison, runner
from benchmarks.comparison import COLUMNS
from benchmarks.errors import GateError
from benchmarks.tutorial import NATIVE, PERFORATED, PLAIN, measure
from demo.test_demo_data import write_mnist


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    # 5,000 images are set aside to validate on.
    write_mnist(folder, train=5100)
    return folder


def options(mnist, **changed):
    standard = {"threads": 1, "seed": 0, "data_dir": str(mnist), "train": 64, "validation": 50}
    return standard | {"width": 0.1, "phase": 1, "dendrites": 1} | changed


@pytest.mark.parametrize("contender", [PLAIN, NATIVE, PERFORATED])
def test_a_run_is_timed_and_its_files_are_counted(mnist, tmp_path, monkeypatch, contender):
    monkeypatch.chdir(tmp_path)
    found = measure(contender, options(mnist, phase=2))
    epochs = [epoch["dendrites"] for epoch in found["epochs"]]
    assert [d for d in epochs if d is not None] == ([0] * 4 if contender == PLAIN else [0, 0, 1, 1])
    assert (None in epochs) == (contender == PERFORATED), "dendrite phases are not of the others"
    assert all(epoch["train"] > 0 and epoch["call"] > 0 for epoch in found["epochs"])
    # The parameters of the plain net, whoever trains it.
    assert found["parameters"] == 10_708
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert found["files"] == len(files) == (0 if contender == PLAIN else len(files))
    assert found["left_mb"] == pytest.approx(sum(path.stat().st_size for path in files) / 1e6)


def test_the_table_has_every_contender_that_is_installed(mnist, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "CONTENDERS", (PLAIN, NATIVE))
    path = tmp_path / "rows.csv"
    arguments = ["incumbent", "--data-dir", str(mnist), "--train", "64", "--validation", "50"]
    arguments += ["--width", "0.1", "--phase", "2", "--dendrites", "1", "--rounds", "1"]
    assert runner.main([*arguments, "--threads", "1", "--out", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["contender"], row["dendrites"]) for row in rows] == [
        (PLAIN, "0"),
        (NATIVE, "0"),
        (NATIVE, "1"),
    ]
    assert set(COLUMNS) <= rows[0].keys()
    assert all(float(row["epoch_s"]) > 0 for row in rows)
    assert "10708" in capsys.readouterr().out


def test_runs_that_grow_at_other_epochs_are_not_compared():
    def found(*dendrites):
        return {"epochs": [{"dendrites": d} for d in dendrites]}

    runs = {PLAIN: [found(0)], NATIVE: [found(0, 0, 1)], PERFORATED: [found(0, None, 0, 1)]}
    comparison._check(runs)
    with pytest.raises(GateError, match="pbfx perforated grew at other epochs"):
        comparison._check(runs | {PERFORATED: [found(0, None, 1, 1)]})


def test_a_contender_that_ends_without_a_result_is_named(mnist):
    with pytest.raises(GateError, match="plain ended with code 1, no result"):
        comparison._train(PLAIN, json.loads(json.dumps(options(mnist, data_dir="/nowhere"))))


@pytest.mark.parametrize(
    ("changed", "words"),
    [(["--compile"], "compares eager float32"), (["--data-dir", "nowhere"], "no such folder")],
)
def test_what_it_cannot_do_is_said(mnist, capsys, changed, words):
    assert runner.main(["incumbent", "--data-dir", str(mnist), *changed]) == 2
    assert words in capsys.readouterr().err
