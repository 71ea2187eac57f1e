"""Every member of the zoo carries dendrites on some channels of each site."""

from __future__ import annotations

import pytest
import torch

import pbfx
from models import assert_equal, randomise
from pbfx.neurons import PackedDendrites
from selection.subsets import dendrites_of, grow_some, relative, restrict, sites_of
from zoo.member import tensors_of
from zoo.registry import ZOO
from zoo.test_zoo import ROUNDING, call, loss_of

each_member = pytest.mark.parametrize("member", ZOO.values(), ids=ZOO.keys())


@each_member
def test_a_subset_is_the_whole_with_other_links_at_zero(member):
    whole = pbfx.grow(pbfx.transform(member.fresh()), 2)
    part = grow_some(pbfx.transform(member.fresh()), 2)
    randomise(whole, scale=0.1)
    restrict(whole, part)
    plain = call(member.fresh(), member, training=False)
    found, expected = (call(model, member, training=False) for model in (part, whole))
    changed = [relative(a, b) for a, b in zip(found, plain, strict=True) if a.shape == b.shape]
    assert not changed or max(changed) > 1e-3
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) <= ROUNDING


@each_member
def test_growth_and_the_dendrite_phase_leave_outputs_alone(member):
    settings = pbfx.Config(priming_batches=1, measure_every=2)
    model = grow_some(pbfx.transform(member.fresh(), settings))
    assert_equal(call(model, member, True), call(member.fresh(), member, True))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    policy = pbfx.Interval(neuron_epochs=1, dendrite_epochs=1)
    tracker = pbfx.Tracker(model, optimizer, policy=policy, max_dendrites=3)
    wanted = call(model, member, training=False)
    assert tracker.step(0.0).phase is pbfx.Phase.DENDRITE
    before = {n: d.candidates.weight.clone() for n, d in dendrites_of(model).items()}
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(call(model, member, training=True)).backward()
        optimizer.step()
    assert any(not d.candidates.weight.equal(before[n]) for n, d in dendrites_of(model).items())
    tracker.step(0.0)
    for found, expected in zip(call(model, member, training=False), wanted, strict=True):
        assert relative(found, expected) <= ROUNDING
    sites = sites_of(model)
    for name, dendrites in dendrites_of(model).items():
        assert dendrites.count == (1 if name in member.silent else 2)
        n = len(dendrites.site.channels or range(sites[name].neurons))
        assert dendrites.to_soma.shape == (dendrites.count, n)


@each_member
def test_save_and_load(member, tmp_path):
    model = grow_some(pbfx.transform(member.fresh()), 2)
    randomise(model, scale=0.1)
    pbfx.save(model, tmp_path / "model.safetensors")
    wanted = call(model, member, training=False)
    for target in (member.fresh(seed=9), pbfx.transform(member.fresh(seed=9))):
        loaded = pbfx.load(tmp_path / "model.safetensors", target)
        assert_equal(call(loaded, member, training=False), wanted)


@each_member
def test_lowered(member):
    model = grow_some(pbfx.transform(member.fresh()), 2)
    randomise(model, scale=0.1)
    expected = call(model, member, training=False)
    lowered = pbfx.lower(model)
    args, kwargs = member.arguments(training=False)
    # As `call` does before it runs the forward.
    torch.manual_seed(3)
    for one, other in zip(tensors_of(lowered(*args, **kwargs)), expected, strict=True):
        assert relative(one, other) <= ROUNDING
    somewhere = any(d.channels is not None for d in dendrites_of(model).values())
    assert any(isinstance(m, PackedDendrites) for m in lowered.modules()) or not somewhere
