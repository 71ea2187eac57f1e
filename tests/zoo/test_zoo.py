"""Every member of the zoo does everything that is promised for any PyTorch model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pbfx
from benchmarks.weights import Read, left_out, nearest_owner, weights_read
from models import assert_equal, randomise
from pbfx.parts import parts_of
from pbfx.passes.context import PassContext
from pbfx.paths import join
from pbfx.pipeline import run_passes
from zoo.member import Member, tensors_of
from zoo.registry import ZOO

each_member = pytest.mark.parametrize("member", ZOO.values(), ids=ZOO.keys())
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# ‖out - ref‖ / ‖ref‖ in float32.
ROUNDING = 1e-5


def call(model: nn.Module, member: Member, training: bool, seed: int = 3) -> list[Tensor]:
    """Run the forward with torch's global stream at `seed`, so that dropouts fall alike."""
    args, kwargs = member.arguments(training)
    torch.manual_seed(seed)
    return tensors_of(model.train(training)(*args, **kwargs))


def loss_of(outputs: list[Tensor]) -> Tensor:
    learning = [out for out in outputs if out.requires_grad]
    assert learning
    # Not a plain sum: a softmax or a norm at the end would make its gradient vanish.
    return sum((out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum() for out in learning)


def sites_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameter beside which each site's dendrites live, by the site's path."""
    return {
        join(path, site.name): part.get_parameter(site.home)
        for path, part in parts_of(model).items()
        for site in part.perforation.sites
    }


def distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def reads(model: nn.Module, member: Member) -> list[Read]:
    """Return the weights that linear and conv ops read in a training and an evaluation pass."""
    return weights_read(
        model, lambda: [call(model, member, training) for training in (True, False)]
    )


def state_of(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


@each_member
def test_the_zoo_counts_right(member):
    """What the record calls possible is what a listener on torch's functions hears."""
    names = sorted(read.name for read in reads(member.fresh(), member))
    assert len(names) == member.possible, names


@each_member
def test_capture(member):
    plain = member.fresh()
    modules = {path: (m, dict(m.__dict__)) for path, m in plain.named_modules()}
    before, stream = state_of(plain), torch.get_rng_state()
    model = pbfx.transform(plain)

    assert torch.equal(torch.get_rng_state(), stream)
    assert isinstance(model, type(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {path: type(m) for path, m in plain.named_modules()} == {
        path: type(m) for path, (m, _) in modules.items()
    }
    for path, module in plain.named_modules():
        assert module is modules[path][0]
        assert module.__dict__.keys() == modules[path][1].keys()
    assert_equal(state_of(plain), before)
    own = {id(t) for t in [*plain.parameters(), *plain.buffers()]}
    assert {id(t) for t in [*model.parameters(), *model.buffers()]} == own

    explanation = pbfx.explain(model)
    said = {name: f"{op}: {reason}" for name, op, reason in explanation.skipped}
    missed = [read.name for read in left_out(reads(plain, member), model)]
    assert sorted(missed) == sorted(member.left_out), str(explanation)
    for name, words in member.left_out.items():
        assert words in (nearest_owner(name, said) or "nothing"), str(explanation)
    assert len(explanation.sites) == member.possible - len(missed)
    assert all(words in said[name] for name, words in member.reported.items())
    assert {part.perforation.rung for part in parts_of(model).values()} == set(member.rungs.split())


@each_member
@both_modes
def test_outputs_are_identical(member, training):
    plain, model = member.fresh(), pbfx.transform(member.fresh())
    wanted, found = call(plain, member, training), call(model, member, training)
    assert_equal(found, wanted)
    # What a training pass leaves in running statistics too.
    assert_equal(state_of(model), state_of(plain))
    loss_of(wanted).backward()
    loss_of(found).backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


@each_member
def test_methods_live_on(member):
    plain, model = member.fresh().eval(), pbfx.transform(member.fresh()).eval()
    for name, method in member.methods.items():
        wanted, found = method(plain), method(model)
        if tensors_of(wanted):
            assert_equal(tensors_of(found), tensors_of(wanted))
        else:
            assert found == wanted, name
    if member.methods:
        # They compute with dendrites, too.
        pbfx.grow(model)
        randomise(model, scale=2.0)
        args, kwargs = member.arguments(training=False)
        assert tensors_of(model(*args, **kwargs))
        for method in member.methods.values():
            method(model)


@each_member
@both_modes
def test_growth_leaves_outputs_alone(member, training):
    wanted = call(member.fresh(), member, training)
    model = pbfx.grow(pbfx.transform(member.fresh()))
    assert_equal(call(model, member, training), wanted)

    model = pbfx.grow(pbfx.grow(pbfx.transform(member.fresh())), 2)
    assert {site.dendrites for site in pbfx.explain(model).sites} == {3}
    for found, expected in zip(call(model, member, training), wanted, strict=True):
        assert distance(found, expected) <= ROUNDING


@each_member
def test_dendrites_matter_and_learn(member):
    plain = call(member.fresh(), member, training=True)
    model = pbfx.grow(pbfx.transform(member.fresh()), 3)
    # The weights that this pass reaches: a mixture leaves experts out, an option leaves heads out.
    loss_of(call(model, member, training=True)).backward()
    reached = {name for name, p in sites_of(model).items() if p.grad is not None and p.grad.any()}
    model.zero_grad()

    # Small ones: a unit of a few neurons would else die behind its relu.
    randomise(model, scale=0.1)
    outputs = call(model, member, training=True)
    assert any(
        a.shape != b.shape or distance(a, b) > 100 * ROUNDING
        for a, b in zip(outputs, plain, strict=True)
    )
    loss_of(outputs).backward()
    learning = {
        join(path, name): module.to_soma.grad
        for path, part in parts_of(model).items()
        for name, module in part.grown().items()
    }
    assert reached
    assert [n for n in sorted(reached) if learning[n] is None or not learning[n].any()] == []


def assert_nothing_is_left_to_rewrite(model: nn.Module) -> None:
    for part in parts_of(model).values():
        perforation = part.perforation
        records = run_passes(part, PassContext(perforation.sites, perforation.phase))
        assert [record for record in records if record.rewrites] == []


@each_member
def test_dendrite_phase(member):
    model = pbfx.transform(member.fresh(), pbfx.Config(priming_batches=1, measure_every=2))
    # Momentum and decay would move a base that is not really frozen.
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1)

    def train() -> None:
        optimizer.zero_grad()
        loss_of(call(model, member, training=True)).backward()
        optimizer.step()

    train()
    model.zero_grad()
    base = {name: t.clone() for name, t in model.state_dict().items()}
    wanted = call(model, member, training=False)
    policy = pbfx.Interval(neuron_epochs=1, dendrite_epochs=1)
    tracker = pbfx.Tracker(model, optimizer, policy=policy, max_dendrites=1)
    assert tracker.step(0.0).phase is pbfx.Phase.DENDRITE
    assert_nothing_is_left_to_rewrite(model)
    candidates = {n: t.clone() for n, t in model.state_dict().items() if n not in base}
    for _ in range(4):
        train()
    moved = [n for n, t in model.state_dict().items() if n in base and not torch.equal(t, base[n])]
    assert moved == []
    assert any(not torch.equal(model.state_dict()[n], t) for n, t in candidates.items())
    step = tracker.step(0.0)
    assert (step.phase, step.dendrites) == (pbfx.Phase.NEURON, 1)
    assert_nothing_is_left_to_rewrite(model)
    assert {site.name: site.dendrites for site in pbfx.explain(model).sites} == {
        name: 0 if name in member.silent else 1 for name in sites_of(model)
    }
    assert_equal(call(model, member, training=False), wanted)
    train()
    links = [t for name, t in model.state_dict().items() if name.endswith("to_soma")]
    assert any(link.any() for link in links)


@each_member
def test_save_and_load(member, tmp_path):
    model = pbfx.grow(pbfx.transform(member.fresh()), 2)
    randomise(model)
    pbfx.save(model, tmp_path / "model.safetensors")
    wanted = call(model, member, training=False)
    plain = member.fresh(seed=9)
    for target in (plain, pbfx.transform(member.fresh(seed=9))):
        loaded = pbfx.load(tmp_path / "model.safetensors", target)
        assert isinstance(loaded, type(plain))
        assert_equal(call(loaded, member, training=False), wanted)
    # A checkpoint of the plain model, into the transformed one.
    transformed = pbfx.transform(member.fresh(seed=9))
    transformed.load_state_dict(member.fresh().state_dict())
    assert_equal(
        call(transformed, member, training=False), call(member.fresh(), member, training=False)
    )
