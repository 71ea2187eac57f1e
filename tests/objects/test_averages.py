"""Averages that scripts make of a model before it grows: they grow with it and are never stale."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import pbfx
from models import Case, assert_equal, run
from pbfx.parts import parts_of
from pbfx.perforated import update_followers
from pbfx.restructure import restructuring
from subjects import SUBJECTS, each_subject, gradients, loss_of, make

DECAY = 0.9


def average(model: nn.Module, use_buffers: bool = False) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=use_buffers)


def expect(ema: AveragedModel, model: nn.Module) -> dict[str, Tensor]:
    """Return what the next update has to make of the average, by the definition of an EMA."""
    return {
        name: torch.lerp(mine.detach(), model.get_parameter(name).detach(), 1 - DECAY)
        for name, mine in ema.module.named_parameters()
    }


@each_subject
@pytest.mark.parametrize("learning", ["perforated", "gradient"])
def test_an_average_follows_a_tracked_model(case: Case, learning: str):
    """Through every phase: same names and shapes, exact averages, an output that never jumps."""
    model = pbfx.transform(
        case.build(), pbfx.Config(learning=learning, priming_batches=1, measure_every=2)
    )
    ema = average(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=2)
    ema.update_parameters(model)
    x, phases = case.input(), set()
    while not tracker.complete:
        phases.add(tracker.phase)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model.train(), x).backward()
            optimizer.step()
            wanted = expect(ema, model)
            ema.update_parameters(model)
            for name, value in wanted.items():
                torch.testing.assert_close(ema.module.get_parameter(name), value)
        before = run(ema.eval(), x)
        tracker.step(float(len(tracker.history)))
        names = [name for name, _ in model.named_parameters()]
        assert [name for name, _ in ema.module.named_parameters()] == names
        assert [name for name, _ in ema.module.named_buffers()] == [
            name for name, _ in model.named_buffers()
        ]
        for name, parameter in model.named_parameters():
            mine = ema.module.get_parameter(name)
            assert mine is not parameter
            assert mine.shape == parameter.shape
        for one, other in zip(run(ema, x), before, strict=True):
            torch.testing.assert_close(one, other)
    assert len(phases) == (2 if learning == "perforated" else 1)
    assert tracker.dendrites == 2
    ema.update_parameters(model)
    twin = average(model)
    twin.load_state_dict(ema.state_dict())
    assert_equal(run(twin.eval(), x), run(ema.eval(), x))


def test_new_dendrites_come_with_their_values():
    """Frozen directions equal the model's at once; only the links to the soma are averaged."""
    model = make(SUBJECTS["parts"], "grown")
    ema = average(model)
    pbfx.grow(model)
    for path, part in parts_of(model).items():
        for name, theirs in part.grown().items():
            mine = parts_of(ema.module)[path].grown()[name]
            for role, value in theirs.named_parameters():
                assert torch.equal(mine.get_parameter(role), value)


def test_an_average_with_buffers_and_batch_norm_follows():
    case = SUBJECTS["convolutional"]
    model = make(case, "plain")
    ema = average(model, use_buffers=True)
    swa = AveragedModel(model)
    for _ in range(2):
        ema.update_parameters(model)
        swa.update_parameters(model)
        pbfx.grow(model)
    update_bn([case.input(seed) for seed in range(3)], swa)
    assert not torch.equal(swa.module.norm.running_mean, model.norm.running_mean)
    assert run(swa.eval(), case.input())[0].isfinite().all()


def test_loading_a_grown_state_takes_the_average_along():
    case = SUBJECTS["nested"]
    model, grown = make(case, "plain"), make(case, "grown", seed=1)
    ema = average(model)
    model.load_state_dict(grown.state_dict())
    ema.update_parameters(model)
    assert_equal(run(ema.eval(), case.input()), run(model.eval(), case.input()))


def test_loading_a_file_takes_the_average_along(tmp_path):
    case = SUBJECTS["parts"]
    grown = make(case, "grown", seed=1)
    pbfx.save(grown, tmp_path / "grown.safetensors")
    model = make(case, "plain")
    ema = average(model)
    pbfx.load(tmp_path / "grown.safetensors", model)
    ema.update_parameters(model)
    assert_equal(run(ema.eval(), case.input()), run(model.eval(), case.input()))


def test_an_average_inside_a_larger_model_follows():
    part = make(SUBJECTS["parts"], "plain")
    whole = nn.ModuleDict({"student": part, "other": nn.Linear(2, 2)})
    ema = average(whole)
    pbfx.grow(part)
    names = [name for name, _ in whole.named_parameters()]
    assert [name for name, _ in ema.module.named_parameters()] == names


def test_other_copies_are_left_alone():
    model = make(SUBJECTS["parts"], "plain")
    kept, ema = copy.deepcopy(model), average(model)
    tracked = average(model).module
    pbfx.Tracker(tracked, torch.optim.SGD(tracked.parameters(), lr=0.1))
    pbfx.grow(model)
    assert not any("dendrites" in name for name in kept.state_dict())
    assert not any("dendrites" in name for name in tracked.state_dict())
    assert any("dendrites" in name for name in ema.module.state_dict())
    # A copy of the average is nobody's average, until it takes the structure as a state.
    again = copy.deepcopy(ema)
    pbfx.grow(model)
    shapes = [p.shape for p in model.parameters()]
    assert [p.shape for p in again.module.parameters()] != shapes
    again.module.load_state_dict(model.state_dict())
    assert [p.shape for p in again.module.parameters()] == shapes


def test_a_dropped_average_is_forgotten():
    model = make(SUBJECTS["parts"], "plain")
    ema = average(model)
    part = parts_of(model)["up"]
    assert len(part.perforation.followers) == 1
    del ema
    gc.collect()
    assert not part.perforation.followers


def test_a_failed_restructure_leaves_the_average_as_it_was():
    case = SUBJECTS["nested"]
    model = make(case, "grown")
    ema = average(model)
    before = run(ema.eval(), case.input())
    names = [name for name, _ in ema.named_parameters()]
    states = {name: value.clone() for name, value in ema.state_dict().items()}

    def grow_and_fail() -> None:
        with restructuring(model):
            for part in parts_of(model).values():
                for site in part.perforation.sites:
                    part.ensure_dendrites(site).resize(5)
                part.rebuild()
                update_followers(part)
            raise ValueError("no")

    with pytest.raises(pbfx.RestructureError, match="undone"):
        grow_and_fail()
    assert [name for name, _ in ema.named_parameters()] == names
    assert all(torch.equal(value, states[name]) for name, value in ema.state_dict().items())
    assert_equal(run(ema.eval(), case.input()), before)


def test_the_average_of_a_frozen_model_takes_no_gradients():
    model = make(SUBJECTS["parts"], "grown")
    ema = average(model)
    loss_of(model, SUBJECTS["parts"].input()).backward()
    pbfx.grow(model)
    assert not gradients(ema)
