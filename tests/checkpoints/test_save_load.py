"""`pbfx.save` and `pbfx.load`: what comes back, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import pbfx
from learning.loops import (
    Around,
    Cnn,
    Mlp,
    copied,
    enter_dendrite_phase,
    identical,
    images,
    network,
    regression,
    run,
    same,
    sgd,
    train,
)
from pbfx import CheckpointError, Phase

TASK = regression(96)


def grown(learning: str = "perforated", **settings: object) -> tuple[nn.Module, pbfx.Tracker]:
    """Return a network with a trained dendrite and an untrained one."""
    torch.manual_seed(0)
    model = pbfx.transform(Mlp(), pbfx.Config(learning=learning, priming_batches=1, **settings))
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    policy = pbfx.Interval(1, 1)
    tracker = pbfx.Tracker(model, optimizer, scheduler, policy=policy, max_dendrites=9)
    while tracker.dendrites < 2:
        train(model, optimizer, TASK)
        tracker.step(len(tracker.history))
    return model, tracker


@pytest.mark.parametrize("learning", ["perforated", "gradient", "sham"])
def test_a_plain_model_becomes_the_saved_one(tmp_path: Path, learning: str) -> None:
    model, _ = grown(learning, activation="gelu", candidates=3, exclude="fc2")
    pbfx.save(model, tmp_path / "m")
    net = Mlp()
    loaded = pbfx.load(tmp_path / "m", net)
    assert same(copied(loaded.state_dict()), copied(model.state_dict()))
    assert identical(loaded.eval()(TASK.x), model.eval()(TASK.x))
    config = loaded.perforation.config
    assert (config.learning, config.activation, config.candidates) == (learning, "gelu", 3)
    assert loaded.structure() == model.structure()
    learns = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == learns
    # It shares the parameters of the plain one, as pbfx.transform does.
    assert loaded.fc1.weight is net.fc1.weight


def test_a_transformed_model_is_grown_in_place(tmp_path: Path) -> None:
    model, _ = grown()
    pbfx.save(model, tmp_path / "m")
    other = pbfx.transform(Mlp())
    assert pbfx.load(tmp_path / "m", other) is other
    assert same(copied(other.state_dict()), copied(model.state_dict()))


@pytest.mark.parametrize("saved", [0, 1])
def test_a_model_with_more_dendrites_is_cut_back(tmp_path: Path, saved: int) -> None:
    torch.manual_seed(0)
    model = pbfx.transform(Mlp())
    if saved:
        pbfx.grow(model, saved)
    expected = copied(model.state_dict())
    pbfx.save(model, tmp_path / "m")
    pbfx.grow(model, 2)
    pbfx.load(tmp_path / "m", model)
    assert same(copied(model.state_dict()), expected)


def test_sites_chosen_by_a_function_are_saved_by_name(tmp_path: Path) -> None:
    config = pbfx.Config(filter_fn=lambda module, path: module.out_features == 1)
    model = pbfx.grow(pbfx.transform(Mlp(), config))
    pbfx.save(model, tmp_path / "m")
    loaded = pbfx.load(tmp_path / "m", Mlp())
    assert {site.name for site in loaded.perforation.sites} == {"head"}
    assert same(copied(loaded.state_dict()), copied(model.state_dict()))


def test_names_that_look_like_patterns(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"a[0]": nn.Linear(3, 3), "a0": nn.Linear(3, 3)})

        def forward(self, x):
            return self.layers["a0"](self.layers["a[0]"](x))

    model = pbfx.transform(Named(), pbfx.Config(filter_fn=lambda _, path: "[" in path))
    pbfx.save(pbfx.grow(model), tmp_path / "m")
    loaded = pbfx.load(tmp_path / "m", Named())
    assert [site.name for site in loaded.perforation.sites] == ["layers.a[0]"]


def test_buffers_dtypes_and_shared_tensors(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)
            self.down = nn.Linear(4, 4)
            self.down.weight = self.up.weight
            self.register_buffer("view", torch.arange(12.0).view(3, 4)[:, 1])
            self.register_buffer("flag", torch.tensor([True, False]))
            self.register_buffer("empty", torch.zeros(0, 3))
            self.register_buffer("brain", torch.ones(2, dtype=torch.bfloat16))

        def forward(self, x):
            return self.down(self.up(x))

    model = pbfx.grow(pbfx.transform(Odd()))
    pbfx.save(model, tmp_path / "m")
    with torch.no_grad():
        other = Odd()
        other.view.zero_()
    loaded = pbfx.load(tmp_path / "m", other)
    assert same(copied(loaded.state_dict()), copied(model.state_dict()))
    assert loaded.down.weight is loaded.up.weight


def test_parts_of_a_larger_module(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def build() -> nn.Module:
        return Around(pbfx.transform(Mlp(outputs=5)))

    model = build()
    pbfx.grow(model, 2)
    pbfx.save(model, tmp_path / "m")
    loaded = pbfx.load(tmp_path / "m", build())
    assert same(copied(loaded.state_dict()), copied(model.state_dict()))


def test_compiled_models(tmp_path: Path) -> None:
    model, _ = grown()
    pbfx.save(torch.compile(model, backend="eager"), tmp_path / "m")
    other = pbfx.transform(Mlp())
    compiled = torch.compile(other, backend="eager")
    pbfx.load(tmp_path / "m", compiled)
    assert same(copied(other.state_dict()), copied(model.state_dict()))
    assert torch.allclose(compiled(TASK.x), model(TASK.x))


def test_a_file_saved_in_the_dendrite_phase_loads_as_the_network_alone(tmp_path: Path) -> None:
    """Without its tracker no one could ever finish the phase."""
    torch.manual_seed(0)
    model = pbfx.transform(Cnn())
    optimizer = sgd(model)
    tracker = enter_dendrite_phase(model, optimizer)
    train(model, optimizer, images(48))
    expected = network(model)
    pbfx.save(model, tmp_path / "m")
    pbfx.save(model, tmp_path / "t", tracker)
    for name in ("m", "t"):
        loaded = pbfx.load(tmp_path / name, Cnn())
        assert loaded.perforation.phase is Phase.NEURON
        # A site without a dendrite has no keys of its own.
        plain = {k: v for k, v in expected.items() if ".dendrites." not in k}
        assert same(copied(loaded.state_dict()), plain)
        assert all(p.requires_grad for p in loaded.parameters())
        loaded.train()
        assert loaded.dropout.training
        assert pbfx.Tracker(loaded, sgd(loaded), policy=pbfx.Interval(1)).step(0.0).restructured


def test_loading_leaves_the_random_stream_alone_without_a_tracker(tmp_path: Path) -> None:
    model, _ = grown()
    pbfx.save(model, tmp_path / "m")
    other = Mlp()
    before = torch.get_rng_state()
    pbfx.load(tmp_path / "m", other)
    assert torch.equal(before, torch.get_rng_state())


def test_a_file_holds_tensors_and_json_only(tmp_path: Path) -> None:
    model, tracker = grown()
    pbfx.save(model, tmp_path / "m", tracker)
    with safe_open(tmp_path / "m", framework="pt") as file:
        header = json.loads(file.metadata()["pbfx"])
        names = set(file.keys())
    assert {f"model/{name}" for name in model.state_dict()} <= names
    assert {name.split("/")[0] for name in names} == {"model", "tracker", "rng"}
    assert header["parts"][""]["dendrites"] == {"fc1": 2, "fc2": 2, "head": 2}


class Narrow(Mlp):
    def __init__(self) -> None:
        super().__init__(hidden=4)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 1)

    def forward(self, x):
        return self.first(x)


def of(make: Callable[[], nn.Module], **settings: object) -> Callable[[], nn.Module]:
    return lambda: pbfx.transform(make(), pbfx.Config(**settings))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            Narrow,
            r"(?s)m does not fit the model: Error\(s\) in loading state_dict for .*size mismatch",
        ),
        (of(Narrow), r"m does not fit the model: Error\(s\) in loading state_dict for "),
        (Other, "m does not fit Other: pbfx.Config: include='fc1' matches no eligible op"),
        (of(Other), r"it has dendrites at \['fc1', 'fc2', 'head'\], where the model has no site"),
        (of(Mlp, exclude="fc2"), r"it has dendrites at \['fc2'\], where the model has no site"),
        (of(Mlp, activation="relu"), "its activation is 'tanh', the model's 'relu'"),
        (of(Mlp, learning="sham"), "its learning is 'perforated', the model's 'sham'"),
        (
            lambda: Around(of(Mlp)()),
            r"its perforated parts are \[''\], the model's \['part'\]",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_untouched(
    tmp_path: Path, make: Callable[[], nn.Module], message: str
) -> None:
    model, _ = grown()
    pbfx.save(model, tmp_path / "m")
    other = make()
    keys, before = list(other.state_dict()), copied(other.state_dict())
    objects = [id(t) for t in other.state_dict(keep_vars=True).values()]
    code = getattr(other, "code", None)
    with pytest.raises(CheckpointError, match=message):
        pbfx.load(tmp_path / "m", other)
    assert list(other.state_dict()) == keys
    assert [id(t) for t in other.state_dict(keep_vars=True).values()] == objects
    assert same(before, copied(other.state_dict()))
    assert getattr(other, "code", None) == code


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    model, _ = grown()
    pbfx.save(model, tmp_path / "m")
    other = pbfx.transform(Mlp(), pbfx.Config(activation="silu", learning="sham", exclude="fc1"))
    with pytest.raises(CheckpointError, match=r"no site; its activation .*; its learning "):
        pbfx.load(tmp_path / "m", other)


def test_parts_of_a_plain_model_must_be_transformed_first(tmp_path: Path) -> None:
    pbfx.save(Around(pbfx.transform(Mlp(outputs=5))), tmp_path / "m")
    with pytest.raises(
        CheckpointError, match=r"of which parts were transformed \(part\); transform the same parts"
    ):
        pbfx.load(tmp_path / "m", Around(Mlp(outputs=5)))


def write_pickle(path: Path) -> None:
    torch.save(Mlp().state_dict(), path)


def write_garbage(path: Path) -> None:
    path.write_bytes(os.urandom(64))


def write_foreign(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path, {"format": "pt"})


def write_foreign_header(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path, {"pbfx": json.dumps([1])})


def write_newer(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path, {"pbfx": json.dumps({"format": 99})})


def write_older(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path, {"pbfx": json.dumps({"format": 1, "parts": {}})})


def write_broken_header(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path, {"pbfx": "{"})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            write_pickle,
            r"is not a pbfx checkpoint: .*never unpickles; give a file of torch.save to",
        ),
        (write_garbage, "is not a pbfx checkpoint"),
        (Path.touch, "is not a pbfx checkpoint"),
        (Path.mkdir, "is not a pbfx checkpoint"),
        (write_foreign, "is a safetensors file, but pbfx.save did not write it"),
        (write_foreign_header, "is a safetensors file, but pbfx.save did not write it"),
        (write_newer, "has format 99, this pbfx reads 2; update pbfx"),
        (write_older, "has format 1, this pbfx reads 2; .* an older file with the pbfx that wrote"),
        (write_broken_header, "is not a pbfx checkpoint"),
        (lambda path: None, "there is no file"),
    ],
)
def test_files_that_are_no_checkpoints(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "file"
    write(path)
    net = Mlp()
    before = copied(net.state_dict())
    with pytest.raises(CheckpointError, match=message) as error:
        pbfx.load(path, net)
    assert str(path) in str(error.value)
    assert same(before, copied(net.state_dict()))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    pbfx.save(pbfx.transform(Mlp()), tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match="is not a pbfx checkpoint"):
        pbfx.load(tmp_path / "m", Mlp())


def test_plain_models_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Mlp has no perforated parts; use torch.save for"):
        pbfx.save(Mlp(), tmp_path / "m")
    assert not os.listdir(tmp_path)


def test_state_that_is_no_tensor_is_refused_before_writing(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        calls = 3

        def get_extra_state(self) -> dict[str, int]:
            return {"calls": self.calls}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.calls = state["calls"]

    net = Mlp()
    net.head = Counting(5, 1)
    model = pbfx.transform(net)
    optimizer = sgd(model)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(2, 1))
    # A tracker can live with it: the best epoch's comes back when growing.
    tracker.step(0.5)
    model.head.calls = 4
    tracker.step(0.4)
    assert model.head.calls == 3
    with pytest.raises(CheckpointError, match=r"cannot save model/head._extra_state: a dict is no"):
        pbfx.save(model, tmp_path / "m")
    assert not os.listdir(tmp_path)


def test_state_that_is_no_data_is_refused_before_writing(tmp_path: Path) -> None:
    model = pbfx.transform(Mlp())
    optimizer = sgd(model)
    optimizer.param_groups[0]["note"] = {1, 2}
    tracker = pbfx.Tracker(model, optimizer)
    with pytest.raises(CheckpointError, match=r"cannot save tracker/optimizer/param_groups/0/note"):
        pbfx.save(model, tmp_path / "m", tracker)
    assert not os.listdir(tmp_path)


class TestTrackers:
    def build(self, **settings: object) -> tuple[nn.Module, pbfx.Tracker]:
        torch.manual_seed(1)
        model = pbfx.transform(Mlp(), pbfx.Config(**settings))
        optimizer = sgd(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return model, pbfx.Tracker(model, optimizer, scheduler)

    def refused(self, path: Path, model: nn.Module, tracker: pbfx.Tracker, message: str) -> None:
        optimizer = tracker.optimizer
        before = copied(model.state_dict())
        groups = [dict(g, params=list(g["params"])) for g in optimizer.param_groups]
        stream = torch.get_rng_state()
        with pytest.raises(CheckpointError, match=message):
            pbfx.load(path, model, tracker)
        assert same(before, copied(model.state_dict()))
        now = [dict(g) for g in optimizer.param_groups]
        assert [list(map(id, g.pop("params"))) for g in now] == [
            list(map(id, g.pop("params"))) for g in groups
        ]
        assert now == groups
        assert not optimizer.state
        assert tracker.history == ()
        assert tracker.phase is Phase.NEURON
        assert torch.equal(stream, torch.get_rng_state())
        # And it works as before.
        train(model, optimizer, TASK)
        tracker.step(0.0)

    def test_none_in_the_file(self, tmp_path: Path) -> None:
        model, _ = grown()
        pbfx.save(model, tmp_path / "m")
        other, tracker = self.build()
        self.refused(tmp_path / "m", other, tracker, "holds a model but no tracker; it was saved")

    def test_of_another_model(self, tmp_path: Path) -> None:
        model, tracker = grown()
        pbfx.save(model, tmp_path / "m", tracker)
        _, other = self.build()
        with pytest.raises(CheckpointError, match=r"pbfx.save: the tracker is another model's"):
            pbfx.save(model, tmp_path / "m", other)
        with pytest.raises(CheckpointError, match="the tracker is another model's; make it on the"):
            pbfx.load(tmp_path / "m", Mlp(), other)
        assert other.history == ()

    def test_without_a_scheduler(self, tmp_path: Path) -> None:
        model, tracker = grown()
        pbfx.save(model, tmp_path / "m", tracker)
        other = pbfx.transform(Mlp())
        bare = pbfx.Tracker(other, sgd(other))
        message = "the saved tracker had a scheduler, this one has no scheduler; give it the same"
        self.refused(tmp_path / "m", other, bare, message)

    def test_with_other_groups(self, tmp_path: Path) -> None:
        model, tracker = grown()
        pbfx.save(model, tmp_path / "m", tracker)
        other = pbfx.transform(Mlp())
        optimizer = torch.optim.SGD([{"params": [p]} for p in other.parameters()], 0.1)
        split = pbfx.Tracker(other, optimizer)
        message = "the saved tracker does not fit: the optimizer has 6 parameter groups, not 1"
        self.refused(tmp_path / "m", other, split, message)

    def test_with_parameters_from_elsewhere(self, tmp_path: Path) -> None:
        model, tracker = grown()
        pbfx.save(model, tmp_path / "m", tracker)
        other = pbfx.transform(Mlp())
        optimizer = torch.optim.SGD([*other.parameters(), nn.Parameter(torch.ones(1))], 0.1)
        more = pbfx.Tracker(other, optimizer)
        message = "the optimizer's groups hold another number of parameters from elsewhere"
        self.refused(tmp_path / "m", other, more, message)

    def test_whose_state_does_not_fit_the_model(self) -> None:
        """Directly: a state dict, before the model's own."""
        _, tracker = grown()
        other, fresh = self.build()
        with pytest.raises(
            pbfx.RestructureError, match=r"has no parameter .*; load its state dict"
        ):
            fresh.load_state_dict(tracker.state_dict())
        assert fresh.history == ()
        assert len(fresh.optimizer.param_groups[0]["params"]) == 6
        train(other, fresh.optimizer, TASK)
        fresh.step(0.0)

    def test_a_broken_state_moves_nothing(self, tmp_path: Path) -> None:
        """Whatever is wrong with it, and however late that shows."""
        model, tracker = grown()
        tracker.step(0.0)
        assert tracker.phase is Phase.DENDRITE
        state, values = tracker.state_dict(), model.state_dict()
        other, fresh = self.build()
        other.load_state_dict(values)
        del state["learners"]["head"]
        objects = list(map(id, fresh.optimizer.param_groups[0]["params"]))
        with pytest.raises(pbfx.RestructureError, match="KeyError: 'head'"):
            fresh.load_state_dict(state)
        assert list(map(id, fresh.optimizer.param_groups[0]["params"])) == objects
        assert fresh.history == ()
        assert all(p.requires_grad for n, p in other.named_parameters() if "dendr" not in n)

    def test_missing_where_one_manages_the_model(self, tmp_path: Path) -> None:
        model, tracker = grown()
        pbfx.save(model, tmp_path / "m", tracker)
        tracker.step(0.0)
        before = copied(model.state_dict())
        with pytest.raises(
            CheckpointError, match="another number of dendrites than the model, whose"
        ):
            pbfx.load(tmp_path / "m", model)
        assert same(before, copied(model.state_dict()))
        # With the tracker it may go back in time.
        pbfx.load(tmp_path / "m", model, tracker)
        assert tracker.phase is Phase.NEURON
        assert len(tracker.history) == 4
        assert all(p.requires_grad for n, p in model.named_parameters() if "dendr" not in n)
        train(model, tracker.optimizer, TASK)
        tracker.step(0.0)

    def test_not_missing_where_the_structure_is_the_same(self, tmp_path: Path) -> None:
        model, tracker = grown()
        pbfx.save(model, tmp_path / "m")
        expected = copied(model.state_dict())
        train(model, tracker.optimizer, TASK)
        pbfx.load(tmp_path / "m", model)
        assert same(copied(model.state_dict()), expected)
        train(model, tracker.optimizer, TASK)


def test_best_after_the_end_is_the_network_that_scored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = pbfx.transform(Mlp(), pbfx.Config(priming_batches=1))
    optimizer = sgd(model)
    tracker = pbfx.Tracker(
        model, optimizer, policy=pbfx.Interval(2, 1), max_dendrites=1, directory=tmp_path / "run"
    )
    run(model, optimizer, tracker, TASK)
    best = pbfx.load(tmp_path / "run" / "best.safetensors", Mlp())
    assert same(copied(best.state_dict()), copied(model.state_dict()))
    assert TASK.score(best) == tracker.best_score
