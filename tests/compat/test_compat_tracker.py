"""What the calls of both dialects do and return, over small nets."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import pbfx
from compat.rival_nets import Mixed
from pbfx.compat import globals_perforatedai as GPA
from pbfx.compat import library_perforatedai as LPA
from pbfx.compat import modules_perforatedai as MPA
from pbfx.compat import pb_globals as PBG
from pbfx.compat import pb_models as PBM
from pbfx.compat import pb_utils as PBU
from pbfx.compat import utils_perforatedai as UPA

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.fc2 = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


pytestmark = pytest.mark.usefixtures("script")


def perforated(**settings) -> nn.Module:
    for name, value in settings.items():
        getattr(GPA.pc, f"set_{name}")(value)
    return UPA.perforate_model(Net(), save_name="run")


def set_up(model: nn.Module, lr: float = 0.05, gamma: float = 0.5):
    GPA.pai_tracker.set_optimizer(torch.optim.Adam)
    GPA.pai_tracker.set_scheduler(StepLR)
    return GPA.pai_tracker.setup_optimizer(
        model, {"params": model.parameters(), "lr": lr}, {"step_size": 1, "gamma": gamma}
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def grow_until_complete(model: nn.Module, scores: list[float]) -> list[tuple[bool, bool]]:
    optimizer, _ = set_up(model)
    answers = []
    for score in scores:
        train(model, optimizer)
        same, restructured, complete = GPA.pai_tracker.add_validation_score(score, model)
        assert same is model
        answers.append((restructured, complete))
        if complete:
            break
        if restructured:
            again = set_up(model)
            assert again[0] is optimizer
    return answers


def held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_the_capacity_test_grows_three_times_and_says_so(caplog: pytest.LogCaptureFixture):
    model = perforated()
    plain = sum(p.numel() for p in Net().parameters())
    # What is not used costs nothing.
    assert UPA.count_params(model) == sum(p.numel() for p in model.parameters()) == plain
    with caplog.at_level(logging.INFO, "pbfx.compat"):
        answers = grow_until_complete(model, [0.5, 0.6, 0.7, 0.8, 0.9])
    assert answers == [(True, False)] * 3 + [(True, True)]
    assert "added 3 dendrites to every neuron" in caplog.text
    assert "set testing_dendrite_capacity to False" in caplog.text
    assert GPA.pai_tracker.member_vars["num_dendrites_added"] == 3
    assert UPA.count_params(model) == GPA.pai_tracker.member_vars["param_counts"][-1]
    assert GPA.pai_tracker.add_validation_score(0.9, model) == (model, False, True)


def test_perforated_mode_grows_in_two_steps_each():
    model = perforated(perforated_backpropagation=True)
    answers = grow_until_complete(model, [0.1 * i for i in range(10)])
    assert answers == [(True, False)] * 6 + [(True, True)]


def test_restructured_is_true_only_when_something_was():
    model = perforated(
        testing_dendrite_capacity=False, n_epochs_to_switch=2, max_dendrites=1, find_best_lr=False
    )
    answers = grow_until_complete(model, [0.5, 0.6, 0.6, 0.6, 0.7, 0.7, 0.7])
    assert answers == [
        (False, False),
        (False, False),
        (False, False),
        (True, False),
        (False, False),
        (False, False),
        (True, True),
    ]


def test_without_dendrites_the_run_ends_at_its_plateau():
    GPA.pc.set_testing_dendrite_capacity(False)
    GPA.pc.set_n_epochs_to_switch(2)
    model = UPA.perforate_model(Net(), doing_pai=False, save_name="run")
    answers = grow_until_complete(model, [0.5, 0.6, 0.6, 0.6])
    assert answers[-1] == (True, True)
    assert GPA.pai_tracker.member_vars["num_dendrites_added"] == 0


def test_set_up_again_returns_the_living_pair():
    model = perforated()
    optimizer, scheduler = set_up(model)
    train(model, optimizer)
    GPA.pai_tracker.add_validation_score(0.5, model)
    assert set_up(model) == (optimizer, scheduler)
    assert held(optimizer) == {id(p) for p in model.parameters()}
    # The moments of what was there before are kept.
    assert model.fc1.bias in optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_set_up_with_other_arguments_makes_a_pair_that_the_tracker_adopts():
    model = perforated(testing_dendrite_capacity=False)
    first, _ = set_up(model)
    train(model, first)
    GPA.pai_tracker.add_validation_score(0.5, model)
    second, scheduler = set_up(model, lr=0.01)
    assert second is not first
    train(model, second)
    GPA.pai_tracker.add_validation_score(0.6, model)
    assert second.param_groups[0]["lr"] == 0.005
    assert scheduler.last_epoch == 1
    GPA.pai_tracker.add_validation_score(0.6, model, force_switch=True)
    assert held(second) == {id(p) for p in model.parameters()}
    assert second.param_groups[0]["lr"] == 0.01


def test_every_form_of_optimizer_and_scheduler():
    model = perforated(testing_dendrite_capacity=False)
    tracker = GPA.pai_tracker
    with pytest.raises(pbfx.ConfigError, match="set_optimizer"):
        tracker.setup_optimizer(model, {"lr": 0.1})
    tracker.set_optimizer(torch.optim.SGD)
    optimizer, scheduler = tracker.setup_optimizer(model, {"lr": 0.1})
    assert isinstance(optimizer, torch.optim.SGD)
    assert scheduler is None
    groups = [{"params": model.fc1.parameters(), "lr": 0.2}, {"params": model.fc2.parameters()}]
    grouped, _ = tracker.setup_optimizer(model, {"params": groups, "lr": 0.1})
    assert [group["lr"] for group in grouped.param_groups] == [0.2, 0.1]
    with pytest.raises(pbfx.ConfigError, match="set_scheduler"):
        tracker.setup_optimizer(model, {"lr": 0.1}, {"patience": 0})
    tracker.set_scheduler(ReduceLROnPlateau)
    optimizer, scheduler = tracker.setup_optimizer(
        model, {"lr": 0.1}, {"mode": "max", "patience": 0}, model.parameters()
    )
    for score in (0.5, 0.4, 0.3):
        train(model, optimizer)
        tracker.add_validation_score(score, model)
    assert scheduler.best == 0.5
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.001)
    with pytest.raises(pbfx.ConfigError, match="set_optimizer_instance"):
        tracker.set_optimizer(optimizer)
    with pytest.raises(pbfx.ConfigError, match="several parameter groups"):
        tracker.set_optimizer_instance(optimizer, [optimizer])


def test_a_scheduler_that_the_script_steps_is_left_alone():
    model = perforated()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    GPA.pai_tracker.set_optimizer_instance(optimizer)
    for epoch in range(3):
        train(model, optimizer)
        scheduler.step()
        GPA.pai_tracker.add_validation_score(0.5 + 0.1 * epoch, model)
    assert optimizer.param_groups[0]["lr"] == 0.0125
    assert held(optimizer) == {id(p) for p in model.parameters()}


def test_a_new_optimizer_after_each_growth_loses_nothing():
    """Also one that was made of what requires gradients while the network was frozen."""
    model = perforated(perforated_backpropagation=True)
    complete = False
    for epoch in range(7):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        GPA.pai_tracker.set_optimizer_instance(optimizer)
        before = model.fc1.weight.detach().clone()
        train(model, optimizer)
        frozen = GPA.pai_tracker.member_vars["mode"] == "p"
        assert torch.equal(model.fc1.weight, before) == frozen
        _, restructured, complete = GPA.pai_tracker.add_validation_score(0.1 * epoch, model)
        assert restructured
        if not complete and GPA.pai_tracker.member_vars["mode"] == "n":
            # The script may as well go on with the one that it has.
            before = model.fc1.weight.detach().clone()
            train(model, optimizer)
            assert not torch.equal(model.fc1.weight, before)
    assert complete


def test_a_second_model_does_not_break_the_first():
    first = perforated()
    one, _ = set_up(first)
    second = perforated()
    two, _ = set_up(second)
    train(first, one)
    train(second, two)
    tracker = GPA.pai_tracker
    assert tracker.add_validation_score(0.5, first)[1]
    assert held(one) == {id(p) for p in first.parameters()}
    assert set_up(first)[0] is one
    # It is still the second's, which has not grown.
    assert GPA.pai_tracker.member_vars["num_dendrites_added"] == 0
    assert GPA.pai_tracker.add_validation_score(0.5, nn.DataParallel(second))[1]
    assert GPA.pai_tracker.member_vars["num_dendrites_added"] == 1


def test_mistakes_are_told_with_their_remedy():
    plain = Net()
    model = UPA.perforate_model(plain, save_name="run")
    tracker = GPA.pai_tracker
    with pytest.raises(pbfx.TrackerError, match="no optimizer yet"):
        tracker.add_validation_score(0.5, model)
    set_up(model)
    with pytest.raises(pbfx.ConfigError, match="the score comes first"):
        tracker.add_validation_score(model, 0.5)
    with pytest.raises(pbfx.TrackerError, match="is the plain model"):
        tracker.add_validation_score(0.5, plain)
    with pytest.raises(pbfx.TrackerError, match="is a copy"):
        tracker.add_validation_score(0.5, copy.deepcopy(model))
    with pytest.raises(pbfx.TrackerError, match=r"nn\.Module"):
        tracker.add_validation_score(0.5, None)
    with pytest.raises(pbfx.ScoreError):
        tracker.add_validation_score(float("nan"), model)
    with pytest.raises(pbfx.PbfxError, match="add_validation_score"):
        tracker.add_validation_scores(0.5, model)
    with pytest.raises(pbfx.PbfxError, match="perforate_model"):
        UPA.perforate_modle(model)
    with pytest.raises(KeyError, match="num_dendrites_added"):
        tracker.member_vars["num_dendrite_added"]
    with pytest.raises(pbfx.ConfigError, match=r"nn\.Module"):
        UPA.perforate_model(Net)
    with pytest.raises(pbfx.TrackerError, match="before training"):
        tracker.initialize(doing_pai=True)
    assert not tracker.history


def test_the_oldest_dialect_converts_and_initializes_apart():
    model = PBU.convertNetwork(Net())
    PBG.pbTracker.initialize(
        doingPB=True, saveName="old", makingGraphs=False, maximizingScore=False
    )
    PBG.pbTracker.setOptimizer(torch.optim.Adam)
    optimizer, scheduler = PBG.pbTracker.setupOptimizer(
        net=model, optArgs={"params": model.parameters(), "lr": 0.1}
    )
    assert scheduler is None
    train(model, optimizer)
    PBG.pbTracker.addExtraScore(score=0.1, extraScoreName="train")
    _, restructured, _ = PBG.pbTracker.addValidationScore(0.5, model, "old")
    assert restructured
    assert PBG.pbTracker.memberVars["mode"] == "p"
    assert PBG.pbTracker.memberVars["numEpochsRun"] == 0
    assert Path("old/oldScores.csv").exists()


def test_lists_say_where_dendrites_grow():
    model = perforated(module_ids_to_track=[".fc2"], modules_to_skip=[nn.Conv2d])
    assert [site.name for site in pbfx.explain(model).sites] == ["fc1"]
    assert len(UPA.get_pai_network_params(model)) == 2


def test_modules_are_replaced_before_they_are_perforated():
    GPA.pc.set_modules_to_replace([nn.ReLU])
    GPA.pc.set_replacement_modules([lambda _: nn.Tanh()])
    model = UPA.perforate_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), save_name="run")
    assert isinstance(model[1], nn.Tanh)


def test_workarounds_are_accepted_and_change_nothing():
    group = GPA.PAISequential([nn.Linear(4, 6), nn.BatchNorm1d(6)])
    model = UPA.perforate_model(nn.Sequential(group, nn.Linear(6, 2)), save_name="run")
    assert "0.model.0.weight" in model.state_dict()
    (site, _) = pbfx.explain(model).sites
    assert site.norm is not None
    with pytest.warns(UserWarning, match="known from the op"):
        model[1].set_this_output_dimensions([-1, 0])
    model[1].setThisInputDimensions([-1, 0])
    network = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="without being regrouped"):
        assert LPA.ResNetPAI(network) is network
    with pytest.warns(UserWarning, match="without a wrapper"):
        assert MPA.PAINeuronModule(network, "fc") is network
    with pytest.warns(UserWarning, match="processors have nothing to do"):
        GPA.pc.append_modules_with_processing([nn.LSTM])
    assert issubclass(PBM.LSTMCellProcessor, LPA.PAIProcessor)
    assert LPA.LSTMProcessor().post_n1("out") == "out"


def test_a_perforated_model_is_pickled_and_copied_without_its_tracker():
    model = perforated()
    optimizer, _ = set_up(model)
    train(model, optimizer)
    GPA.pai_tracker.add_validation_score(0.5, model)
    for twin in (pickle.loads(pickle.dumps(model)), UPA.deep_copy_pai(model)):
        assert torch.equal(twin(X), model(X))
        with pytest.raises(pbfx.TrackerError, match="copy"):
            GPA.pai_tracker.add_validation_score(0.5, twin)


def rows(name: str) -> list[list[str]]:
    return [line.split(",") for line in Path("run", name).read_text().splitlines()]


def test_the_run_folder_tells_the_run():
    model = perforated(history_lookback=2)
    optimizer, _ = set_up(model)
    for epoch, score in enumerate((0.5, 0.7, 0.6)):
        GPA.pai_tracker.start_epoch()
        train(model, optimizer)
        GPA.pai_tracker.add_extra_score(torch.tensor(10.0 + epoch), "train")
        if epoch:
            GPA.pai_tracker.add_test_score(0.25, "test")
        GPA.pai_tracker.stop_epoch()
        GPA.pai_tracker.add_validation_score(score, model)
    assert rows("runScores.csv") == [
        ["Epochs", "Validation Scores", "Validation Running Scores", "train", "test"],
        ["0", "0.5", "0.5", "10.0", ""],
        ["1", "0.7", "0.7", "11.0", "0.25"],
        ["2", "0.6", "0.6", "12.0", "0.25"],
    ]
    counts = GPA.pai_tracker.member_vars["param_counts"]
    assert counts == sorted(set(counts))
    assert rows("run_best_arch_scores.csv")[1:] == [
        [str(counts[0]), "0.5", "10.0", ""],
        [str(counts[1]), "0.7", "11.0", "0.25"],
        [str(counts[2]), "0.6", "12.0", "0.25"],
    ]
    assert rows("runparam_counts.csv")[1:] == [[str(i), str(c)] for i, c in enumerate(counts)]
    assert rows("runswitch_epochs.csv")[1:] == [["0", "0"], ["1", "1"]]
    assert rows("runlearning_rate.csv")[1:] == [["0", "0.05"], ["1", "0.05"], ["2", "0.05"]]
    assert all(float(row[1]) > 0 and row[2] == "" for row in rows("runTimes.csv")[1:])
    assert not Path("run/run.png").exists()
    GPA.pai_tracker.save_graphs()
    assert Path("run/run.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path("run").glob(".*"))


def test_the_tables_cost_milliseconds_a_score():
    model = perforated(testing_dendrite_capacity=False, switch_mode=3, test_saves=False)
    train(model, set_up(model)[0])
    times = []
    for epoch in range(60):
        GPA.pai_tracker.add_extra_score(0.1, "train")
        since = time.perf_counter()
        GPA.pai_tracker.add_validation_score(0.01 * epoch, model)
        times.append(time.perf_counter() - since)
    # The median: the machine may be busy. It was 2 ms where this was written.
    assert sorted(times)[30] < 0.05


def test_without_saves_only_the_end_is_written():
    model = perforated(test_saves=False, drawing_pai=False)
    grow_until_complete(model, [0.5, 0.6, 0.7, 0.8])
    assert [path.name for path in Path("run").glob("*.safetensors")] == ["best.safetensors"]
    assert not Path("run/run.png").exists()


def test_a_run_goes_on_in_another_process():
    scores = [0.5, 0.6, 0.6, 0.6, 0.65, 0.7, 0.7, 0.7, 0.7]
    settings = {"testing_dendrite_capacity": False, "n_epochs_to_switch": 2, "max_dendrites": 1}

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, scores: list[float]) -> None:
        for score in scores:
            train(model, optimizer)
            GPA.pai_tracker.add_extra_score(score, "twin")
            GPA.pai_tracker.add_validation_score(score, model)

    whole = perforated(**settings)
    run(whole, set_up(whole)[0], scores[:5])
    UPA.save_system(whole, "run", "mine")
    UPA.save_net(whole, "run", "net")
    run(whole, GPA.pai_tracker.optimizer, scores[5:7])
    table = Path("run/runScores.csv").read_text()

    again = UPA.load_system(perforated(**settings), "run", "mine", True)
    assert GPA.pai_tracker.dendrites == 0
    optimizer, _ = set_up(again)
    assert GPA.pai_tracker.dendrites == 1
    run(again, optimizer, scores[5:7])
    assert torch.equal(again(X), whole(X))
    assert Path("run/runScores.csv").read_text().splitlines()[-2:] == table.splitlines()[-2:]

    for name in ("latest", "best_model", "net"):
        loaded = UPA.load_system(perforated(**settings), "run", name)
        assert torch.isfinite(loaded(X)).all()
    assert torch.equal(UPA.load_net(perforated(**settings), "run", "latest")(X), whole(X))
    with pytest.raises(pbfx.CheckpointError, match="best, last, mine, net"):
        UPA.load_system(again, "run", "other")


def test_files_of_3x_are_read_where_scripts_load_them():
    files = Path(__file__).with_name("files")
    wanted = load_file(files / "mixed-3" / "expected.safetensors")
    model = UPA.perforate_model(Mixed(), save_name="run")
    UPA.load_system(model, str(files / "mixed-3"), "best_model", True)
    model.eval()
    assert torch.allclose(model(wanted["x"]), wanted["y"], atol=1e-6)
