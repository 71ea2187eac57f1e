"""The sweep: processes that die, choices, shrunk configurations, checks, and an honest summary."""

from __future__ import annotations

import argparse
import csv
import os
import signal
import time
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import zoo
from benchmarks.benchmark import Case
from benchmarks.errors import UsageError
from benchmarks.records import append
from benchmarks.runner import main
from benchmarks.sweep import check as checks
from benchmarks.sweep import choice, shrink
from benchmarks.sweep.check import NO, VARIES, YES, Finding, check
from benchmarks.sweep.choice import choose, interleave
from benchmarks.sweep.pool import run_each
from benchmarks.sweep.subject import Name, NotBuilt, Subject, check_size
from benchmarks.sweep.summary import conditions, losses, summarise
from benchmarks.table import WIDTH, render
from benchmarks.weights import weights_read
from pbfx.errors import CaptureError

# What the server must have, lest every process import torch by itself.
_PRELOAD = ["benchmarks.zoo", "pytest"]


def act(task, report):
    report("begun")
    if task == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "sleeps":
        time.sleep(60)
    return task.upper()


def test_a_process_costs_its_own_result_and_nothing_else():
    ends = {
        end.task: end
        for end in run_each(act, ["dies", "sleeps", "works", "too"], 2, 5.0, None, _PRELOAD)
    }
    assert ends["works"].result == "WORKS"
    assert ends["too"].fault is None
    assert ends["dies"].fault == f"the process died with exit code {-signal.SIGKILL}"
    assert ends["sleeps"].fault == "no end within 5 s"
    assert {end.stage for end in ends.values()} == {"begun"}


def test_a_spent_budget_ends_the_sweep():
    before = dict(os.environ)
    begun = time.monotonic()
    assert list(run_each(act, ["sleeps"] * 3, 2, 60.0, 1.0, _PRELOAD)) == []
    assert time.monotonic() - begun < 30
    assert dict(os.environ) == before


def names(text: str) -> list[Name]:
    return [Name("timm", model, model[0]) for model in text.split()]


def test_every_family_before_any_second_member():
    given = names("a1 a2 a3 b1 b2 c1")
    assert [n.model for n in choose(given, None)] == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert [n.model for n in choose(given, 4)] == ["a1", "b1", "c1", "a2"]
    assert [n.model for n in choose(names("a1 b1 c1 d1 d2"), 2)] == ["a1", "c1"]
    assert [n.model for n in interleave([names("a1 a2 a3 a4"), names("b1 b2")])] == (
        ["a1", "b1", "a2", "a3", "b2", "a4"]
    )


class Config:
    model_type = "toy"

    def __init__(self, **settings):
        defaults = {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 6,
            "vocab_size": 30_000,
            "pad_token_id": 29_999,
            "type_vocab_size": 2,
            "layer_types": ["sliding", "full_attention", "sliding", "full_attention"],
            "num_experts_per_tok": 8,
            "num_experts": 64,
            "tie": True,
            "mask_time_prob": 0.05,
        }
        vars(self).update(defaults | settings)

    def to_dict(self):
        return vars(self)


def test_configurations_shrink_and_stay_consistent():
    config = shrink.configure(Config, shrink.narrow)
    assert config.hidden_size % config.num_attention_heads == 0
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.num_hidden_layers == len(config.layer_types) == shrink.LAYERS
    assert set(config.layer_types) == {"sliding", "full_attention"}
    assert config.pad_token_id < config.vocab_size == shrink.VOCABULARY
    assert config.num_experts_per_tok <= config.num_experts
    assert (config.type_vocab_size, config.tie, config.mask_time_prob) == (2, True, 0.0)
    assert shrink.configure(Config, shrink.shallow).hidden_size == 768


