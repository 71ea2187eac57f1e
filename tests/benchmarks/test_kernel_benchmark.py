"""`python -m benchmarks kernels`: a tiny run on the CPU, and a gate that holds."""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks import (
    candidate_neurons,
    kernels,
    kernels_plot,
    kernels_summary,
    layer_providers,
    neurons,
    tune,
)
from benchmarks.environment import COLUMNS
from benchmarks.neurons import Layer
from benchmarks.runner import main
from pbfx_kernels import Geometry
from pbfx_kernels.strategy import Strategy

CPU = torch.device("cpu")
TINY = (
    Layer("linear tiny", (5, 4), (6, 4), Geometry()),
    Layer("conv tiny", (2, 4, 5, 5), (6, 2, 3, 3), Geometry.convolution(2, 1, 1, 1, 2)),
    Layer("conv tiny NHWC", (2, 4, 5, 5), (6, 4, 3, 3), Geometry.convolution(2), True),
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LAYERS", TINY)


def test_tiny_run(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    options = ["--dendrites", "0", "2", "--seconds", "0.001", "--out", str(path), "--revision", "a"]
    assert main(["kernels", *options, "--modes", *kernels.MODES]) == 0
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == (*COLUMNS, *kernels.COLUMNS)
    # Nobody packs a single candidate.
    assert len(rows) == len(TINY) * 2 * (4 + 4 + 3 + 4)
    assert {row["provider"] for row in rows} == {"plain", "pbfx", "eager loop", "eager packed"}
    assert all(math.isfinite(float(row["us_p50"])) for row in rows)
    assert all(float(row["x_plain"]) == 1 for row in rows if row["provider"] == "plain")
    shares = [row["roofline_share"] for row in rows if row["mode"] == "forward"]
    assert any(shares)
    assert {row["strategy"] for row in rows if row["provider"] == "pbfx"} == {"reference", "none"}
    out = capsys.readouterr().out
    assert "pbfx runs reference; best rival" in out
    assert main(["kernels", "--summary", str(path)]) == 0
    tables = capsys.readouterr().out
    assert all(f"float32, {mode}: 6 cases" in tables for mode in kernels.MODES)
    assert max(map(len, tables.splitlines())) <= 80


def test_a_budget_leaves_cases_out(capsys):
    options = ["--dendrites", "1", "--seconds", "0.001", "--budget", "1e-9", "--modes", "forward"]
    assert main(["kernels", *options]) == 0
    assert f"{len(TINY)} cases left out: the budget of 1e-09 s is spent" in capsys.readouterr().out


def _args(**changed: object) -> argparse.Namespace:
    standard = {"compile": False, "incumbent": False, "tune_gemm": [], "max_autotune": []}
    return argparse.Namespace(**standard | changed)


@pytest.mark.parametrize("layer", TINY, ids=lambda layer: layer.name)
@pytest.mark.parametrize("mode", kernels.MODES)
def test_the_gate_names_who_is_wrong(layer: Layer, mode: str):
    tensors = neurons.draw(layer, 2, torch.float32, CPU, 0, 1)
    pool = candidate_neurons.draw(tensors, 0) if mode == kernels.CANDIDATE else None
    found = layer_providers.providers(_args(), tensors, mode)
    assert kernels.check(tensors, found, mode, "float32", pool) == []
    frozen = mode != kernels.GRADIENT
    right = candidate_neurons.loop(layer) if pool else neurons.loop(layer, frozen)

    def without_links(*arguments: Tensor) -> Tensor:
        # Of the dendrites, or of the candidate: by them its gradients are wrong, and no output is.
        at = 9 if pool else 6
        links = torch.zeros_like(arguments[at]).requires_grad_(arguments[at].requires_grad)
        return right(*arguments[:at], links, *arguments[at + 1 :])

    faults = kernels.check(tensors, found | {"pbfx": without_links}, mode, "float32", pool)
    assert len(faults) == 1
    assert "pbfx" in faults[0]


def test_what_pbfx_runs_is_what_its_ops_are_asked_for(monkeypatch: pytest.MonkeyPatch):
    tensors = neurons.draw(TINY[1], 2, torch.float32, CPU, 0, 1)

    def call(neuron):
        return kernels._call(neuron, tensors, kernels.FORWARD)

    asked = []
    monkeypatch.setattr(layer_providers, "choose", lambda p: asked.append(p) or Strategy.SPLIT)
    assert layer_providers.choice(call(neurons.chosen(TINY[1]))) == "split"
    assert asked[0].geometry == TINY[1].geometry
    assert (asked[0].neurons, asked[0].dendrites) == (6, 2)
    assert layer_providers.choice(call(neurons.plain(TINY[1]))) == "none"
    tensors = neurons.draw(TINY[0], 2, torch.float32, CPU, 0, 1)
    assert layer_providers.choice(call(neurons.fused())) == "fused"


def test_rivals_that_fail_or_take_too_long_are_left_out(capsys):
    def slow(turn):
        while True:
            time.sleep(0.01)

    def broken(turn):
        raise ValueError("no such kernel\nand more")

    calls = {"plain": id, "inductor": slow, "eager loop": broken, "packed + inductor": id}
    found = layer_providers.start(dict.fromkeys(calls, print), lambda name, _: calls[name], 0.05)
    assert list(found) == ["plain", "packed + inductor"]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "inductor: left out, OutOfTime: not done after 0.05 s",
        "eager loop: left out, ValueError: no such kernel",
    ]
    with pytest.raises(ValueError, match="no such kernel"):
        layer_providers.start({"pbfx": print}, lambda *_: broken, 1)


def test_providers_are_compiled_where_asked(monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda neuron, **options: made.append(options) or neuron)
    tensors = neurons.draw(TINY[0], 1, torch.float32, CPU, 0, 1)
    words = {"tune_gemm": ["tiny"], "max_autotune": ["5x4"]}
    found = layer_providers.providers(_args(compile=True, **words), tensors, kernels.FORWARD)
    assert list(found) == [
        *("plain", "pbfx", "pbfx, compiled", "eager loop", "eager packed", "inductor"),
        *("packed + inductor", "inductor, tuned gemm"),
    ]
    assert made[-1]["options"]["max_autotune_gemm"] is True
    assert all(name in torch._inductor.config.get_config_copy() for name in made[-1]["options"])
    found = layer_providers.providers(_args(compile=True), tensors, kernels.CANDIDATE)
    assert list(found) == ["plain", "pbfx", "pbfx, compiled", "eager loop", "inductor"]


def _row(provider: str, us: float, **changed: object) -> dict[str, str]:
    standard = {"utc": "2026-01-01", "revision": "a", "device": "GPU", "dtype": "bfloat16"}
    standard |= {"layer": "linear 2048x2048x2048", "dendrites": 3, "mode": "forward"}
    standard |= dict.fromkeys(("positions", "neurons", "inputs"), 2048)
    standard |= {"roofline_us": 90, "roofline_share": 90 / us}
    standard |= {"product_tflops": 8 * 2048**3 / 90e6}
    standard |= {"copy_gbs": 4000, "provider": provider, "us_p50": us}
    return {key: str(value) for key, value in (standard | changed).items()}


def _write(path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_summary(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    thin = {"layer": "linear thin", "inputs": 16, "roofline_us": 10, "roofline_share": 0.25}
    newer = {"utc": "2026-01-02"}
    step = {"mode": "step", "roofline_us": "", "roofline_share": ""}
    rows = [
        # Of an older run, which counts no more, except against who has not run since.
        *(_row("pbfx", 9000), _row("inductor", 1), _row("perforatedai", 27000)),
        *(_row("plain", 25, **newer), _row("pbfx", 100, **newer), _row("inductor", 200, **newer)),
        _row("inductor, max-autotune", 150, **newer),
        *(_row("pbfx", 40, **thin), _row("inductor", 20, **thin), _row("eager loop", 160, **thin)),
        *(_row("plain", 100, **step), _row("pbfx, compiled", 250, **step)),
        *(_row("pbfx", 260, **step), _row("inductor", 240, **step)),
    ]
    _write(path, rows)
    assert main(["kernels", "--summary", str(path)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    forward, steps = (dict(_lines(table)) for table in out.split("\n\n"))
    # 2x and 0.5x: neither.
    assert forward["faster than inductor, 2 cases"] == "1.00x - "
    assert forward["faster than inductor, max-autotune, 1 cases"] == "1.50x - >= 1.5x"
    assert forward["faster than perforatedai, 1 cases"] == "3.00x - >= 4x"
    assert forward["faster than eager loop, 1 cases"] == "4.00x - "
    assert forward["slowest against the best rival"] == "2.00x - <= 1.05x"
    assert forward["losses of more than 5 %"] == "1 of 2 - none"
    assert forward["roofline, M, N, K >= 1024, least and mean"] == "90% 90% - >= 85%"
    assert forward["roofline, memory-bound, least and mean"] == "25% 25% - >= 50%"
    assert steps["step / plain, D = 3, GEMM-bound, worst"] == "2.60x 2.50x <= 2.3x"
    assert steps["losses of more than 5 %"] == "1 of 1 0 of 1 none"
    assert "pbfx: linear thin D=3 2.00x" in out


def _lines(table: str) -> Iterator[tuple[str, str]]:
    for line in table.splitlines():
        label, _, rest = line.partition("  ")
        yield label.strip(), f"{' '.join(rest.split())}{' ' * line.endswith('-')}"


def test_memory_bound_is_what_traffic_bounds():
    assert not kernels_summary.memory_bound(_row("pbfx", 1, roofline_us=90))
    assert kernels_summary.memory_bound(_row("pbfx", 1, roofline_us=91))


@pytest.mark.parametrize("text", [None, "", "layer,dtype\nx,y\n"])
def test_a_summary_of_other_files_is_refused(tmp_path, capsys, text):
    path = tmp_path / "rows.csv"
    if text is not None:
        path.write_text(text)
    assert main(["kernels", "--summary", str(path)]) == 2
    assert f"--summary {path}: " in capsys.readouterr().err


def test_a_run_without_compiled_rivals_hides_none():
    names = "plain", "pbfx", "packed + inductor"
    rows = [_row(name, us) for name, us in zip(names, (10, 40, 20), strict=True)]
    newer = [_row(name, us, utc="2026-01-02") for name, us in (("plain", 20), ("pbfx", 30))]
    (case,) = kernels_summary.compared([*rows, *newer]).values()
    assert {name: float(row["us_p50"]) for name, row in case.items()} == dict(
        zip(names, (10, 40, 20), strict=True)
    )
    (case,) = kernels_summary.compared(newer).values()
    assert list(case) == ["plain", "pbfx"]


def test_the_plot_takes_one_dtype_and_the_latest_rows(tmp_path):
    rows = [_row("plain", 10), _row("pbfx", 40), _row("pbfx", 1, dtype="tf32")]
    newer = [_row(name, us, utc="2026-01-02") for name, us in (("plain", 20), ("pbfx", 30))]
    found = kernels_plot.latest([*newer, *rows], "bfloat16", "forward")
    assert found == {"linear 2048x2048x2048": {"plain": 20, "pbfx": 30, "roofline": 90}}
    step = _row("plain", 5, mode="step", layer="another", roofline_us="", torch="2")
    path = tmp_path / "rows.csv"
    _write(path, [row | {"torch": "2"} for row in (*rows, step)])
    pytest.importorskip("matplotlib")
    assert kernels_plot.main([str(path), str(tmp_path / "plot.svg")]) == 0
    drawn = (tmp_path / "plot.svg").read_text()
    assert "another" in drawn
    assert "GPU, bfloat16, torch 2" in drawn


def test_the_committed_rows_sum_up(capsys):
    assert main(["kernels", "--summary"]) == 0
    out = capsys.readouterr().out
    assert "forward" in out
    assert max(map(len, out.splitlines())) <= 80


def test_counts():
    layer = TINY[0]
    assert layer.flops(3) == 2 * 4 * 5 * 6 * 4
    assert layer.elements(3) == 5 * 4 + 4 * 6 * 4 + 5 * 6
    roofline = kernels.Roofline(bandwidth=1.0, rate=1e9)
    assert roofline.seconds(layer, 0, 2) == 2 * layer.elements(0)
    names = [layer.name for layer in neurons.LAYERS]
    assert len(set(names)) == len(names)


def test_tuning_without_the_gpu_that_it_needs(monkeypatch, capsys, tmp_path):
    """The table and the gate, with the loop in the place of the kernel."""
    layer = neurons.LAYERS[8]
    assert layer.name == "linear 128x10x128"
    monkeypatch.setattr(tune, "LAYERS", (layer,))
    assert main(["tune"]) == 2
    assert "Hopper" in capsys.readouterr().err

    def loop(tensors, blocks):
        x, *rest = tensors.inputs[0], tensors.weight, tensors.bias, *tensors.dendrites
        return lambda _: neurons.loop(layer)(x, *rest).detach() * factor

    monkeypatch.setattr(tune, "can_fuse", lambda *_: True)
    monkeypatch.setattr(neurons, "forced", lambda layer, _: neurons.loop(layer))
    monkeypatch.setattr(tune, "_fused", loop)
    path = tmp_path / "tune.csv"
    factor = 1.0
    arguments = ["tune", "--dendrites", "3", "--seconds", "0.01", "--out", str(path)]
    assert main(arguments) == 0
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows][:2] == ["plain", "packed"]
    assert sum(row["chosen"] == "True" for row in rows) == 1
    factor = 1.1
    assert main(arguments) == 1
    assert "output is off" in capsys.readouterr().err
