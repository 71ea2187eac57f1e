"""Tables, plots and docs/results.md from the rows of learning studies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.errors import UsageError
from benchmarks.learning import publish, rows, summary
from benchmarks.learning.arms import arm_named, sham_of
from benchmarks.learning.command import main
from benchmarks.learning.plots import draw_all, growths
from benchmarks.learning.run import Outcome, Stage
from benchmarks.learning.studies import STUDIES
from benchmarks.learning.task import Task
from pbfx.demo.statistics import compare

WHERE = {"utc": "2026-01-01T00:00:00Z", "revision": "abc", "torch": "2", "triton": "3"} | {
    "device": "GPU"
}


def stage(dendrites: int, error: float, parameters: int, correlation: float = 0.1) -> Stage:
    growth = {"candidate_score": correlation} if dendrites else None
    return Stage(
        dendrites=dendrites,
        parameters=parameters,
        epochs=10 + 14 * dendrites,
        best_epoch=3,
        validation_error=error,
        validation_loss=error / 10,
        train_loss=0.1,
        test_error=error,
        test_loss=error / 20,
        phase_error=error,
        phase_loss=error / 10,
        phase_train_loss=0.1,
        growth=growth,
    )


def written(
    folder: Path, study: str, arm: str, seed: int, stages: list[Stage], width: float = 1.0
) -> None:
    limit = 3 if study == "compression" else 2
    job = Task(study, arm_named(arm, STUDIES[study].selections), width, seed, 10, 4, limit)
    outcome = Outcome(tuple(stages), tuple(s.test_error for s in stages), 12.0)
    rows.append(folder / f"{study}.csv", rows.encode(job, outcome, 4, WHERE))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, luck in enumerate((-0.02, 0.0, 0.02)):
        written(tmp_path, "mnist", "plain", seed, [stage(0, 1.0 + luck, 100)])
        sham = [stage(d, 1.1 - 0.1 * d + 2 * luck, 100 * (d + 1)) for d in range(3)]
        written(tmp_path, "mnist", "sham", seed, sham)
        better = [
            stage(d, 1.1 - 0.2 * d + luck, 100 * (d + 1), 0.1 / d if d else 0) for d in (0, 1, 2)
        ]
        written(tmp_path, "mnist", "perforated", seed, better)
        written(tmp_path, "mnist", "wider2", seed, [stage(0, 0.8 + luck, 310)])
        written(tmp_path, "compression", "plain", seed, [stage(0, 1.0 + luck, 1000)])
        written(tmp_path, "compression", "plain", seed, [stage(0, 2.0 + luck, 300)], 0.5)
        small = [stage(0, 2.1 + luck, 300), stage(1, 0.9 + luck, 400), stage(2, 0.95, 500)]
        written(tmp_path, "compression", "perforated", seed, small, 0.5)
    return tmp_path


def test_rows_come_back(folder: Path) -> None:
    found = rows.read(folder / "mnist.csv")
    assert len(found) == 12
    assert found[2].stages[1] == stage(1, 0.88, 200)
    assert found[2].gpu_seconds == 3.0
    assert json.loads(found[2].cells["description"])["mode"] == "perforated"


def test_lines_are_paired_by_seed(folder: Path) -> None:
    [table] = summary.tables_of(rows.read(folder / "mnist.csv"))
    own, sham = (table.find(arm, 1.0, 2) for arm in ("perforated", "sham"))
    assert own is not None
    assert sham is not None
    wanted = compare([0.68, 0.70, 0.72], [0.86, 0.90, 0.94])
    found = own.against(sham)
    assert found is not None
    assert found.difference.mean == pytest.approx(wanted.difference.mean)
    assert found.difference.low == pytest.approx(wanted.difference.low)
    assert found.relative == pytest.approx(-0.2 / 0.9)


def test_markdown_says_what_was_found(folder: Path) -> None:
    text = publish.block_of("mnist", rows.read(folder / "mnist.csv"))
    lines = [line for line in text.splitlines() if line.startswith("| perforated |")]
    assert [line.split(" | ")[1:3] for line in lines] == [["1", "200"], ["2", "300"]]
    # Every pair differs by 0.3 exactly, so the interval is narrow and zero is outside.
    assert "**-0.300 [-0.300, -0.300] (-30 %)**" in lines[1]
    assert "(-22 %)" in lines[1]
    assert "(-13 %)" in lines[1]
    assert "| perforated, first phase | 0 | 100 |" in text
    assert "sham, first phase" not in text


def test_the_front_and_the_smallest_net(folder: Path) -> None:
    text = publish.block_of("compression", rows.read(folder / "compression.csv"))
    assert "perforated at width 0.5 with 1 dendrites, 60.0 % smaller" in text
    assert "| **perforated** | 0.5 | 1 | 400 | -60.0 % |" in text
    assert "| perforated | 0.5 | 2 |" in text
    # Its first phase is no net of its own, and the whole plain net is beaten by a smaller one.
    assert "| 0.5 | 0 | 300 | -70.0 % | 2.000" in text
    assert "2.100" not in text
    assert "| plain | 1 | 0 |" in text


def test_protocols_are_not_mixed(folder: Path) -> None:
    job = Task("mnist", arm_named("plain", {}), 1.0, 0, 5, 4, 2)
    outcome = Outcome((stage(0, 9.0, 100),), (9.0,), 1.0)
    rows.append(folder / "mnist.csv", rows.encode(job, outcome, 1, WHERE))
    tables = summary.tables_of(rows.read(folder / "mnist.csv"))
    assert [len(table.lines) for table in tables] == [8, 1]


def test_studies_share_the_runs_that_they_have_in_common(folder: Path, capsys) -> None:
    found = publish.all_rows(folder)
    # Of another protocol than compression's.
    assert {row.study for row in summary.rows_of("compression", found)} == {"compression"}
    assert len(summary.rows_of("compression", found)) == 9
    job = Task("mnist", arm_named("perforated", {}), 0.25, 0, 10, 4, 3)
    outcome = Outcome((stage(0, 3.0, 90), stage(1, 2.5, 180)), (9.0,), 1.0)
    rows.append(folder / "mnist.csv", rows.encode(job, outcome, 1, WHERE))
    found = publish.all_rows(folder)
    assert len(summary.rows_of("compression", found)) == 10
    assert "| **perforated** | 0.25 | 1 | 180 |" in publish.block_of("compression", found)
    command = ["compression", "--seeds", "1", "--widths", "0.25", "--arms", "perforated"]
    command += ["--neuron-epochs", "10", "--dendrites", "3"]
    assert main([*command, "--dry-run", "--out", str(folder)]) == 0
    assert "1 runs, 1 done" in capsys.readouterr().out


def test_ablations_have_their_default_and_their_sham_beside_them(folder: Path) -> None:
    for seed, luck in enumerate((-0.02, 0.0, 0.02)):
        for arm, error in (
            ("perforated[tuning=full]", 0.6),
            ("perforated[finish=True,tuning=full]", 0.5),
            ("sham[finish=True]", 0.8),
        ):
            written(folder, "ablations", arm, seed, [stage(2, error + luck, 300)])
    found = publish.all_rows(folder)
    lines = {
        cells[1].strip(): cells
        for line in publish.block_of("ablations", found).splitlines()
        if len(cells := line.split("|")) > 7
    }
    assert list(lines)[2:] == [
        "sham",
        "perforated",
        "perforated[tuning=full]",
        "perforated[finish=True,tuning=full]",
        "sham[finish=True]",
    ]
    # Those of the study above end at 0.7 and 0.9.
    assert "-0.100" in lines["perforated[tuning=full]"][4]
    assert "-0.300" in lines["perforated[tuning=full]"][5]
    assert "-0.300" in lines["perforated[finish=True,tuning=full]"][5]
    assert lines["perforated"][4].strip() == lines["sham"][5].strip() == ""
    assert {path.name for path in draw_all(found, folder)} >= {"ablations.svg"}


@pytest.mark.parametrize(
    ("arm", "sham"),
    [
        ("perforated", "sham"),
        ("perforated[candidates=8,tuning=full]", "sham"),
        ("gradient[finish=True]", "sham[finish=True]"),
        (
            "perforated[objective=correlation,policy.dendrite_epochs=2,spare=0.2]",
            "sham[policy.dendrite_epochs=2,spare=0.2]",
        ),
        ("perforated[max_dendrites=5,trial.groups=4]", "sham[max_dendrites=5]"),
        ("perforated[trial.line_search=links]", "sham"),
        ("perforated[trial.line_search=both]", "sham[trial.line_search=soma]"),
    ],
)
def test_a_sham_has_what_is_not_about_dendrites(arm: str, sham: str) -> None:
    assert sham_of(arm_named(arm, {})) == sham


def test_calibration_pairs_growths_with_the_sham(folder: Path) -> None:
    found = growths(rows.read(folder / "mnist.csv"))
    assert len(found) == 6
    assert found[0].predicted == 0.1
    gain = (1 - 0.88 / 1.08) - (1 - 0.96 / 1.06)
    assert found[0].realised == pytest.approx(gain, rel=1e-3)


def test_plots_are_the_same_bytes_again(folder: Path, capsys) -> None:
    assert main(["plots", "--out", str(folder)]) == 0
    assert "mnist.svg" in capsys.readouterr().out
    found = publish.all_rows(folder)
    first = {path: path.read_bytes() for path in draw_all(found, folder)}
    assert {path.name for path in first} == {"mnist.svg", "compression.svg", "calibration.svg"}
    assert all(path.read_bytes() == first[path] for path in draw_all(found, folder))


def test_summary_prints(folder: Path, capsys) -> None:
    assert main(["summary", "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "## mnist" in said
    assert "| mnist | 12 | 36 | GPU | 2 | abc |" in said
    assert main(["summary", "mnist", "--out", str(folder)]) == 2
    assert main(["summary", "--out", str(folder / "none")]) == 2


def test_a_page_keeps_its_words(folder: Path) -> None:
    page = (
        "one\n<!-- table: mnist -->\nold\n<!-- end -->\ntwo\n<!-- table: adult -->\n<!-- end -->\n"
    )
    found = publish.all_rows(folder)
    filled = publish.fill(page, found)
    assert filled.startswith("one\n<!-- table: mnist -->\n\n_10 epochs")
    assert "old" not in filled
    assert filled.endswith("\n<!-- table: adult -->\n\n_Not run yet._\n\n<!-- end -->\n")
    assert publish.fill(filled, found) == filled
    with pytest.raises(UsageError, match="'minst'"):
        publish.fill("<!-- table: minst -->\n<!-- end -->", found)


def test_the_committed_page_is_made_from_the_committed_rows() -> None:
    page = publish.PAGE.read_text(encoding="utf-8")
    made = publish.fill(page, publish.all_rows(rows.RESULTS))
    assert made == page, "run: python -m benchmarks learning summary"
