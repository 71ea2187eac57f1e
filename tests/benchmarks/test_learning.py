"""The learning studies: every arm runs, runs beside each other do not mix, and none is lost."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

import pbfx
from benchmarks.environment import ROOT
from benchmarks.errors import UsageError
from benchmarks.learning import lanes, nets, rows, studies, task, workers
from benchmarks.learning.arms import arm_named, arm_names, setting
from benchmarks.learning.command import main, parser, tasks_of
from benchmarks.learning.data import CONTEXT, load
from benchmarks.learning.problem import Problem, Split, judge, loss_of
from benchmarks.learning.run import Outcome, start
from benchmarks.learning.task import Task
from benchmarks.learning.trainer import Trainer, evaluate
from pbfx.parts import parameter_count

CPU = torch.device("cpu")
SHAPES = {
    "mnist": ((1, 28, 28), 10),
    "digits": ((1, 8, 8), 10),
    "adult": ((nets.ADULT_INPUTS,), 2),
    "tiny_shakespeare": ((CONTEXT,), nets.LETTERS),
}
WIDTHS = dict.fromkeys(("mnist", "bare", "ablations", "compression"), 0.1)
TINY = ["--seeds", "1", "--neuron-epochs", "1", "--dendrite-epochs", "1", "--dendrites", "1"]


def problem(data: str, count: int = 40) -> Problem:
    """Return a little of a data set's shape, with something to learn in it."""
    shape, classes = SHAPES[data]
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        if data == "tiny_shakespeare":
            codes = torch.randint(0, classes, (n + CONTEXT,), generator=generator)
            views = codes.unfold(0, CONTEXT + 1, 1)
            return Split(views[:, :-1], views[:, 1:])
        targets = torch.arange(n) % classes
        inputs = torch.randn(n, *shape, generator=generator)
        inputs += targets.view(-1, *(1 for _ in shape)) / classes
        return Split(inputs, targets)

    return Problem(data, split(count), split(20), split(20))


def tiny(study: str, arm: str, seed: int = 0, **changes) -> Task:
    lengths = {"neuron_epochs": 2, "dendrite_epochs": 2, "dendrites": 1} | changes
    of = studies.STUDIES[study]
    width = WIDTHS.get(study, 0.5)
    return Task(study, arm_named(arm, of.selections), width, seed, **lengths)


def finish(job: Task, data: Problem) -> Outcome:
    [ended] = lanes.run_all(iter([job, None]).__next__, lambda t, _: start(t, data), 1, CPU)
    assert ended.fault is None, ended.fault
    assert ended.outcome is not None
    return ended.outcome


def timeless(outcome: Outcome) -> Outcome:
    return dataclasses.replace(outcome, seconds=0.0)


