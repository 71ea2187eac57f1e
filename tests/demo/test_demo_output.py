"""What the demo shows and leaves behind: table, picture, report, history."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from pathlib import Path

import pytest
import torch

import pbfx
from pbfx import PbfxError
from pbfx.demo.plot import dendrite_spans, growths, plot_png
from pbfx.demo.report import (
    check_folder,
    history_csv,
    report_json,
    write_atomically,
)
from pbfx.demo.study import EpochRow, Run
from pbfx.demo.summary import candidate_notes, summarise
from pbfx.demo.table import print_summary
from pbfx.machine import git_revision

PHASES = ["neuron"] * 3 + ["dendrite"] * 2 + ["neuron"] * 3 + ["dendrite"] + ["neuron"] * 2
DENDRITES = [0] * 5 + [1] * 4 + [2] * 2


def made_up_run(arm: str, seed: int, *, error: float, parameters: int = 266) -> Run:
    rows = tuple(
        EpochRow(
            arm=arm,
            seed=seed,
            epoch=number + 1,
            phase="neuron" if arm == "plain" else phase,
            dendrites=0 if arm == "plain" else dendrites,
            cycle=0,
            attempt=0,
            train_loss=0.5,
            validation_accuracy=0.5 + 0.04 * number,
            improved=True,
            action="continue",
            candidate_score=0.1 * number if phase == "dendrite" and arm != "plain" else None,
            parameters=parameters,
            learning_rates="0.01",
            seconds=0.1,
            reason="epoch, of many",
        )
        for number, (phase, dendrites) in enumerate(zip(PHASES, DENDRITES, strict=True))
    )
    return Run(arm, seed, 1 - error / 100, 0.9, len(rows), parameters, len(rows), 12.3, rows)


@pytest.fixture
def runs() -> list[Run]:
    return [
        made_up_run("plain", 0, error=5.0),
        made_up_run("plain", 1, error=6.0),
        made_up_run("sham", 0, error=4.5),
        made_up_run("sham", 1, error=5.6),
        made_up_run("dendritic", 0, error=4.0, parameters=1_064),
        made_up_run("dendritic", 1, error=5.0, parameters=1_064),
    ]


def rendered(runs: list[Run], **more: object) -> str:
    file = io.StringIO()
    print_summary(summarise(runs), file, title="digits", notes=candidate_notes(runs), **more)
    return file.getvalue()


def test_table_fits_80_columns_and_holds_the_numbers(runs: list[Run]):
    text = rendered(runs)
    assert max(map(len, text.splitlines())) <= 80
    for part in (
        "plain",
        "sham",
        "95.50",
        "4.50",
        "1,064",
        "dendritic - plain",
        "-1.00",
        "-18.2 %",
    ):
        assert part in text
    assert "4.0x plain's parameters" in text
    assert "|correlation| with the error 0.40, 0.80" in text
    assert "\x1b" not in text


def test_table_fits_80_columns_with_large_numbers():
    runs = [
        made_up_run(arm, seed, error=100.0 * seed, parameters=1_234_567_890)
        for arm in ("plain", "sham", "perforated")
        for seed in (0, 1)
    ]
    assert max(map(len, rendered(runs).splitlines())) <= 80


def test_table_survives_a_terminal_without_unicode(runs: list[Run]):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    print_summary(summarise(runs), file)
    file.flush()
    assert b"+/-" in raw.getvalue()


def test_growths_and_dendrite_phases_are_read_from_the_history(runs: list[Run]):
    assert dendrite_spans(runs[-1]) == [(4, 5), (9, 9)]
    assert growths(runs[-1]) == [(6, 1), (10, 2)]
    assert dendrite_spans(runs[0]) == []
    assert runs[-1].candidate_scores == pytest.approx((0.4, 0.8))


def test_plot_is_a_png_of_its_promised_size_without_pyplot(runs: list[Run]):
    png = plot_png(runs, title="digits")
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == (1350, 750)
    assert png == plot_png(runs, title="digits")


def test_plot_takes_runs_of_different_length(runs: list[Run]):
    short = Run(**{**vars(runs[-1]), "history": runs[-1].history[:4], "seed": 2})
    assert plot_png([*runs, short], title="digits")


def test_report_is_strict_json_with_what_a_rerun_needs(runs: list[Run]):
    # One seed has no interval: NaN must not reach the file.
    single = [run for run in runs if run.seed == 0]
    content = report_json(
        single,
        summarise(single),
        command=["pbfx", "demo", "--out", "a folder"],
        arguments={"seeds": 1},
        data={"name": "digits"},
        device=torch.device("cpu"),
    )
    report = json.loads(content, parse_constant=pytest.fail)
    assert report["command"] == "pbfx demo --out 'a folder'"
    assert set(report["versions"]) == {"python", "torch", "pbfx", "git"}
    assert report["utc"].endswith("+00:00")
    assert [row["arm"] for row in report["runs"]] == ["plain", "sham", "dendritic"]
    assert report["runs"][-1]["test_error_percent"] == pytest.approx(4.0)
    assert report["runs"][-1]["candidate_scores"] == pytest.approx([0.4, 0.8])
    against_plain = report["summary"]["paired_differences"][0]
    assert against_plain["error_points"] == {
        "mean": pytest.approx(-1.0),
        "low": None,
        "high": None,
        "count": 1,
    }


def test_history_has_every_epoch_of_every_run(runs: list[Run]):
    rows = list(csv.DictReader(io.StringIO(history_csv(runs).decode())))
    assert len(rows) == len(runs) * len(PHASES)
    assert rows[-1]["arm"] == "dendritic"
    assert rows[-1]["dendrites"] == "2"
    assert rows[0]["candidate_score"] == ""
    assert rows[0]["reason"] == "epoch, of many"


def test_write_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "deep" / "report.json"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def broken(source: str, target: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"third")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_folder_is_checked_without_being_made(tmp_path: Path):
    check_folder(tmp_path / "new" / "deeper")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(PbfxError, match="is a file"):
        check_folder(tmp_path / "file" / "below")


def test_git_revision_is_a_commit_or_nothing():
    revision = git_revision(Path(pbfx.__file__))
    assert revision is None or re.fullmatch("[0-9a-f]{12,}(-dirty)?", revision)


def test_a_file_that_is_not_tracked_has_no_revision(tmp_path: Path):
    (tmp_path / "file.py").write_text("")
    assert git_revision(tmp_path / "file.py") is None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
