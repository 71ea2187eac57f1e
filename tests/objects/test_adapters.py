"""Pretrained, frozen and adapted models: dendrites are one more adapter, and leave others be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pbfx
from models import Case, assert_equal, perceptron, randomise, run
from pbfx.parts import parts_of
from pbfx.phase import Phase
from subjects import each_subject, loss_of


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@each_subject
@pytest.mark.parametrize("learning", ["perforated", "gradient"])
def test_dendrites_over_a_frozen_base(case: Case, learning: str):
    """The base never moves, in any phase; the dendrites learn; a plain optimizer loop suffices."""
    config = pbfx.Config(learning=learning, priming_batches=1, measure_every=2)
    model = pbfx.transform(case.build().requires_grad_(False), config)
    assert not trainable(model)
    pbfx.grow(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    roles = {name.rpartition(".")[2] for name in names}
    everything = {"weight", "bias", "to_soma", "to_dendrite"}
    assert roles == ({"to_soma"} if learning == "perforated" else everything)
    assert all("dendrites" in name for name in names)
    base = {n: v.clone() for n, v in model.named_parameters() if "dendrites" not in n}
    optimizer = torch.optim.Adam(trainable(model), lr=1e-2)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=3)
    x = case.input()
    while not tracker.complete:
        links = {n: v.detach().clone() for n, v in model.named_parameters() if "to_soma" in n}
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
        moved = [n for n, v in links.items() if not torch.equal(v, model.get_parameter(n))]
        assert bool(moved) is (tracker.phase is Phase.NEURON)
        tracker.step(float(len(tracker.history)))
        for name, value in base.items():
            assert torch.equal(model.get_parameter(name), value), name
        if tracker.phase is Phase.NEURON:
            assert all("dendrites" in n for n, p in model.named_parameters() if p.requires_grad)
    assert tracker.dendrites == 3


def test_a_partly_frozen_model_stays_so():
    model = pbfx.transform(perceptron())
    model.get_parameter("0.weight").requires_grad_(False)
    frozen = model.get_parameter("0.weight").clone()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1, weight_decay=0.1)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=1)
    while not tracker.complete:
        optimizer.zero_grad()
        loss_of(model, torch.randn(7, 5)).backward()
        optimizer.step()
        tracker.step(float(len(tracker.history)))
        learns = {n for n, p in model.named_parameters() if p.requires_grad}
        assert "0.weight" not in learns
        assert ("4.weight" in learns) is (tracker.phase is Phase.NEURON)
    assert torch.equal(model.get_parameter("0.weight"), frozen)


@each_subject
def test_pretrained_before_or_after_is_the_same(case: Case):
    checkpoint = case.build(seed=9).state_dict()
    before, after = case.build(), pbfx.transform(case.build())
    before.load_state_dict(checkpoint)
    before = pbfx.transform(before)
    assert str(after.load_state_dict(checkpoint)) == "<All keys matched successfully>"
    assert_equal(run(after, case.input()), run(before, case.input()))
    # Both go on alike, since the draws do not depend on the weights.
    randomise(pbfx.grow(before))
    randomise(pbfx.grow(after))
    assert_equal(run(after.eval(), case.input()), run(before.eval(), case.input()))


class Adapted(nn.Module):
    """A linear layer with a low-rank update beside it, written as people write it by hand."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base, self.drop, self.enabled = base, nn.Dropout(0.1), True
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        for parameter in base.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.up(self.down(self.drop(x))) if self.enabled else y

    def enable(self, enabled: bool = True) -> None:
        self.enabled = enabled

    @torch.no_grad()
    def merge(self, sign: int = 1) -> None:
        self.base.weight += sign * self.up.weight @ self.down.weight


