"""The benchmarks' runner, gate, tables and files, and a tiny run of each benchmark on the CPU."""

from __future__ import annotations

import copy
import csv
import dataclasses
import math
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from benchmarks import dendrite_step, lower, restructure, step, whole
from benchmarks.benchmark import Case
from benchmarks.environment import COLUMNS, ROOT, git_revision
from benchmarks.errors import GateError, UsageError
from benchmarks.gate import (
    gradient_errors,
    gradient_fault,
    output_error,
    output_fault,
    same_bits,
)
from benchmarks.models import MODELS, fresh
from benchmarks.records import append, check_columns
from benchmarks.registry import BENCHMARKS
from benchmarks.runner import main, parser_of
from benchmarks.table import WIDTH, multiple, render
from benchmarks.timing import Quantiles, interleave
from pbfx.learning import learner

CPU = torch.device("cpu")
TINY = {
    "step": "--models mnist mlp --width 0.05 --batch-size 2 --seconds 0.01 --dendrites 0 2",
    "dendrite-step": "--models mnist wide --width 0.05 --batch-size 2 --seconds 0.01",
    "models": "--models mnist resnet18 --width 0.05 --batch-size 2 --dendrites 0 2 --seconds 0.01",
    "lower": "--models mnist resnet18 --width 0.05 --batch-size 2 --dendrites 0 2 --seconds 0.01",
    "restructure": "--models mnist --width 0.05 --batch-size 2 --repeats 2",
    "recompile": "--models mnist --width 0.05 --batch-size 2 --repeats 2 --compiler eager",
}


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def broken(name: str, damage) -> list[step.Provider]:
    """Return the providers, with `damage(model)` done to what the one named builds."""

    def build_of(provider):
        def build(*arguments):
            model, optimizer = provider.build(*arguments)
            return damage(model) or model, optimizer

        return build

    return [
        dataclasses.replace(p, build=build_of(p)) if p.name == name else p for p in step.PROVIDERS
    ]


def setting(dendrites: int, name: str = "mlp") -> step.Setting:
    arguments = ["--width", "0.05", "--batch-size", "4"]
    parser = step.argparse.ArgumentParser()
    step.add_arguments(parser)
    args = parser.parse_args(arguments)
    args.seed, args.dtype = 0, "float32"
    return step._setting(args, CPU, name, dendrites)


def test_no_name_prints_the_list(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and b.summary in shown for name, b in BENCHMARKS.items())
    assert max(map(len, shown.splitlines())) <= WIDTH


def test_an_unknown_name_is_answered_with_the_nearest(capsys):
    assert main(["stpe"]) == 2
    assert "did you mean 'step'" in capsys.readouterr().err


def test_registry_names_and_columns():
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name
        columns = (*COLUMNS, *benchmark.columns)
        assert len(set(columns)) == len(columns)
    assert {"revision", "torch", "triton", "device", "dtype", "utc"} <= set(COLUMNS)


@pytest.mark.parametrize("option", ["--batch-size 0", "--width nan", "--dendrites -1", "--seed x"])
def test_wrong_options_exit_2(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["step", *option.split()])
    assert stopped.value.code == 2
    assert "must be" in capsys.readouterr().err


def test_a_device_that_is_not_there_exits_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["step", "--device", "cuda"]) == 2
    assert main(["step", "--dtype", "tf32"]) == 2
    shown = capsys.readouterr().err
    assert "no CUDA device" in shown
    assert "TF32" in shown