@pytest.fixture
def short_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every study have epochs of five steps of eight rows."""
    for name, study in studies.STUDIES.items():
        changed = dataclasses.replace(study, steps=5, batch_size=8)
        monkeypatch.setitem(studies.STUDIES, name, changed)


EACH = [(s.name, arm) for s in studies.STUDIES.values() for arm in s.arms]


@pytest.mark.usefixtures("short_epochs")
@pytest.mark.parametrize(("study", "arm"), EACH, ids=lambda value: value)
def test_every_arm_of_every_study_runs(study: str, arm: str) -> None:
    job = tiny(study, arm, neuron_epochs=1, dendrite_epochs=2)
    outcome = finish(job, problem(studies.STUDIES[study].data))
    settings = dict(job.arm.settings)
    grown = settings.get("max_dendrites", 1)
    usual = 1 + grown * (1 + settings.get("policy.dendrite_epochs", 2))
    if job.arm.mode in (None, "gradient"):
        usual = job.epochs
    limits = [stage.dendrites for stage in outcome.stages]
    finished = bool(settings.get("finish")) and outcome.stages[-1].epochs > usual
    if finished:
        # It goes on from the best network, which may have had fewer dendrites than the last.
        assert limits.pop() in limits
    assert job.epochs == 4
    assert len(outcome.curve) == usual + finished
    assert limits == ([*range(grown + 1)] if job.arm.mode else [0])
    for stage in outcome.stages:
        assert 0 <= stage.test_error <= 100
        assert stage.test_loss > 0
        assert stage.validation_error == pytest.approx(outcome.curve[stage.best_epoch - 1])
    grows = job.arm.mode in ("perforated", "sham")
    assert (outcome.stages[len(outcome.stages) > 1].growth is not None) == grows
    if grows:
        growth = outcome.stages[1].growth
        assert growth is not None
        # Where rows are spared, a phase of so few steps may measure none.
        assert 0 <= (growth["candidate_score"] or 0) <= 1


@pytest.mark.usefixtures("short_epochs")
@pytest.mark.parametrize("arm", ["perforated", "gradient", "sham"])
def test_a_stage_is_the_run_with_fewer_dendrites(arm: str) -> None:
    data = problem("mnist")
    long = tiny("mnist", arm, dendrites=2, dendrite_epochs=1)
    if arm == "gradient":
        # Its phases share the epochs of the others' dendrite phases: five each, in both runs.
        long = dataclasses.replace(long, neuron_epochs=4, dendrite_epochs=2)
    stages = finish(long, data).stages
    short = finish(dataclasses.replace(long, dendrites=1), data).stages
    assert stages[:2] == short


@pytest.mark.usefixtures("short_epochs")
def test_a_last_phase_of_plain_backpropagation_is_a_stage_of_its_own() -> None:
    data, chosen = problem("mnist"), dict([setting("finish=True")])
    job = dataclasses.replace(tiny("mnist", "perforated"), arm=arm_named("perforated", {}, chosen))
    stages = finish(job, data).stages
    without = finish(tiny("mnist", "perforated"), data).stages
    assert stages[:2] == without
    # That phase is left out where no dendrite has helped.
    helped = without[1].parameters > without[0].parameters
    assert [stage.dendrites for stage in stages] == [0, 1, 1][: 2 + helped]
    assert len({stage.epochs for stage in stages}) == len(stages)


@pytest.mark.usefixtures("short_epochs")
@pytest.mark.parametrize("arm", ["perforated[spare=0.5]", "sham[spare=0.5]"])
def test_candidates_may_learn_from_rows_that_the_network_has_not_seen(
    arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, epochs, run = problem("mnist"), [], Trainer.epoch

    def seen(self: Trainer, rows: torch.Tensor | None = None) -> Generator:
        loss = yield from run(self, rows)
        epochs.append(set(self._order.flatten().tolist()))
        return loss

    monkeypatch.setattr(Trainer, "epoch", seen)
    finish(tiny("mnist", arm, dendrites=2, neuron_epochs=1, dendrite_epochs=1), data)
    whole, even = set(range(40)), set(range(0, 40, 2))
    odd = whole - even
    # Network, candidates, network, candidates, network; a step has 8 of the 20 rows, or of the 40.
    assert epochs == [odd, even, even, odd, whole]


@pytest.mark.parametrize("spare", ["0", "1.5", "many"])
def test_a_wrong_share_of_rows_is_named(spare: str) -> None:
    with pytest.raises(UsageError, match="spare must be"):
        arm_named(f"perforated[spare={spare}]", {}).folds  # noqa: B018


@pytest.mark.usefixtures("short_epochs")
def test_runs_in_lanes_are_the_runs_alone() -> None:
    data = problem("mnist")
    jobs = [tiny("mnist", arm, seed) for seed in (0, 1) for arm in ("plain", "perforated")]
    waiting = iter([*jobs, *[None] * 4])
    together = {
        ended.task.key: ended.outcome
        for ended in lanes.run_all(waiting.__next__, lambda t, _: start(t, data), 3, CPU)
    }
    before = torch.get_rng_state()
    for job in jobs:
        outcome = together[job.key]
        assert outcome is not None
        assert timeless(outcome) == timeless(finish(job, data))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.usefixtures("short_epochs")
def test_a_failed_run_costs_the_others_nothing() -> None:
    data, jobs = problem("mnist"), [tiny("mnist", "plain", seed) for seed in range(3)]

    def begin(job: Task, _: object) -> Iterator:
        if job.seed == 1:
            raise ValueError("out of luck")
        return (yield from start(job, data))

    ends = list(lanes.run_all(iter([*jobs, None, None]).__next__, begin, 2, CPU))
    assert sorted(e.task.seed for e in ends if e.outcome) == [0, 2]
    [failed] = [ended for ended in ends if ended.fault]
    assert failed.task.seed == 1
    assert "out of luck" in failed.fault


@pytest.mark.usefixtures("short_epochs")
def test_paired_arms_begin_alike() -> None:
    data = problem("mnist")
    first = {arm: finish(tiny("mnist", arm), data).curve[0] for arm in ("sham", "perforated")}
    assert first["sham"] == first["perforated"]
    nets_of = []
    for arm in ("plain", "perforated"):
        torch.manual_seed(0)
        nets_of.append(tiny("mnist", arm).build().state_dict())
    for name, tensor in nets_of[0].items():
        assert torch.equal(tensor, nets_of[1][name])


def test_an_epoch_sees_each_row_once() -> None:
    split = Split(torch.arange(20.0)[:, None], torch.zeros(20, dtype=torch.int64))
    seen = []

    class Looking(torch.nn.Linear):
        def forward(self, x):
            seen.extend(x[:, 0].tolist())
            return super().forward(x)

    model = Looking(1, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(model, optimizer, split, batch_size=4, seed=0)
    list(trainer.epoch())
    first, seen[:] = list(seen), []
    with pytest.raises(StopIteration) as end:
        next(trainer.epoch())
    mean = end.value.value
    assert sorted(first) == sorted(seen) == list(range(20))
    assert first != seen
    assert float(mean) == pytest.approx(
        loss_of(model(split.inputs), split.targets).item(), rel=1e-5
    )


def test_windows_move_as_the_text_that_they_show() -> None:
    split = problem("tiny_shakespeare", 500).train
    # To another device, so that something moves.
    moved = split.to(torch.device("meta"))
    assert moved.inputs.shape == (500, CONTEXT)
    assert moved.inputs.untyped_storage().nbytes() == 8 * (500 + CONTEXT)
    here = split.to(CPU)
    assert torch.equal(here.inputs, split.inputs)
    assert torch.equal(here.targets, split.targets)


def test_figures_are_those_of_plain_torch() -> None:
    model, data = torch.nn.Linear(3, 4), torch.randn(2500, 3)
    targets = torch.randint(0, 4, (2500,))
    error, loss = evaluate(model, Split(data, targets)).tolist()
    logits = model(data)
    assert error == pytest.approx(100 * float((logits.argmax(1) != targets).float().mean()))
    assert loss == pytest.approx(
        torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5
    )
    assert judge(logits, targets).shape == (2,)


def test_rivals_have_the_parameters_of_the_grown_net() -> None:
    for study in studies.STUDIES.values():
        for width in study.widths:
            for net in (study.net, study.deeper):
                found = nets.parameters_at(net, task.rival_width(study.net, net, width, 1))
                wanted = parameter_count(pbfx.grow(pbfx.transform(study.net(width)), 1))
                # Narrow nets come in coarse steps.
                assert found == pytest.approx(wanted, rel=0.35 if wanted < 10_000 else 0.1)


def test_width_for_finds_the_nearest() -> None:
    net = nets.MnistNet
    for width in (0.0625, 0.25, 1.0):
        wanted = nets.parameters_at(net, width)
        assert nets.parameters_at(net, nets.width_for(net, wanted)) == wanted
        assert nets.parameters_at(net, nets.width_for(net, wanted + 1)) == wanted


def test_keys_tell_runs_apart_by_what_matters() -> None:
    base = tiny("mnist", "perforated")
    assert dataclasses.replace(base, seed=1).key[-1] == base.key[-1]
    of = studies.STUDIES["mnist"]
    changed = arm_named("perforated", of.selections, dict([setting("candidate_lr=0.01")]))
    assert changed.name == "perforated[candidate_lr=0.01]"
    others = [
        dataclasses.replace(base, arm=changed),
        dataclasses.replace(base, dendrites=2),
        dataclasses.replace(base, width=0.2),
        tiny("mnist", "sham"),
        tiny("mnist", "perforated-last"),
    ]
    assert len({job.key[-1] for job in (base, *others)}) == 6


def test_settings_reach_config_tracker_and_policy() -> None:
    pairs = ("candidates=2", "activation=relu", "max_dendrites=3", "policy=plateau")
    chosen = dict(setting(text) for text in (*pairs, "policy.patience=2"))
    arm = arm_named("perforated", {}, chosen)
    config = arm.config(("fc*",), {"candidates": 7, "candidate_lr": 0.5}, seed=3)
    assert (config.candidates, config.activation, config.candidate_lr) == (2, "relu", 0.5)
    assert (config.include, config.seed) == (("fc*",), 3)
    assert arm.tracker_settings(5, 2) == {"max_dendrites": 3, "policy": pbfx.Plateau(patience=2)}
    plain = arm_named("perforated", {}).tracker_settings(5, 2)
    assert plain == {"policy": pbfx.Interval(5, 2)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["mnst"], "no study 'mnst'"),
        (["mnist", "--arms", "plane"], "no arm 'plane'"),
        (["mnist", "--arms", "perforated-lats"], "no selection 'lats'"),
        (["mnist", "--set", "candidate=3"], "candidates"),
        (["mnist", "--set", "candidates"], "KEY=VALUE"),
        (["mnist", "--set", "candidates=0"], "candidates must be"),
        (["mnist", "--set", "policy=plato"], "plateau"),
        (["mnist", "--widths", "1,x"], "--widths"),
        (["mnist", "--widths", "0"], "between 0 and 100"),
        (["mnist", "--devices", "gpu"], "no device"),
        (["adult"], "--data-dir"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_options_are_named(
    options: list[str], words: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PBFX_DATA_DIR", raising=False)
    assert main([*options, *TINY, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ablations_are_arms() -> None:
    ablations = ("--ablate", "candidates=1|2", "--ablate", "activation=relu")
    args = parser().parse_args(
        ["digits", *TINY, "--arms", "plain,perforated", "--set", "candidate_lr=0.1", *ablations]
    )
    names = {job.arm.name for job in tasks_of("digits", args)}
    assert names == {
        "plain",
        "perforated[candidate_lr=0.1,candidates=1]",
        "perforated[candidate_lr=0.1,candidates=2]",
        "perforated[activation=relu,candidate_lr=0.1]",
    }


def test_an_arm_may_have_settings_of_its_own() -> None:
    text = "plain, perforated-last[candidates=2,tuning=full],sham"
    assert arm_names(text) == ["plain", "perforated-last[candidates=2,tuning=full]", "sham"]
    args = parser().parse_args(
        ["mnist", *TINY, "--widths", "1", "--arms", text, "--set", "candidate_lr=0.1"]
    )
    own, other = (job.arm for job in tasks_of("mnist", args) if job.arm.mode)
    assert own.name == "perforated-last[candidate_lr=0.1,candidates=2,tuning=full]"
    assert dict(own.settings) == {"candidate_lr": 0.1, "candidates": 2, "tuning": "full"}
    assert other.name == "sham[candidate_lr=0.1]"
    asked = arm_named("perforated", {}, {"tuning": "full", "candidates": 2})
    assert asked == arm_named("perforated[candidates=2,tuning=full]", {})


def test_nets_without_dropout_are_runs_of_their_own() -> None:
    bare, usual = tiny("bare", "plain"), tiny("mnist", "plain")
    assert bare.key[-1] != usual.key[-1]
    for job, dropped in ((bare, {0.0}), (usual, {0.25, 0.5})):
        found = (m.p for m in job.build().modules() if isinstance(m, torch.nn.Dropout))
        assert set(found) == dropped


def test_few_tasks_are_spread_over_the_processes() -> None:
    jobs = [tiny("digits", "plain", seed) for seed in range(4)]
    placement = workers.Placement(("cpu",), jobs=2, lanes=4)
    found = [report.cells for report in workers.work_off(jobs, placement)]
    for cells in found:
        assert cells is not None
        # Two lanes in each of two processes, of which one may be at its end already.
        beside = float(cells["seconds"]) / float(cells["gpu_seconds"])
        assert round(beside, 2) in (2, 4)


def test_a_budget_goes_to_the_first_study_and_to_whole_pairs(tmp_path: Path, capsys) -> None:
    command = ["bare", "mnist", *TINY, "--seeds", "2", "--arms", "plain,sham", "--widths", "1"]
    for options, wanted in (
        (["--budget", "9"], ["bare"] * 4 + ["mnist"] * 4),
        ([], ["bare", "mnist"] * 4),
    ):
        assert main([*command, *options, "--dry-run", "--out", str(tmp_path)]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
        assert sorted(line[0] for line in lines) == sorted(wanted)
        seeds = [line[3] for line in lines]
        if options:
            assert [line[0] for line in lines] == wanted
            assert seeds == ["0", "0", "1", "1"] * 2


def test_digits_and_resume(tmp_path: Path, capsys) -> None:
    command = ["digits", *TINY, "--arms", "plain,perforated", "--out", str(tmp_path)]
    assert main([*command, "--dry-run"]) == 0
    assert not (tmp_path / "digits.csv").exists()
    assert main([*command, "--budget", "1e-9"]) == 1
    assert "2 runs are missing" in capsys.readouterr().out
    assert main(command) == 0
    first = (tmp_path / "digits.csv").read_bytes()
    assert main(command) == 0
    assert (tmp_path / "digits.csv").read_bytes() == first
    assert main([*command, "--seeds", "2"]) == 0
    grown = (tmp_path / "digits.csv").read_bytes()
    assert grown.startswith(first)
    found = rows.read(tmp_path / "digits.csv")
    assert [(row.arm, row.seed) for row in found] == [
        ("perforated", 0),
        ("plain", 0),
        ("perforated", 1),
        ("plain", 1),
    ]
    assert [stage.dendrites for stage in found[0].stages] == [0, 1]
    assert found[0].stages[1].parameters == int(found[0].cells["parameters"])


def test_a_killed_study_loses_no_finished_run(tmp_path: Path) -> None:
    command = ["digits", *TINY, "--seeds", "6", "--arms", "plain,sham,perforated"]
    path = tmp_path / "digits.csv"
    program = [sys.executable, "-m", "benchmarks", "learning", *command, "--jobs", "2"]
    outside = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.Popen(
        [*program, "--out", str(tmp_path)], cwd=ROOT, env=outside, stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") > 3):
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = path.read_bytes()
    whole = kept[: kept.rfind(b"\n") + 1]
    done = len(rows.read(path))
    assert 2 < done < 18
    # As if it had been killed within a write.
    path.write_bytes(whole + b'digits,plain,1,5,0123,0,160,"{')
    assert len(rows.read(path)) == done
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert path.read_bytes().startswith(whole)
    with path.open(newline="", encoding="utf-8") as file:
        keys = [rows.key_of(cells) for cells in csv.DictReader(file)]
    assert len(keys) == len(set(keys)) == 18


def test_a_dead_worker_costs_its_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [tiny("digits", "plain", seed) for seed in range(4)]
    placement = workers.Placement(("cpu",), jobs=2, lanes=1)
    reports = workers.work_off([jobs[0], _Deadly(**vars(jobs[1])), *jobs[2:]], placement)
    found = list(reports)
    assert sorted(r.task.seed for r in found if r.cells and r.task) == [0, 2, 3]
    [dead] = [report for report in found if report.cells is None]
    assert "exit code 7, doing digits plain 0.5 1" in str(dead.fault)


@dataclasses.dataclass(frozen=True)
class _Deadly(Task):
    def build(self):
        os._exit(7)


def test_rows_of_another_kind_are_left_alone(tmp_path: Path, capsys) -> None:
    path = tmp_path / "digits.csv"
    path.write_text("a,b\n1,2\n")
    assert main(["digits", *TINY, "--out", str(tmp_path)]) == 2
    assert "other columns" in capsys.readouterr().err
    assert path.read_text() == "a,b\n1,2\n"


def test_data_that_is_missing_is_named(tmp_path: Path) -> None:
    for name in ("mnist", "adult", "tiny_shakespeare"):
        with pytest.raises(UsageError, match=name):
            load(name, tmp_path)
        with pytest.raises(UsageError, match="--data-dir"):
            load(name, None)
