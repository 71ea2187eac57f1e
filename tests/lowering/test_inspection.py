"""What pbfx did to a model can be read: in logs, in traces, in records, in `explain`."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pbfx
from models import CASES, randomise
from pbfx.cli import main
from pbfx.pipeline import LOWERING, PassRecord, sum_records

SCRIPT = """
import torch, sys
import pbfx
model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
pbfx.lower(pbfx.grow(pbfx.transform(model)))
assert "torch._dynamo" not in sys.modules
"""


def grown() -> nn.Module:
    model = pbfx.transform(CASES["convolutional"].build())
    randomise(pbfx.grow(model, 2))
    return model


def test_the_log_says_what_was_lowered(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, "pbfx"):
        pbfx.lower(grown())
    said = [(r.levelname, r.getMessage()) for r in caplog.records if r.name.startswith("pbfx.")]
    summary = "lowered Convolutional: 13 nodes; rewrites: 3 by fuse_neurons, 2 by hold_eval"
    assert ("INFO", summary) in said
    fused = [text for level, text in said if level == "DEBUG" and text.startswith("fuse_neurons")]
    assert fused[-1].endswith("+3 Neurons -2 Conv2d -1 BatchNorm2d -1 Linear")


def test_torch_logs_and_torch_trace(tmp_path: Path):
    """TORCH_LOGS takes pbfx's loggers, and TORCH_TRACE its artefacts, without Dynamo."""
    environment = os.environ | {
        "TORCH_LOGS": "+pbfx",
        "TORCH_TRACE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pbfx/pipeline.py" in done.stderr
    assert "insert_dendrites: 1 rewrites" in done.stderr
    assert "+1 Neurons -1 Linear -1 BatchNorm1d" in done.stderr
    (log,) = tmp_path.iterdir()
    names, payloads = [], []
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith("\t"):
            payloads[-1] += line[1:] + "\n"
        elif '"artifact"' in line:
            record = json.loads(line[line.index("{") :])
            names.append(record["artifact"]["name"])
            payloads.append("")
    ours = [(n, p) for n, p in zip(names, payloads, strict=True) if n.startswith("pbfx_")]
    assert [name for name, _ in ours[-2:]] == ["pbfx_passes", "pbfx_graph"]
    passes = json.loads(ours[-2][1])
    assert [record["name"] for record in passes] == [p.__name__ for p in LOWERING]
    assert passes[1]["added"] == {"Neurons": 1}
    assert "neurons" in ours[-1][1]


def test_records_of_several_graphs_are_added_up():
    one = PassRecord("fuse", 2, {"Neurons": 2}, {"Linear": 2}, 0.25)
    other = PassRecord("fuse", 1, {"Linear": 2, "view": 1}, {"Neurons": 1}, 0.5)
    together = sum_records([one, other])
    assert together == PassRecord("fuse", 3, {"Neurons": 1, "view": 1}, {}, 0.75)
    assert together.diff() == "+1 Neurons +1 view"


def test_explain_says_what_lowering_does():
    model = grown()
    state, code = dict(model.state_dict()), model.code
    explanation = pbfx.explain(model, lowered=True)
    assert model.code == code
    assert model.state_dict().keys() == state.keys()
    (report,) = explanation.lowered
    assert (report.path, report.class_name) == ("", "Convolutional")
    assert (report.ops_before, report.ops_after) == (22, 13)
    assert report.fused == ("conv1", "conv2", "fc")
    assert report.apart == ()
    text = str(explanation)
    assert "lowered for inference: 22 ops become 13" in text
    assert "one product each at conv{1,2}, fc" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert pbfx.explain(model).lowered is None
    assert "lowered" not in str(pbfx.explain(model))


def test_explain_says_why_a_soma_stays():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            y = self.body(x).mean(-1)
            return self.head(y) if x.shape[0] else y

    model = pbfx.transform(Net())
    randomise(pbfx.grow(model))
    explanation = pbfx.explain(model, lowered=True)
    assert [report.path for report in explanation.lowered] == ["body", "head"]
    assert [report.fused for report in explanation.lowered] == [(), ("head",)]
    reason = "the GroupNorm behind it cannot be folded"
    text = " ".join(str(explanation).split())
    assert f"soma apart from its dendrites at body.0 (site): {reason}" in text
    data = explanation.to_json()["lowered"]
    assert json.loads(json.dumps(data)) == data
    assert data[0]["apart"] == [{"name": "body.0", "reason": reason}]
    # A plain model is lowered as it would be transformed; nothing to grow on is nothing to lower.
    assert pbfx.explain(Net(), lowered=True).lowered
    assert pbfx.explain(nn.ReLU(), lowered=True).lowered == ()


def test_explain_lowered_in_the_shell(capsys: pytest.CaptureFixture[str]):
    assert main(["explain", "--lowered", "models:perceptron"]) == 0
    assert "lowered for inference: 7 ops become 5" in capsys.readouterr().out
    assert main(["explain", "--lowered", "--json", "models:perceptron"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["lowered"]
    assert report["fused"] == ["0"]
    assert report["passes"][1]["removed"] == {"BatchNorm1d": 1, "Linear": 1}
    assert torch.is_grad_enabled()
