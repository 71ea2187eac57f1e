"""Measured choices: what is timed, what is kept, and what a damaged cache does, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from kernel_cases import BY_NAME, make_dendrites
from test_kernel_strategy import H200, but
from triton.errors import TritonError

import pbfx_kernels
from pbfx_kernels import Geometry, dispatch, measured
from pbfx_kernels.measured import Question, question_of
from pbfx_kernels.problem import Problem
from pbfx_kernels.strategy import Strategy
from pbfx_kernels.ways import Way, ways_of

SPEEDS = {"packed": 3e-3, "split": 1e-3, "slow": 5e-3}


class Clock:
    """Times by a list instead of a GPU; and what was timed."""

    def __init__(self) -> None:
        self.speeds: dict[str, float] = dict(SPEEDS)
        self.timed: list[str] = []

    def ways(self, *names: str) -> dict[str, Callable[[], str]]:
        return {name: (lambda name=name: name) for name in names or self.speeds}

    def seconds_of(self, way: Callable[[], str]) -> float:
        name = way()
        self.timed.append(name)
        return self.speeds[name]


@pytest.fixture(autouse=True)
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setenv(measured.FOLDER, str(tmp_path / "cache"))
    monkeypatch.delenv(measured.SWITCH, raising=False)
    monkeypatch.setattr(measured, "seconds_of", clock.seconds_of)
    _forget()
    yield clock
    _forget()


def _forget() -> None:
    """Start as a new process would."""
    measured._answers.clear()
    measured._warned.clear()


def question(problem: Problem = H200, activation: str = "tanh", keep: bool = False) -> Question:
    return question_of("dendrites", "NVIDIA H200", problem, activation, keep)


def files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_it_is_measured_once_and_kept(clock: Clock, tmp_path: Path) -> None:
    with pbfx_kernels.measure():
        for _ in range(3):
            assert measured.fastest(question(), clock.ways()) == "split"
        assert clock.timed == ["packed", "split", "slow"]
        (path,) = files(tmp_path)
        assert path.parent.name.startswith(f"NVIDIA-H200-torch{torch.__version__}-triton")
        found = json.loads(path.read_text())
        assert found["microseconds"] == {"packed": 3000, "split": 1000, "slow": 5000}
        assert found["question"]["positions"] == 65536
        _forget()
        assert measured.fastest(question(), clock.ways()) == "split"
        assert len(clock.timed) == 3, "another process measures nothing"
        # A question of its own.
        clock.speeds["packed"] = 1e-6
        assert measured.fastest(question(but(dendrites=2)), clock.ways()) == "packed"
    assert len(files(tmp_path)) == 2


def test_it_is_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not measured.active()
    with pbfx_kernels.measure():
        assert measured.active()
        with pbfx_kernels.measure(new=False):
            assert measured.active()
        assert measured._current().takes
    assert not measured.active()
    monkeypatch.setenv(measured.SWITCH, "1")
    assert measured.active()
    with pbfx_kernels.measure(new=False):
        assert not measured._current().takes
    monkeypatch.setenv(measured.SWITCH, "0")
    with pbfx_kernels.measure():
        assert not measured.active(), "whoever starts the process has the last word"
    measured._environment.cache_clear()
    monkeypatch.setenv(measured.SWITCH, "yes")
    with pytest.warns(RuntimeWarning, match="PBFX_MEASURE='yes' is neither 0 nor 1"):
        assert not measured.active()
    with pbfx_kernels.measure():
        assert measured.active()


def test_what_was_measured_serves_where_nothing_is(clock: Clock, tmp_path: Path) -> None:
    with pbfx_kernels.measure(new=False):
        assert measured.fastest(question(), clock.ways()) is None
        assert clock.timed == files(tmp_path) == []
    with pbfx_kernels.measure():
        measured.fastest(question(), clock.ways())
    _forget()
    with pbfx_kernels.measure(new=False):
        assert measured.fastest(question(), clock.ways()) == "split"
    assert len(clock.timed) == 3


@pytest.mark.parametrize("what", ["capture", "compilation"])
def test_nothing_is_measured_inside_a_graph(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with pbfx_kernels.measure():
        with monkeypatch.context() as patch:
            if what == "capture":
                patch.setattr(torch.cuda, "is_available", lambda: True)
                patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            else:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert measured.fastest(question(), clock.ways()) is None
            assert clock.timed == []
        assert measured.fastest(question(), clock.ways()) == "split", "it was not remembered"


DAMAGED = {
    "empty": b"",
    "cut": b'{"format": 1, "question": {"op"',
    "binary": bytes(range(256)),
    "list": b"[1, 2]",
    "deep": b"[" * 50_000,
    "large": b" " * 2**17,
    "other format": b'{"format": 99}',
    "other question": b'{"format": 1, "question": {"op": "x"}, "microseconds": {"split": 1}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_ignored_and_replaced(
    clock: Clock, tmp_path: Path, content: bytes
) -> None:
    with pbfx_kernels.measure():
        measured.fastest(question(), clock.ways())
        (path,) = files(tmp_path)
        good = path.read_bytes()
        path.write_bytes(content)
        _forget()
        with pytest.warns(RuntimeWarning, match="measured times are ignored") as caught:
            assert measured.fastest(question(), clock.ways()) == "split"
        assert len(caught) == 1
        assert path.read_bytes() == good
        # The second such file says nothing.
        path.write_bytes(content)
        measured._answers.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert measured.fastest(question(), clock.ways()) == "split"


@pytest.mark.parametrize("value", [0, -1, "3", True, None, float("nan"), float("inf"), [1]])
def test_times_that_are_none_are_ignored(clock: Clock, tmp_path: Path, value: object) -> None:
    with pbfx_kernels.measure():
        measured.fastest(question(), clock.ways())
        (path,) = files(tmp_path)
        found = json.loads(path.read_text())
        found["microseconds"]["slow"] = value
        path.write_text(json.dumps(found))
        _forget()
        with pytest.warns(RuntimeWarning, match="holds no times"):
            assert measured.fastest(question(), clock.ways()) == "split"


def test_names_that_are_not_on_offer_are_passed_over(clock: Clock, tmp_path: Path) -> None:
    with pbfx_kernels.measure():
        measured.fastest(question(), clock.ways())
        (path,) = files(tmp_path)
        found = json.loads(path.read_text())
        found["microseconds"]["__import__('os').abort()"] = 1e-9
        path.write_text(json.dumps(found))
        _forget()
        assert measured.fastest(question(), clock.ways()) == "split"
        assert measured.fastest(question(), clock.ways("packed", "slow")) == "packed"
        assert len(clock.timed) == 3


def test_a_folder_that_cannot_be_written_costs_one_warning(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(measured.FOLDER, str(tmp_path / "file"))
    with pbfx_kernels.measure():
        with pytest.warns(RuntimeWarning) as caught:
            answers = [measured.fastest(question(but(dendrites=d)), clock.ways()) for d in (3, 1)]
        assert answers == ["split", "split"]
        said = [str(warning.message) for warning in caught]
        assert [m.split(":")[1] for m in said] == [
            " measured times are ignored",
            " measured times are not kept",
        ]
        assert measured.fastest(question(), clock.ways()) == "split"
        assert len(clock.timed) == 6, "this process remembers"


def test_a_write_that_fails_leaves_nothing(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pbfx_kernels.measure(), pytest.warns(RuntimeWarning, match="not kept: no space"):
        measured.fastest(question(), clock.ways())
    assert files(tmp_path) == []


def test_ways_that_cannot_be_launched_are_left_out(clock: Clock) -> None:
    class OutOfResources(TritonError):
        pass

    def raising(error: Exception) -> Callable[[], None]:
        def way() -> None:
            raise error

        return way

    ways = {
        "large": raising(OutOfResources("shared memory")),
        "huge": raising(torch.OutOfMemoryError("memory")),
    }
    with pbfx_kernels.measure():
        assert measured.fastest(question(), ways | clock.ways("packed")) == "packed"
        assert measured.fastest(question(but(dendrites=1)), ways) is None
        with pytest.raises(ValueError, match="a bug"):
            measured.fastest(question(but(dendrites=2)), {"x": raising(ValueError("a bug"))})


def test_time_is_limited(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, measured.MOST_SECONDS + 1])
    monkeypatch.setattr(measured.time, "monotonic", lambda: next(now))
    with pbfx_kernels.measure():
        assert measured.fastest(question(), clock.ways()) == "packed"
    assert clock.timed == ["packed"]


def test_questions() -> None:
    near = [question(but(positions=p)) for p in (32769, 40000, 65536)]
    assert len(set(near)) == 1
    others = [
        question(but(positions=65537)),
        question(but(neurons=128)),
        question(but(dtype=torch.float16)),
        question(but(channels_last=False)),
        question(but(geometry=Geometry.convolution(2, stride=2), taps=9)),
        question(but(geometry=Geometry.convolution(2), taps=9)),
        question(activation="relu"),
        question(activation="gelu"),
        question(keep=True),
    ]
    assert len({near[0], *others}) == 1 + len(others)
    assert question(activation="silu") == question(activation="sigmoid") == near[0]
    # Padding changes what is computed, not how long it takes.
    padded = but(geometry=Geometry.convolution(2, padding=1), taps=9)
    assert question(padded) == others[5]


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert measured.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv(measured.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured.cache_folder() == tmp_path / "pbfx"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert measured.cache_folder() == tmp_path / ".cache" / "pbfx"


_PROCESS = """
import sys, warnings
from pbfx_kernels import measured
from test_measured import question
warnings.simplefilter("error")
own, rounds = sys.argv[1], int(sys.argv[2])
sys.stdin.readline()
for _ in range(rounds):
    measured._write(question(), {own: 1e-3, "packed": 2e-3})
    times = measured._read(question())
    assert times is not None and times["packed"] == 2e-3 and len(times) == 2, times