def adapted(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(Adapted(nn.Linear(4, 6)), nn.ReLU(), Adapted(nn.Linear(6, 3)))


def switch(model: nn.Module, enabled: bool) -> None:
    for module in model.modules():
        if isinstance(module, Adapted):
            module.enable(enabled)


def test_hand_written_adapters_switch_and_merge_as_before():
    plain, model, x = adapted(), pbfx.transform(adapted()), torch.randn(5, 4)
    sites = {path for path in parts_of(model) if path}
    assert sites == {f"{layer}.{op}" for layer in "02" for op in ("base", "down", "up")}
    for enabled in (True, False, True):
        switch(plain, enabled)
        switch(model, enabled)
        for training in (True, False):
            expected = run(plain.train(training), x)
            assert_equal(run(model.train(training), x), expected)
    for layers in (plain, model):
        switch(layers, False)
        for layer in (layers[0], layers[2]):
            layer.merge()
    assert_equal(run(model, x), run(plain, x))


def test_hand_written_adapters_learn_beside_dendrites():
    config = pbfx.Config(include="*.base", priming_batches=1, measure_every=2)
    model = pbfx.transform(adapted(), config)
    assert set(parts_of(model)) == {"0.base", "2.base"}
    base = {n: p.clone() for n, p in model.named_parameters() if ".base." in n}
    lora = {n: p.detach().clone() for n, p in model.named_parameters() if ".base." not in n}
    optimizer = torch.optim.Adam(trainable(model), lr=1e-2)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=1)
    while not tracker.complete:
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model.train(), torch.randn(5, 4)).backward()
            optimizer.step()
        tracker.step(float(len(tracker.history)))
    assert all(torch.equal(model.get_parameter(n), value) for n, value in base.items())
    assert not any(torch.equal(model.get_parameter(n), value) for n, value in lora.items())
    assert model[0].base.dendrites.to_soma.any()
    grown = run(model.eval(), torch.ones(5, 4))
    # Merging folds the update into the soma, and the dendrites stay what they are.
    switch(model, False)
    model[0].merge(), model[2].merge()
    torch.testing.assert_close(run(model, torch.ones(5, 4)), grown)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def with_peft() -> nn.Module:
    peft = pytest.importorskip("peft", reason="the adapter library is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=["fc1", "fc2"], r=2, lora_dropout=0.1, init_lora_weights=False
    )
    return peft.get_peft_model(Net(), config)


@pytest.mark.filterwarnings("default")
def test_peft_adapters_are_bit_identical_and_switch():
    plain, model, x = with_peft(), pbfx.transform(with_peft()), torch.randn(5, 4)
    assert type(model) is type(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    for training in (True, False):
        expected = run(plain.train(training), x)
        assert_equal(run(model.train(training), x), expected)
    with plain.disable_adapter(), model.disable_adapter():
        assert_equal(run(model, x), run(plain, x))
    plain.merge_adapter(), model.merge_adapter()
    assert_equal(run(model, x), run(plain, x))
    plain.unmerge_adapter(), model.unmerge_adapter()
    assert_equal(run(model, x), run(plain, x))
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()


@pytest.mark.filterwarnings("default")
def test_peft_base_layers_are_sites_and_its_matrices_only_by_name():
    model = pbfx.transform(with_peft())
    sites = {
        s.name or path for path, part in parts_of(model).items() for s in part.perforation.sites
    }
    stem = "base_model.model"
    assert sites == {"head", f"{stem}.fc1.base_layer", f"{stem}.fc2.base_layer"}
    explained = " ".join(str(pbfx.explain(model)).split())
    assert "an adapter's weight, which merging folds into its base layer" in explained
    assert "lora_B.default" in explained
    chosen = pbfx.transform(with_peft(), pbfx.Config(include="*.lora_A.*"))
    assert set(parts_of(chosen)) == {f"{stem}.{fc}.lora_A.default" for fc in ("fc1", "fc2")}


@pytest.mark.filterwarnings("default")
def test_peft_and_dendrites_train_and_merge_together():
    config = pbfx.Config(priming_batches=1, measure_every=2)
    model, x = pbfx.transform(with_peft(), config), torch.randn(16, 4)
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(trainable(model), lr=1e-2)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=1)
    while not tracker.complete:
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model.train(), x).backward()
            optimizer.step()
        tracker.step(float(len(tracker.history)))
    assert all(torch.equal(model.get_parameter(n), value) for n, value in base.items())
    expected = run(model.eval(), x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged, x), expected, rtol=1e-5, atol=1e-5)
    assert merged.fc1.dendrites.to_soma.any()
