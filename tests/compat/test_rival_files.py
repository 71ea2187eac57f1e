"""Networks that `perforatedai` 3.2.9 saved, loaded into pbfx, with the outputs that it computed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pbfx
from compat.make_rival_files import FILES, NETWORKS
from compat.rival_nets import NETS, Mixed, Normed, Tokens
from pbfx.compat import load_perforatedai
from pbfx.parts import structure_of

# Sums in another order, and a norm folded into weights: some roundings of float32.
TOLERANCE = 1e-6


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def expected(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = load_file(FILES / name / "expected.safetensors")
    return tensors["x"], tensors["y"]


def copy_of(name: str, folder) -> tuple[dict[str, torch.Tensor], object]:
    """Copy a run's folder, and return the tensors of its file and where it is."""
    target = folder / name
    shutil.copytree(FILES / name, target)
    return load_file(target / "best_model.pt"), target / "best_model.pt"


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_input_gradients_are_equal(name):
    job = NETWORKS[name]
    plain = NETS[job["net"]]()
    model = load_perforatedai(FILES / name / "best_model.pt", plain).eval()
    x, y = expected(name)
    x.requires_grad_()
    found = model(x)
    found.square().sum().backward()
    assert error(found, y) < TOLERANCE
    dx = load_file(FILES / name / "expected.safetensors")["dx"]
    assert error(x.grad, dx) < 10 * TOLERANCE
    sites = pbfx.explain(model).sites
    assert {site.dendrites for site in sites} == {job["dendrites"]}
    # Without the dendrites the output is another one.
    bare = pbfx.transform(type(plain)())
    own = bare.state_dict()
    bare.load_state_dict({key: model.state_dict()[key] for key in own})
    assert error(bare.eval()(expected(name)[0]), y) > 0.01


def test_it_learns_as_in_gradient_mode():
    model = load_perforatedai(FILES / "mixed-3" / "best_model.pt", Mixed())
    part = model
    assert part.perforation.config.learning == "gradient"
    assert part.perforation.config.activation == "sigmoid"
    assert all(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1), max_dendrites=4)
    model(expected("mixed-3")[0]).square().mean().backward()
    optimizer.step()
    assert tracker.step(0.0).dendrites == 4


def test_a_transformed_model_is_grown_in_place():
    model = pbfx.transform(Mixed(), pbfx.Config(learning="perforated", activation="sigmoid"))
    assert load_perforatedai(FILES / "mixed-3" / "best_model.pt", model) is model
    x, y = expected("mixed-3")
    assert error(model.eval()(x), y) < TOLERANCE


def test_a_config_says_where_dendrites_may_grow_later():
    config = pbfx.Config(activation="silu")
    model = load_perforatedai(FILES / "tokens-1" / "best_model.pt", Tokens(), config)
    assert model.perforation.config is config


def test_what_pbfx_loaded_it_saves_and_loads(tmp_path):
    model = load_perforatedai(FILES / "normed-2" / "best_model.pt", Normed())
    pbfx.save(model, tmp_path / "net.safetensors")
    again = pbfx.load(tmp_path / "net.safetensors", Normed()).eval()
    x, y = expected("normed-2")
    assert error(again(x), y) < TOLERANCE


def test_dendrites_before_a_norm_are_announced(caplog):
    load_perforatedai(FILES / "normed-2" / "best_model.pt", Normed())
    assert [r.getMessage() for r in caplog.records if "joined before norm" in r.getMessage()]


def test_the_activation_is_asked_for_where_no_settings_lie(tmp_path):
    _, path = copy_of("tokens-1", tmp_path)
    (path.parent / "tokens_config.json").unlink()
    with pytest.raises(pbfx.CheckpointError, match='pass activation="sigmoid"'):
        load_perforatedai(path, Tokens())
    model = load_perforatedai(path, Tokens(), activation="silu").eval()
    x, y = expected("tokens-1")
    assert error(model(x), y) < TOLERANCE


@pytest.mark.parametrize(
    ("named", "activation"),
    [
        ("torch.sigmoid", "sigmoid"),
        ("torch.nn.functional.silu", "silu"),
        ("torch._C._nn.gelu", "gelu"),
        ("SiLU()", "silu"),
        ("GELU(approximate='none')", "gelu"),
        ("GELU(approximate='tanh')", None),
        ("torch.nn.functional.leaky_relu", None),
    ],
)
def test_settings_name_the_activation(tmp_path, named, activation):
    _, path = copy_of("tokens-1", tmp_path)
    settings = path.parent / "tokens_config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"pai_forward_function": named})
    )
    if activation is None:
        with pytest.raises(pbfx.CheckpointError, match="which pbfx does not have"):
            load_perforatedai(path, Tokens())
    else:
        model = load_perforatedai(path, Tokens())
        assert model.perforation.config.activation == activation


def changed(tensors, key, value=None):
    return {k: t for k, t in tensors.items() if k != key} | ({} if value is None else {key: value})