class Toy(nn.Module):
    """A linear layer, a weight that is used twice, a computed one, and noise on request."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.matrix, self.noise = nn.Parameter(torch.eye(4)), noise

    def forward(self, x):
        x = F.linear(self.twice(self.first(x)), self.twice.weight) @ self.matrix
        if self.noise:
            # Not from torch's streams: no seed brings it back.
            x = x + self.noise * torch.frombuffer(bytearray(os.urandom(4)), dtype=torch.uint8)
        return {"out": F.dropout(self.normed(x), 0.5, self.training), "cache": None}


def check_toy(monkeypatch, build) -> Finding:
    arguments = ((torch.randn(3, 4),), {})
    monkeypatch.setitem(
        checks.BUILDERS, "timm", lambda _: Subject(build(), "toy", arguments, arguments)
    )
    stages = []
    finding = check(Name("timm", "toy", "toys"), 0, stages.append)
    assert stages == ["build", "plain", "transform", "compare"][: len(stages)]
    return finding


def test_weights_are_counted_once_and_by_name():
    model = Toy()
    reads = weights_read(model, lambda: model(torch.randn(2, 4)))
    assert [read.name for read in reads] == ["first.weight", "twice.weight", "matrix", "normed"]
    assert all(not module._forward_hooks for module in model.modules())


def test_a_sound_model_passes(monkeypatch):
    found = check_toy(monkeypatch, Toy)
    assert (found.outcome, found.reason) == ("transformed", None)
    assert (found.identical_eval, found.identical_train, found.unchanged_grown) == (YES,) * 3
    assert (found.covered_percent, found.linear_conv, found.new_mib) == (100.0, 64, 0.0)
    assert found.left_out is None


def test_noise_of_its_own_is_told_from_a_difference(monkeypatch):
    found = check_toy(monkeypatch, lambda: Toy(noise=1.0))
    assert {found.identical_eval, found.identical_train} == {VARIES}


def test_a_difference_is_found(monkeypatch):
    def wrong(model):
        with torch.no_grad():
            transformed = transform(model)
        transformed.register_forward_hook(lambda *a: {"out": a[-1]["out"] + 1})
        return transformed

    transform = checks.pbfx.transform
    monkeypatch.setattr(checks.pbfx, "transform", wrong)
    assert check_toy(monkeypatch, Toy).identical_eval == NO


def fails(error):
    def build(*_):
        raise error

    return build


def test_failures_are_told_apart(monkeypatch):
    assert check_toy(monkeypatch, fails(NotBuilt("too large"))).outcome == "not built"
    monkeypatch.setattr(checks.pbfx, "transform", fails(CaptureError("no")))
    refused = check_toy(monkeypatch, Toy)
    assert (refused.outcome, refused.reason) == ("refused", "transform: CaptureError: no")
    monkeypatch.setattr(checks.pbfx, "transform", fails(ZeroDivisionError("oh")))
    assert check_toy(monkeypatch, Toy).outcome == "crashed"
    with pytest.raises(NotBuilt, match="too large"):
        check_size(10**12)


def test_a_slow_model_is_not_laid_at_our_door(monkeypatch):
    monkeypatch.setattr(checks, "MAX_PLAIN_SECONDS", 0.0)
    found = check_toy(monkeypatch, Toy)
    assert found.outcome == "not built"
    assert "too slow for the sweep" in found.reason


def row(**fields) -> dict[str, object]:
    good = Finding("transformed", "64 px", "1 whole", 3, 10, 8, 100.0, YES, YES, YES, 0.1, 0.0)
    name = Name("timm", "net", "nets")
    end = zoo.Ended(name, good, "compare", None, 1.0)
    return zoo.row_of(end, "1.0") | fields


def told(**fields) -> list[dict[str, str]]:
    return [zoo.as_text(row(**fields))]


def test_processes_that_end_early_have_rows():
    name = Name("timm", "net", "nets")

    def outcome(stage, fault):
        return zoo.row_of(zoo.Ended(name, None, stage, fault, 9.0), "1.0")["outcome"]

    assert outcome("plain", "no end within 9 s") == "not built"
    assert outcome("compare", "no end within 9 s") == "timed out"
    assert outcome("transform", "the process died with exit code -11") == "crashed"


def test_the_summary_tells_losses_like_wins():
    rows = [*told() * 290, *told(outcome="not built", reason="build: NotBuilt: x") * 7]
    assert all(line.startswith("met") for line in conditions(rows)[1:])
    assert conditions(rows)[0].startswith("NOT MET")
    assert all(line.startswith("met") for line in conditions(rows + told() * 10))
    for bad, said in (
        ({"identical_train": NO}, "DIFFERS in identical_train"),
        ({"outcome": "crashed", "reason": "compare: oh"}, "CRASHED: compare: oh"),
        ({"covered_percent": 12.0, "left_out": "1 x LSTM"}, "covered 12 %: 1 x LSTM"),
    ):
        lines = losses(told(model="bad", **bad))
        assert lines == [f"timm bad: {said}"]
    assert any("NOT MET" in line for line in conditions(rows + told(identical_eval=NO)))
    assert "(1 of them vary" in conditions(rows + told(identical_eval=VARIES))[2]
    shown = render(summarise(rows + told(library="torchvision", covered_percent=0.0)))
    assert max(map(len, shown.splitlines())) <= WIDTH


def options(path, *more: str) -> list[str]:
    return ["zoo", "--out", str(path), "--revision", "abc", *more]


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, monkeypatch, capsys):
    path, asked = tmp_path / "rows.csv", []

    def ends(function, tasks, *_):
        asked.extend(name.model for name in tasks)
        for name in tasks:
            yield zoo.Ended(
                name, Finding("transformed", covered_percent=100.0), "compare", None, 1.0
            )

    monkeypatch.setattr(zoo, "run_each", ends)
    monkeypatch.setattr(zoo.importlib.metadata, "version", lambda _: "1.0")
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: name == "timm" or None)
    monkeypatch.setitem(choice.NAMES, "timm", lambda: names("a1 a2 b1"))
    assert main(options(path, "--limit", "2")) == 0
    assert main(options(path)) == 0
    assert asked == ["a1", "b1", "a2"]
    with path.open(newline="", encoding="utf-8") as file:
        assert [r["model"] for r in csv.DictReader(file)] == asked
    shown = capsys.readouterr().out
    assert "torchvision: skipped, not installed here" in shown
    assert main(options(path, "--summary")) == 0
    assert "3 models, 3 of which run" in capsys.readouterr().out


def test_what_cannot_be_asked_of_a_sweep(tmp_path, monkeypatch):
    def arguments(**changed):
        given = {"device": "cpu", "dtype": "float32", "compile": False, "save": False}
        given |= {"out": tmp_path / "none.csv", "summary": False, "libraries": ["timm"]}
        return argparse.Namespace(**given | changed)

    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda _: None)
    for changed in ({"dtype": "bfloat16"}, {"compile": True}, {"summary": True}, {}):
        with pytest.raises(UsageError):
            list(zoo.run(arguments(**changed)))


def test_progress_fits_a_terminal():
    case = zoo._progress([row(), row(model="n" * 90, outcome="crashed", sites=None)], 2, 2)
    assert isinstance(case, Case)
    assert max(map(len, render(case).splitlines())) <= WIDTH


def test_rows_have_the_columns(tmp_path):
    append(tmp_path / "rows.csv", zoo.COLUMNS, [row()])
    assert types.MappingProxyType(row()).keys() == set(zoo.COLUMNS)