print("whole")
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Each finds a whole file at every moment, its own or the other's."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    search = [str(Path(__file__).parent), *filter(None, sys.path)]
    environment["PYTHONPATH"] = os.pathsep.join(search)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, name, "300"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("split", "fused")
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert out == "whole\n", err
    assert len(files(tmp_path)) == 1, "nothing half written is left behind"


def test_dispatch_runs_what_was_measured(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that is timed is the way that runs, with its configuration."""
    launched: list[Way] = []

    def launch(way: Way, soma: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        launched.append(way)
        return soma, soma

    monkeypatch.setattr(dispatch, "choose", lambda _: Strategy.PACKED)
    monkeypatch.setattr(dispatch, "problem_of", lambda *_: H200)
    monkeypatch.setattr(dispatch, "_launch", launch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    best = next(way for way in ways_of(H200) if way.blocks is not None)
    taken = []

    def seconds_of(way: Callable[[], object]) -> float:
        way()
        taken.append(launched[-1])
        return 1.0 if launched[-1] == best else 2.0

    monkeypatch.setattr(measured, "seconds_of", seconds_of)
    site = BY_NAME["linear"]
    args = make_dendrites(site, 2).args(torch.float32)
    tensors = [args[n] for n in ("soma", "x", "weight", "bias", "to_soma", "to_dendrite")]
    call = (*tensors, "tanh", site.geometry, False)
    dispatch.evaluate_dendrites(*call)
    assert launched == [Way(Strategy.PACKED)], "off: the table"
    launched.clear()
    with pbfx_kernels.measure():
        dispatch.evaluate_dendrites(*call)
        assert taken == list(ways_of(H200))
        assert launched == [*taken, best]
        launched.clear()
        dispatch.evaluate_dendrites(*call)
        assert launched == [best]


@pytest.mark.parametrize("streamed", [False, True])
def test_one_kernel_runs_what_was_measured(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """It always has a configuration of its own; here is none of its kernels, but their calls."""
    from pbfx_kernels import fused_neuron, neuron_op, streamed_neuron, ways

    launched = []
    problem = but(positions=64, neurons=16, channels=32, dendrites=2)
    monkeypatch.setattr(neuron_op, "linear_problem", lambda *_: problem)
    monkeypatch.setattr(neuron_op, "can_fuse", lambda *_: not streamed)
    monkeypatch.setattr(neuron_op, "streams", lambda _: streamed)
    monkeypatch.setattr(fused_neuron, "interleave", lambda *_: None)
    monkeypatch.setattr(fused_neuron, "can_describe", lambda _: True)
    for module, name in ((fused_neuron, "fused_neuron"), (streamed_neuron, "streamed_neuron")):
        monkeypatch.setattr(module, name, lambda *given, name=name: launched.append((name, given)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    x, weight = torch.randn(64, 32), torch.randn(16, 32)
    links = torch.randn(2, 16, 32), None, torch.randn(2, 16), torch.randn(2, 2, 16)
    call = torch.ops.pbfx.perforated_linear.default
    call(x, weight, None, *links, "tanh", False)
    usual = "streamed_neuron" if streamed else "fused_neuron"
    assert [(name, given[-1]) for name, given in launched] == [(usual, None)], "off: the table's"
    offered = dict(ways.neuron_ways(problem))
    kinds = {type(way).__name__ for way in offered.values()}
    assert kinds == {"NoneType", "Blocks", "Streams"}
    best = list(offered.values())[-1]
    launched.clear()

    def seconds_of(way: Callable[[], object]) -> float:
        way()
        return 1.0 if launched[-1][1][-1] == best else 2.0

    monkeypatch.setattr(measured, "seconds_of", seconds_of)
    with pbfx_kernels.measure():
        call(x, weight, None, *links, "tanh", False)
    assert [given[-1] for _, given in launched] == [*offered.values(), best]
    for name, given in launched:
        way = type(given[-1]).__name__
        assert name == {"Streams": "streamed_neuron", "Blocks": "fused_neuron"}.get(way, usual)


def test_ways_of_one_kernel() -> None:
    from pbfx_kernels.fused_configs import Blocks, neuron_blocks
    from pbfx_kernels.ways import neuron_ways

    for problem in (H200, but(positions=64), but(channels=4096), but(dendrites=1)):
        offered = list(neuron_ways(problem))
        assert offered[0] == ("usual", None)
        assert len(dict(offered)) == len(offered) <= 8
        usual = neuron_blocks(problem.positions, problem.neurons, problem.inputs, problem.dendrites)
        assert usual not in dict(offered).values()
    # Elsewhere than on Hopper there are no descriptors to load by.
    ampere = dict(neuron_ways(but(positions=64, capability=(8, 0)))).values()
    assert len(ampere) > 1, ampere
    assert not any(isinstance(way, Blocks) for way in ampere)


@pytest.mark.parametrize(
    "problem",
    [
        H200,
        but(positions=1, neurons=10),
        but(dtype=torch.float32),
        but(dendrites=8),
        but(geometry=Geometry.convolution(2), taps=9, channels=64),
        but(geometry=Geometry.convolution(2, groups=256), taps=9, channels=1),
        but(geometry=Geometry.convolution(1, groups=256), taps=99, channels=1, channels_last=False),
        but(geometry=Geometry.convolution(3), taps=27),
    ],
    ids=str,
)
def test_ways(problem: Problem) -> None:
    ways = list(ways_of(problem))
    assert ways[0] == Way(Strategy.PACKED)
    assert len({way.name for way in ways}) == len(ways) <= 8
    assert Strategy.REFERENCE not in {way.strategy for way in ways}
    for way in ways:
        assert way.blocks is None or way.strategy is Strategy.SPLIT
        assert way.strips is None or way.strategy is Strategy.DEPTHWISE
        if way.blocks:
            sizes = way.blocks.positions, way.blocks.neurons, way.blocks.inputs
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
            assert way.blocks.warps in (4, 8)