@pytest.mark.parametrize("name", TINY)
def test_tiny_run(name, tmp_path, capsys):
    path = tmp_path / "out" / "rows.csv"
    assert main([name, *TINY[name].split(), "--out", str(path), "--revision", "abc"]) == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= WIDTH
    rows = read(path)
    assert tuple(rows[0]) == (*COLUMNS, *BENCHMARKS[name].columns)
    assert {row["revision"] for row in rows} == {"abc"}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["utc"]) for row in rows)
    assert all(math.isfinite(float(row["ms_p50"])) for row in rows)
    if name == "step":
        assert len(rows) == 2 * 2 * 2 * len(step.PROVIDERS)
        # The brief's floors: (D + 3) / 3 for perforated, D + 1 for full backpropagation.
        floors = {
            (row["provider"], row["mode"]): float(row["x_floor"])
            for row in rows
            if row["dendrites"] == "2"
        }
        assert floors["pbfx perforated", "train"] == pytest.approx(5 / 3, rel=1e-5)
        assert floors["pbfx gradient", "train"] == 3
        assert floors["pbfx perforated", "infer"] == 3
        plain = [row for row in rows if row["provider"] == "plain"]
        assert all(float(row["x_plain_p50"]) == 1 for row in plain)
    elif name == "recompile":
        first = {
            row["provider"]: row["compilations"]
            for row in rows
            if row["event"] == "first call after it"
        }
        assert first == {
            "inductor": "1",
            "pbfx": "1",
            "pbfx, regional": "1",
            "pbfx, sites": "1",
            "pbfx, ops": "1",
            "pbfx, reserve": "0",
        }
    elif name == "models":
        # Without dendrites there is nothing to pack.
        assert len(rows) == 2 * (2 + 3)
        packed = [row for row in rows if row["provider"] == "packed"]
        assert all(float(row["x_packed"]) == 1 for row in packed)
    elif name == "lower":
        # Without dendrites there is nothing to pack, and on a CPU there are no graphs.
        assert len(rows) == 2 * (3 + 4)
        assert {row["graph"] for row in rows} == {"no"}
        packed = [row for row in rows if row["provider"] == "packed"]
        assert all(float(row["x_packed"]) == 1 for row in packed)
    elif name == "dendrite-step":
        # On a CPU there are no graphs: two models, two parts, plain and candidates.
        assert len(rows) == 2 * 2 * 2
        floors = {row["provider"]: float(row["x_floor"]) for row in rows}
        assert floors == {"plain": 1, "pbfx candidates": pytest.approx(4 / 3, rel=1e-5)}
    else:
        events = {row["event"] for row in rows}
        assert {"transform", *restructure.PHASES, restructure.SNAPSHOT} <= events