CASCADE = "fc.dendrite_module.dendrites_to_dendrites.2"
FAULTS = {
    "a layer less": (
        lambda t: {k: v for k, v in t.items() if not k.startswith("fc.")},
        "the file has no fc.bias",
    ),
    "a key that the model lacks": (
        lambda t: t | {"extra.weight": torch.ones(2)},
        "the model has no extra.weight",
    ),
    "another shape": (
        lambda t: t | {"conv2.main_module.weight": torch.ones(3, 4, 3, 3)},
        "another weight than the layer",
    ),
    "candidates": (
        lambda t: t | {"fc.dendrite_module.candidate_module.0.weight": torch.ones(5, 12)},
        "candidate_module.0.weight is unknown",
    ),
    "a gap among dendrites": (
        lambda t: {k: v for k, v in t.items() if ".layers.1." not in k},
        r"has dendrites \[0, 2\], not all from 0 on",
    ),
    "links of fewer dendrites": (
        lambda t: changed(t, "fc.dendrites_to_top.2"),
        "fc.dendrites_to_top.2 must have 3 rows",
    ),
    "no cascade": (lambda t: changed(t, CASCADE), r"must have shape \(2, 5\), got None"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_are_not_what_is_expected(tmp_path, fault):
    tensors, path = copy_of("mixed-3", tmp_path)
    change, words = FAULTS[fault]
    save_file(change(tensors), path)
    model = Mixed()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(pbfx.CheckpointError, match=words):
        load_perforatedai(path, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_of_other_sizes_is_refused_and_left_alone():
    model = pbfx.transform(Mixed(), pbfx.Config(activation="sigmoid"))
    model.fc = nn.Linear(12, 6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(pbfx.CheckpointError, match=r"fc.bias has shape \(5,\), the model's \(6,\)"):
        load_perforatedai(FILES / "mixed-3" / "best_model.pt", model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_models_other_words():
    path = FILES / "mixed-3" / "best_model.pt"
    with pytest.raises(pbfx.CheckpointError, match="the model has no module 'conv1'"):
        load_perforatedai(path, nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(pbfx.CheckpointError, match="its dendrites apply 'sigmoid', the model's"):
        load_perforatedai(path, pbfx.transform(Mixed(), pbfx.Config(activation="tanh")))
    with pytest.raises(pbfx.CheckpointError, match="leave `config` out"):
        load_perforatedai(
            path, pbfx.transform(Mixed(), pbfx.Config(activation="sigmoid")), pbfx.Config()
        )
    model = pbfx.transform(Mixed(), pbfx.Config(activation="sigmoid"))
    pbfx.Tracker(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(pbfx.CheckpointError, match="before making optimizer and tracker"):
        load_perforatedai(path, model)


class Layered(Normed):
    """Where dendrites joined before it stands a norm that keeps no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(3, 3)


def test_a_norm_without_statistics_cannot_be_passed(tmp_path):
    tensors, path = copy_of("normed-2", tmp_path)
    kept = {k: v for k, v in tensors.items() if not k.startswith(("norm.running", "norm.num"))}
    save_file(kept, path)
    with pytest.raises(pbfx.CheckpointError, match=r"join before 'norm' \(GroupNorm\)"):
        load_perforatedai(path, Layered())


class Grouped(Normed):
    """A group with an activation in it, which no key of the file tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(*self.block, nn.ReLU())


def test_a_group_of_more_than_a_layer_and_a_norm_is_refused():
    with pytest.raises(pbfx.CheckpointError, match="a group of Conv2d and BatchNorm2d and ReLU"):
        load_perforatedai(FILES / "normed-2" / "best_model.pt", Grouped())


def test_other_files_are_refused_and_never_unpickled(tmp_path):
    path = tmp_path / "best_model.pt"
    with pytest.raises(pbfx.CheckpointError, match="there is no file"):
        load_perforatedai(path, Mixed(), activation="tanh")
    path.write_bytes(b"nothing")
    with pytest.raises(pbfx.CheckpointError, match="is not a safetensors file"):
        load_perforatedai(path, Mixed(), activation="tanh")
    torch.save(Mixed().state_dict(), path)
    with pytest.raises(
        pbfx.CheckpointError, match=r"a pickle of torch\.save, which is never opened"
    ):
        load_perforatedai(path, Mixed(), activation="tanh")
    save_file(Mixed().state_dict(), path)
    with pytest.raises(pbfx.CheckpointError, match="no key has 'main_module' in it"):
        load_perforatedai(path, Mixed(), activation="tanh")
    model = pbfx.transform(Mixed())
    pbfx.save(model, path)
    with pytest.raises(pbfx.CheckpointError, match=r"read it with pbfx\.load"):
        load_perforatedai(path, Mixed(), activation="tanh")


def test_a_network_without_dendrites_loads(tmp_path):
    tensors, path = copy_of("mixed-3", tmp_path)
    bare = {
        k: v
        for k, v in tensors.items()
        if "dendrites_to" not in k and ".layers." not in k and "dendrite_values" not in k
    }
    save_file(bare, path)
    model = load_perforatedai(path, Mixed())
    assert structure_of(model).sites == {}
    assert torch.equal(model.conv1.weight, tensors["conv1.main_module.weight"])
