"""A transformed model computes what the user's does, shares its tensors, and leaves it alone."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import pbfx
from models import CASES, Case, assert_equal, each_case, outputs, run
from pbfx.kept import kept_modules
from pbfx.restructure import start_dendrite_phase


def portrait(model: nn.Module) -> dict:
    """Return everything about a model that transform might touch, in comparable form."""
    return {
        path: {
            name: [(key, id(item)) for key, item in value.items()]
            if isinstance(value, dict)
            else id(value)
            for name, value in module.__dict__.items()
        }
        for path, module in model.named_modules(remove_duplicate=False)
    }


@each_case
@pytest.mark.parametrize("training", [True, False])
def test_output_is_bit_identical(case: Case, training: bool):
    ours = pbfx.transform(case.build()).train(training)
    plain = case.build().train(training)
    x = case.input()
    for seed in (3, 4):
        assert_equal(run(ours, x, seed), run(plain, x, seed))
    # Running statistics moved alike, too.
    assert_equal(
        [t.float() for t in ours.state_dict().values()],
        [t.float() for t in plain.state_dict().values()],
    )


@each_case
def test_gradients_are_bit_identical(case: Case):
    ours, plain = pbfx.transform(case.build()), case.build()
    x = case.input()
    for model in (ours, plain):
        sum(out.square().sum() for out in run(model, x)).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    assert expected
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@each_case
def test_a_call_follows_the_mode_of_the_moment(case: Case):
    ours, plain = pbfx.transform(case.build().eval()), case.build()
    assert not ours.training
    x = case.input()
    for training in (False, True, False):
        ours.train(training)
        plain.train(training)
        assert_equal(run(ours, x), run(plain, x))


@each_case
def test_keys_paths_and_order_are_the_users(case: Case):
    plain = case.build()
    ours = pbfx.transform(plain)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]
    pairs = zip(
        plain.named_modules(remove_duplicate=False),
        ours.named_modules(remove_duplicate=False),
        strict=True,
    )
    for (name, theirs), (path, mine) in pairs:
        assert name == path
        assert isinstance(mine, type(theirs)), name
        assert type(mine).__name__ == type(theirs).__name__, name
    plain.load_state_dict(ours.state_dict())
    ours.load_state_dict(plain.state_dict())


@each_case
def test_tensors_are_shared_and_modules_are_not(case: Case):
    plain = case.build()
    ours = pbfx.transform(plain)
    for kind in ("parameters", "buffers"):
        mine = dict(getattr(ours, f"named_{kind}")())
        for name, tensor in getattr(plain, f"named_{kind}")():
            assert mine[name] is tensor, name
    assert not {id(m) for m in plain.modules()} & {id(m) for m in ours.modules()}


@each_case
def test_the_users_module_is_left_alone(case: Case):
    plain = case.build()
    before, keys, x = portrait(plain), list(plain.state_dict()), case.input()
    ours = pbfx.transform(plain)
    assert portrait(plain) == before
    expected = run(copy.deepcopy(plain), x)
    pbfx.grow(ours, 2)
    assert_equal(run(plain, x), expected)
    # The tensors are shared, so the phase freezes them for both; nothing else of it shows.
    start_dendrite_phase(ours)
    assert portrait(plain) == before
    assert list(plain.state_dict()) == keys


@each_case
def test_sites(case: Case):
    assert tuple(s.name for s in pbfx.transform(case.build()).perforation.sites) == case.sites


def streams() -> list[bytes]:
    return [
        torch.get_rng_state().numpy().tobytes(),
        repr(random.getstate()).encode(),
        np.random.get_state()[1].tobytes() + repr(np.random.get_state()[2:]).encode(),
    ]


@each_case
def test_global_random_streams_are_left_alone(case: Case):
    model = case.build()
    before = streams()
    ours = pbfx.transform(model)
    pbfx.grow(ours, 2)
    start_dendrite_phase(ours)
    pbfx.explain(ours)
    copy.deepcopy(ours)
    assert streams() == before


def test_a_kept_forward_leaves_the_random_streams_alone():
    class Noisy(nn.Linear):
        def forward(self, x):
            noise = torch.randn(3) * random.random() * np.random.rand()
            return super().forward(x) + noise

    model = nn.Sequential(nn.Linear(3, 3), Noisy(3, 3))
    before = streams()
    ours = pbfx.transform(model)
    assert "draws random numbers" in kept_modules(ours)["1"].reason
    assert streams() == before


def test_seeds_choose_the_dendrites():
    def weights(seed: int) -> torch.Tensor:
        model = pbfx.transform(CASES["perceptron"].build(), pbfx.Config(seed=seed))
        return pbfx.grow(model).get_parameter("0.dendrites.weight").detach()

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_constants_follow_the_model_and_no_key():
    model = CASES["convolutional"].build()
    ours = pbfx.transform(model)
    loose = set(dict(ours.named_buffers())) - set(dict(model.named_buffers()))
    assert loose, "torch.arange in forward has become a buffer"
    assert not loose & set(ours.state_dict())
    # As a buffer it follows the model to another device, as fx's own attribute would not; but not
    # to meta, where it would lose its numbers, which no state dict holds.
    values = {name: ours.get_buffer(name).clone() for name in loose}
    ours.to("meta").to_empty(device="cpu")
    assert all(torch.equal(ours.get_buffer(name), value) for name, value in values.items())


def test_user_attributes_survive():
    model = CASES["convolutional"].build()
    model.meta = {"made": "by hand"}
    ours = pbfx.transform(model)
    assert ours.classes is model.classes
    assert ours.p == 0.5
    assert ours.meta is model.meta
    assert copy.deepcopy(ours).meta == model.meta
    shared = pbfx.transform(CASES["shared"].build())
    assert shared.first is shared.again
    assert shared.first.note == "a user's own"


def test_attributes_that_lead_into_the_tree_lead_to_the_clones():
    model = CASES["residual"].build()
    ours = pbfx.transform(model)
    assert [any(block is own for own in ours.modules()) for block in ours.order] == [True] * 3
    assert all(block is not mine for block, mine in zip(model.order, ours.order, strict=True))


def test_an_attribute_that_holds_itself_is_no_trap():
    model = CASES["perceptron"].build()
    model.loop = [model]
    model.loop.append(model.loop)
    assert pbfx.transform(model).loop[1] is model.loop


def test_hooks_of_leaves_fire_and_stay_the_users():
    model = CASES["convolutional"].build()
    seen = []
    model.conv2.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.conv2.register_forward_hook(lambda module, args, out: out * 2)
    model.register_forward_hook(lambda module, args, out: out + 1)
    model.fc.register_full_backward_hook(lambda module, into, out: seen.append("backward"))
    x = CASES["convolutional"].input()
    expected = outputs(run(model, x)[0])
    seen.clear()
    ours = pbfx.transform(model)
    assert_equal(run(ours, x), expected)
    assert seen == ["before"]
    run(ours, x)[0].sum().backward()
    assert seen == ["before", "before", "backward"]

    ours.conv1.register_forward_hook(lambda module, args, out: seen.append("ours"))
    run(model, x)
    assert "ours" not in seen
    run(ours, x)
    assert "ours" in seen


def test_hooks_fire_in_the_dendrite_phase():
    model = CASES["convolutional"].build()
    seen = []
    for name in ("norm", "drop", "conv1"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.append(name)
        )
    ours = pbfx.transform(model)
    x = CASES["convolutional"].input()
    expected = run(ours.eval(), x)
    start_dendrite_phase(ours)
    seen.clear()
    assert_equal(run(ours.train(), x), expected)
    assert seen == ["conv1", "norm", "drop"]


def test_buffers_are_read_at_every_call():
    model = CASES["convolutional"].build().eval()
    ours, x = pbfx.transform(model), CASES["convolutional"].input()
    before = run(ours, x)
    model.scale.fill_(3.0)
    assert_equal(run(ours, x), run(model, x))
    assert not torch.equal(run(ours, x)[0], before[0])


def test_calls_take_keywords_and_defaults():
    class Scaled(nn.Linear):
        def forward(self, x, *, factor=2.0, shift=None):
            return super().forward(x) * factor

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = Scaled(3, 3)

        def forward(self, x, factor=2.0, *, mask=None):
            # The mask is handed on, whatever it is; no branch depends on it.
            return torch.nn.functional.scaled_dot_product_attention(
                *[self.fc(x, factor=factor)] * 3, attn_mask=mask
            )

    model, x = Net(), torch.randn(2, 4, 3)
    ours, mask = pbfx.transform(model), torch.rand(4, 4) > 0.3
    for arguments in ({}, {"factor": 3.0}, {"mask": mask}, {"mask": mask, "factor": -1.0}):
        assert_equal([ours(x, **arguments)], [model(x, **arguments)])


def test_graph_modules_can_be_transformed():
    inner = torch.fx.symbolic_trace(CASES["perceptron"].build())
    outer = nn.Sequential(inner, nn.ReLU())
    x = CASES["perceptron"].input()
    for model, site in ((inner, "0"), (outer, "0.0")):
        ours = pbfx.transform(model.eval())
        assert ours.perforation.sites[0].name == site
        assert_equal(run(pbfx.grow(ours), x), run(model, x))


def test_a_model_can_be_transformed_twice():
    model, x = CASES["residual"].build(), CASES["residual"].input()
    one, two = pbfx.transform(model), pbfx.transform(model)
    pbfx.grow(one)
    assert two.structure().sites == {}
    assert_equal(run(one, x), run(two, x))


@pytest.mark.parametrize("device", ["meta"])
def test_models_without_data_transform_and_grow(device: str):
    with torch.device(device):
        model = pbfx.transform(CASES["perceptron"].make())
    pbfx.grow(model, 2)
    assert model(CASES["perceptron"].input().to(device)).shape == (7, 3)


def test_dtypes_follow_the_soma():
    model = pbfx.transform(CASES["perceptron"].build().to(torch.bfloat16))
    pbfx.grow(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(CASES["perceptron"].input(dtype=torch.bfloat16)).dtype == torch.bfloat16