def test_recompile_goes_on_where_it_was_cut_off(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    common = ["recompile", *TINY["recompile"].split(), "--out", str(path)]

    def follow(*ways: str, revision: str = "abc", resume: bool = True) -> list[dict[str, str]]:
        options = ["--ways", *ways, "--revision", revision, *["--resume"] * resume]
        before = len(read(path)) if path.exists() else 0
        assert main([*common, *options]) == 0
        return read(path)[before:]

    (fresh, _) = follow("grown")
    assert (fresh["event"], float(fresh["x_fresh"])) == ("fresh compile", 1)
    rows = follow("grown", "regional")
    assert {row["provider"] for row in rows} == {"pbfx, regional"}
    # Judged by what an earlier process has measured.
    for row in rows:
        share = float(row["ms_p50"]) / float(fresh["ms_p50"])
        assert float(row["x_fresh"]) == pytest.approx(share, rel=1e-4)
    assert follow("grown", "regional") == []
    # Of another revision nothing is known, and without the option nothing is looked up.
    (row, *_) = follow("regional", revision="def")
    assert row["x_fresh"] == ""
    assert len(follow("grown", resume=False)) == 2
    assert main(["recompile", *TINY["recompile"].split(), "--resume"]) == 2
    assert "--out" in capsys.readouterr().err


def test_compiled_restructuring_counts_compilations(tmp_path):
    path = tmp_path / "rows.csv"
    tiny = [*TINY["restructure"].split(), "--compile", "--backend", "eager"]
    assert main(["restructure", *tiny, "--out", str(path)]) == 0
    counts = {row["event"]: row["compilations"] for row in read(path)}
    assert counts["first step after growth"] == "1"
    assert counts["second step after growth"] == "0"


def test_a_wrong_lowering_is_not_timed(tmp_path, monkeypatch, capsys):
    def damaged(model):
        twin = copy.deepcopy(model)
        nudge(twin)
        return twin

    monkeypatch.setattr(lower.pbfx, "lower", damaged)
    path = tmp_path / "rows.csv"
    assert main(["lower", *TINY["lower"].split(), "--out", str(path)]) == 1
    assert "mnist, lowered against pbfx: output is off" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("dendrites", [0, 2])
@pytest.mark.parametrize("name", step.NAMES)
def test_the_gate_passes_what_is_right(name, dendrites):
    assert step.check(setting(dendrites, name), list(step.PROVIDERS)) == []


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    next(model.parameters()).view(-1)[0] += 0.01


@torch.no_grad()
def drop_cascade(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("to_dendrite"):
            parameter.zero_()


class Thawed(nn.Module):
    """Right outputs, wrong gradients: an error reaches the first layer twice."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)

    def named_parameters(self, *args, **kwargs):
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad * 1.01
            yield name, parameter


@pytest.mark.parametrize(
    ("provider", "damage", "dendrites", "message"),
    [
        ("pbfx perforated", nudge, 2, "output is off"),
        ("pbfx gradient", drop_cascade, 2, "output is off"),
        ("pbfx candidates", nudge, 1, "output is off"),
        ("pbfx perforated", nudge, 0, "bit for bit"),
        ("loop, full", nudge, 1, "output is off"),
        ("pbfx perforated", Thawed, 2, "gradient of"),
        ("pbfx candidates", lambda m: m.requires_grad_(True), 1, "gradients arrive"),
    ],
)
def test_the_gate_catches_a_wrong_provider(provider, damage, dendrites, message):
    def wrap(model):
        return damage(model) if damage is Thawed else (damage(model), None)[1]

    faults = step.check(setting(dendrites), broken(provider, wrap))
    assert len(faults) == 1
    assert provider in faults[0]
    assert message in faults[0]


def test_a_failed_gate_times_nothing_and_exits_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(step, "PROVIDERS", tuple(broken("pbfx perforated", nudge)))
    monkeypatch.setattr(step, "_measure", lambda *_: pytest.fail("timed on a red gate"))
    path = tmp_path / "rows.csv"
    assert main(["step", *TINY["step"].split(), "--out", str(path)]) == 1
    assert "nothing was timed" in capsys.readouterr().err
    assert not path.exists()


def test_gate_arithmetic():
    one = torch.ones(4)
    assert output_fault(one, one, "float32") is None
    assert output_fault(one * 1.001, one, "float32")
    assert output_fault(one * torch.nan, one, "bfloat16")
    assert output_fault(one[:2], one, "float32")
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(one, one.clone())
    assert gradient_fault({"a": one}, {"b": one}, "float32")
    assert gradient_fault({"a": one * torch.nan}, {"a": one}, "float32")
    assert gradient_fault({"a": one, "empty": one[:0]}, {"a": one}, "float32") is None


def rounded(exact: torch.Tensor, error: float, seed: int) -> torch.Tensor:
    """Return `exact` off by `error`, relative to its norm, in a direction of its own."""
    off = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed)).double()
    return exact + error * off * exact.norm() / off.norm()


def test_a_gradient_of_cancellation_is_judged_by_what_eager_torch_loses():
    exact = {"conv": rounded(torch.zeros(288).double() + 1, 1, 0), "fc": torch.ones(9).double()}
    # 1.6 % in TF32 at 700,000 positions, in eager torch: above the table's 1 %.
    eager = {"conv": rounded(exact["conv"], 1.6e-2, 1), "fc": rounded(exact["fc"], 1e-3, 1)}
    lost = gradient_errors(eager, exact)
    assert lost == {"conv": pytest.approx(1.6e-2), "fc": pytest.approx(1e-3)}
    other = {"conv": rounded(exact["conv"], 2.2e-2, 2), "fc": rounded(exact["fc"], 2e-3, 2)}
    assert "gradient of conv" in str(gradient_fault(other, exact, "tf32"))
    assert gradient_fault(other, exact, "tf32", lost) is None
    for name, damaged in {"conv": 1.04 * other["conv"], "fc": 1.02 * other["fc"]}.items():
        fault = gradient_fault({**other, name: damaged}, exact, "tf32", lost)
        assert f"gradient of {name} is off" in str(fault)
    # Where eager torch is lost itself, it excuses nobody.
    lost = dict.fromkeys(exact, 0.5)
    far = {name: rounded(grad, 0.3, 4) for name, grad in exact.items()}
    assert gradient_fault(far, exact, "tf32", lost)
    assert output_fault(far["fc"], exact["fc"], "tf32", 1.0, lost["fc"])
    assert output_fault(other["fc"], exact["fc"], "tf32")
    error = output_error(other["fc"], exact["fc"])
    assert output_fault(other["fc"], exact["fc"], "tf32", 1.0, error) is None
    nan = {name: grad * torch.nan for name, grad in exact.items()}
    assert gradient_fault(nan, exact, "tf32", gradient_errors(nan, exact))


def test_tables_keep_to_the_width():
    cells = [("a provider with a name that is far too long for its column", *["12.3456"] * 7)]
    case = Case("t" * 30 + " " + "u" * 70, ("name", *["x"] * 7), cells, ["word " * 60], [])
    assert max(map(len, render(case).splitlines())) <= WIDTH
    assert [multiple(v) for v in (0.5, 9.999, 99.99)] == ["0.50", "10.0", "100"]


def test_losses_are_said_like_wins():
    assert step.verdict(Quantiles(1.9, 2.0, 2.1)) == "2.00x SLOWER"
    assert step.verdict(Quantiles(0.4, 0.5, 0.6)) == "2.00x faster"
    assert step.verdict(Quantiles(0.9, 1.0, 1.1)).startswith("level")


def test_csv_appends_and_refuses_other_columns(tmp_path):
    path = tmp_path / "rows.csv"
    check_columns(path, ("a", "b"))
    append(path, ("a", "b"), [{"a": 1, "b": None}])
    append(path, ("a", "b"), [{"a": 2, "b": 0.125}])
    assert read(path) == [{"a": "1", "b": ""}, {"a": "2", "b": "0.125"}]
    with pytest.raises(UsageError, match="other columns"):
        check_columns(path, ("a", "c"))
    with pytest.raises(ValueError, match="differ"):
        append(path, ("a", "b"), [{"a": 1}])


def test_samples_hold_whole_cycles_and_rounds_correspond():
    calls = dict.fromkeys("ab", 0)

    def call(name):
        calls[name] += 1

    times = interleave(
        {name: lambda name=name: call(name) for name in calls},
        CPU,
        0.0,
        {"a": 1, "b": 4},
        lambda name: None,
    )
    assert len(times["a"]) == len(times["b"]) >= 5
    assert calls["b"] % 4 == 0


def test_revision_is_unknown_outside_git(tmp_path):
    assert git_revision(tmp_path) == "unknown"


@pytest.mark.parametrize("name", MODELS)
def test_models_can_be_transformed_whole(name):
    import pbfx

    model = MODELS[name]
    plain = fresh(name, 1 / 12, CPU, 0).eval()
    tracked = pbfx.transform(plain)
    assert all("parameter" not in skipped.reason for skipped in tracked.perforation.skipped)
    if name != "resnet18":
        x, y = model.batches(2, CPU, 0)[0]
        assert same_bits(tracked(x), plain(x))
        assert math.isfinite(model.loss(plain(x), y).item())


def test_a_pool_that_does_not_learn_is_not_timed(monkeypatch):
    monkeypatch.setattr(learner, "_fused_adam_", lambda *_, **__: None)
    tiny = TINY["dendrite-step"].split()
    with pytest.raises(GateError, match=r"the candidates at conv1.* do not learn"):
        list(dendrite_step.run(parser_of(dendrite_step.BENCHMARK).parse_args(tiny)))


def test_models_that_say_something_else_are_not_timed(monkeypatch, capsys, tmp_path):
    compute = whole.packed_of

    def wrong(model, dendrites):
        packed = compute(model, dendrites)
        packed.register_forward_hook(lambda *arguments: arguments[-1] * 1.01)
        return packed

    monkeypatch.setattr(whole, "packed_of", wrong)
    path = tmp_path / "rows.csv"
    assert main(["models", *TINY["models"].split(), "--out", str(path)]) == 1
    fault = "mnist, batch 2, D = 2, pbfx against packed: output is off"
    assert fault in capsys.readouterr().err
    # Nobody else loses a row, and where dendrites join after norms the two are not compared.
    found = {(row["model"], row["dendrites"], row["provider"]) for row in read(path)}
    assert {provider for model, d, provider in found if (model, d) == ("mnist", "2")} == {"plain"}
    assert ("resnet18", "2", "packed") in found


@torch.no_grad()
def _scaled_gradient(model):
    """Return `model`, whose fc2.weight gets a gradient 4 % too large."""
    model.get_parameter("fc2.weight").register_hook(lambda grad: 1.04 * grad)
    return model


def test_models_that_fail_or_learn_wrongly_compiled_are_left_out(monkeypatch, capsys, tmp_path):
    compile_ = torch.compile

    def faulty(model, *, backend, **options):
        if backend == "missing":
            raise RuntimeError("no such backend\nand more")
        if backend == "pbfx":
            _scaled_gradient(model)
        return compile_(model, backend="eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(torch, "compile", faulty)
    path = tmp_path / "rows.csv"
    options = "--models mnist --width 0.05 --batch-size 2 --dendrites 0 1 --seconds 0.01"
    backends = ["--compile", "--no-eager", "--backend", "missing", "pbfx", "inductor"]
    assert main(["models", *options.split(), *backends, "--out", str(path)]) == 1
    shown = capsys.readouterr().err
    assert "D = 1, pbfx, missing: RuntimeError: no such backend" in shown
    assert "D = 1, pbfx, pbfx: gradient of fc2.weight is off by 4.0e-02" in shown
    found = [(row["dendrites"], row["provider"]) for row in read(path)]
    compiled = ["plain, inductor", "pbfx, inductor"]
    rivals = ["plain, inductor", "packed, inductor", "pbfx, inductor"]
    assert found == [("0", name) for name in compiled] + [("1", name) for name in rivals]


def test_a_reader_that_has_enough_ends_a_run():
    command = [sys.executable, "-m", "benchmarks", "kernels", "--summary"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    complaint = process.stderr.read()
    assert (process.wait(), complaint) == (141, "")
    process.stderr.close()
