"""The comparison of predicted with measured gains, on a run that is too short to learn much."""

from __future__ import annotations

import csv

from benchmarks import selection
from benchmarks.environment import COLUMNS, ROOT
from benchmarks.records import RESULTS
from benchmarks.runner import main


def test_rows_of_a_short_run(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    options = ["--epochs", "2", "--candidate-epochs", "2", "--seed", "1", "--out", str(out)]
    assert main(["selection", *options]) == 0
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == (*COLUMNS, *selection.COLUMNS)
    assert [row["site"] for row in rows] == ["conv1", "conv2", "fc1", "fc2"]
    # Rows and links: 3 * (9 + 2), 4 * (27 + 2), 8 * (36 + 2), 10 * (8 + 2).
    assert [row["parameters"] for row in rows] == ["33", "116", "304", "100"]
    # Positions per sample are estimated, the best epochs of the neurons may differ in batches.
    assert [int(row["positions"]) for row in rows][2:] == [1, 1]
    assert 60 <= int(rows[0]["positions"]) <= 72
    # A fit of links and biases together cannot be worse than one of biases alone.
    assert all(float(row["gain_train"]) > -1e-3 for row in rows)
    assert max(float(row["predicted"]) for row in rows) > 0
    assert "2 epochs of candidate learning" in " ".join(capsys.readouterr().out.split())


def test_the_page_says_what_was_measured():
    page = (ROOT / "docs" / "selection.md").read_text(encoding="utf-8")
    with (RESULTS / "selection.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["seed"] for row in rows} == {"0", "1", "2"}
    table = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")][2:]
    assert len(table) == 12
    epochs = losses = ""
    for cells in table:
        first, second, site, parameters, r, predicted, alone, gain = (c.strip() for c in cells)
        epochs, losses = first or epochs, second or losses
        found = [row for row in rows if (row["epochs"], row["site"]) == (epochs, site)]
        assert len(found) == 3
        mean = {
            key: sum(float(row[key]) for row in found) / 3
            for key in ("train_loss", "validation_loss", "correlation", "predicted", "gain_train")
        }
        squares = [int(row["neurons"]) * float(row["correlation"]) ** 2 / 2 for row in found]
        assert losses == f"{mean['train_loss']:.3f} / {mean['validation_loss']:.3f}"
        assert parameters == found[0]["parameters"]
        assert r == f"{mean['correlation']:.3f}"
        assert predicted == f"{mean['predicted']:.3f}"
        assert alone == f"{sum(squares) / 3:.3f}"
        assert gain == f"{mean['gain_train']:.3f}"
