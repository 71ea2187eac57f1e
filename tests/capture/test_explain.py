"""The table says what is there, what it costs to the last parameter, and fits a terminal."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx
from models import CASES, Branch, Case, Coder, each_case, perceptron
from pbfx.capture import Rung
from pbfx.explain.records import SiteReport
from pbfx.explain.table import sites_table
from pbfx.restructure import start_dendrite_phase


def owned(model: nn.Module, site: str, dendrites: str) -> int:
    """Count what a site computes with: of to_dendrite only what lies below the diagonal."""
    part = next(p for p in model.perforation.sites if p.name == site)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # A weight that is computed counts as what it is computed to.
    total = math.prod(part.shape)
    total += parameters[part.bias].numel() if part.bias else 0
    for role in ("weight", "bias", "to_soma"):
        if f"{dendrites}.{role}" in parameters:
            total += parameters[f"{dendrites}.{role}"].numel()
    if f"{dendrites}.to_dendrite" in parameters:
        links = torch.ones(parameters[f"{dendrites}.to_dendrite"].shape).movedim(-1, 0)
        total += int(links.tril(-1).sum())
    return total


@each_case
def test_parameters_are_counted_right(case: Case):
    model = pbfx.transform(case.build())
    for grown in range(4):
        explanation = pbfx.explain(model)
        assert [site.name for site in explanation.sites] == list(case.sites)
        for site, part in zip(explanation.sites, model.perforation.sites, strict=True):
            assert site.dendrites == grown
            assert (site.op, site.calls) == (part.op, part.calls)
            assert site.parameters == owned(model, site.name, part.dendrites)
        after = {site.name: site.parameters + site.next_dendrite for site in explanation.sites}
        pbfx.grow(model)
        assert {s.name: s.parameters for s in pbfx.explain(model).sites} == after


def test_candidates_do_not_count():
    model = pbfx.grow(pbfx.transform(perceptron()))
    before = pbfx.explain(model)
    start_dendrite_phase(model)
    assert pbfx.explain(model) == before


def test_the_table():
    model = pbfx.transform(perceptron(), pbfx.Config(exclude="4"))
    pbfx.grow(model, 2)
    assert str(pbfx.explain(model)).splitlines() == [
        "Sequential: 1 site, captured whole",
        "48 of 75 parameters of linear and conv ops can grow (64.0 %)",
        "",
        "site  op      norm         dendrites  parameters  one more",
        "0     linear  BatchNorm1d          2         168       +72",
        "",
        "no dendrites at 1 (BatchNorm1d): not a linear or conv operation",
        "no dendrites at 4 (linear): excluded by '4'",
    ]


def test_the_table_of_a_model_of_parts():
    layers = [Branch(nn.Linear(4, 4)) for _ in range(12)]
    model = nn.Sequential(*layers, nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)))
    assert str(pbfx.explain(model)).splitlines() == [
        "Sequential: 13 sites in 13 parts",
        "250 of 250 parameters of linear and conv ops can grow (100.0 %)",
        "",
        "part               class       rung   sites",
        "(model)            Sequential  whole      1",
        "{0..11}.inner x12  Linear      op        12",
        "",
        "own forward kept by 12 x Branch: cannot capture Branch by symbolic tracing:",
        "  TraceError: symbolically traced variables cannot be used as inputs to control",
        "  flow. Forward must not branch on values or shapes of its inputs, nor convert",
        "  them to Python numbers",
        "  {0..11}",
        "",
        "site               op      norm       dendrites  parameters  one more",
        "12.0               linear  LayerNorm          0          10       +12",
        "{0..11}.inner x12  linear                     0         240      +288",
        "total x13                                               250      +300",
        "",
        "no dendrites at 12.1 (LayerNorm): not a linear or conv operation",
    ]


def test_calls_have_a_column_where_a_site_is_called_twice():
    lines = str(pbfx.explain(CASES["residual"].build())).splitlines()
    assert lines[3:5] == [
        "site         op      calls  dendrites  parameters  one more",
        "blocks.0.fc  linear      3          0          42       +48",
    ]
    assert "blocks.{0,1}.norm" in lines[-1]


def test_a_graph_inside_a_graph_says_why():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    model[1].register_forward_hook(lambda *_: None)
    lines = str(pbfx.explain(model)).splitlines()
    assert "a graph of its own at 1 (Sequential): hooks wait for its call" in lines


def test_the_table_fits_80_columns():
    model = nn.Sequential()
    inner = model
    for level in range(6):
        inner.add_module(f"a_rather_long_name_{level}", nn.Sequential())
        inner = inner[-1]
    with torch.device("meta"):
        inner.extend([nn.Linear(2**15, 2**14), nn.BatchNorm1d(2**14)])
    table = str(pbfx.explain(pbfx.grow(pbfx.transform(model))))
    assert max(map(len, table.splitlines())) <= 80
    # The end of a path tells more than its start.
    assert "…" in table
    assert "name_5.0  linear" in table
    # 2^15 * 2^14 + 2^14 twice, and 2^14 links.
    assert "1,073,790,976" in table
    assert table.count("no dendrites at") == 1
    assert "not a linear or conv operation" in " ".join(table.split())


def test_where_columns_do_not_fit_every_row_is_a_paragraph():
    path = "a_long_name." * 9 + "conv"
    site = SiteReport(
        path, "conv_transpose3d", "InstanceNorm3d", 2, 3, 10**15, 10**14, Rung.SUBMODULE, 8, 8
    )
    lines = sites_table([site, dataclasses.replace(site, name="b", norm=None)])
    assert max(map(len, lines)) <= 80
    assert lines[1:3] == [
        "  conv_transpose3d, InstanceNorm3d, 2 calls, 3 dendrites, 1,000,000,000,000,000",
        "  parameters, +100,000,000,000,000 one more",
    ]
    assert lines[0].startswith("…")
    assert lines[0].endswith("long_name.conv")


def test_a_plain_model_is_explained_as_it_would_be_and_left_alone():
    for case in CASES.values():
        plain = case.build()
        modules = {path: (m, {*m.__dict__}) for path, m in plain.named_modules()}
        keys = list(plain.state_dict())
        assert pbfx.explain(plain) == pbfx.explain(pbfx.transform(plain))
        assert list(plain.state_dict()) == keys
        assert {path: (m, {*m.__dict__}) for path, m in plain.named_modules()} == modules
        assert not isinstance(plain, pbfx.PerforatedModule)


def test_a_config_says_where_a_plain_model_may_grow():
    explanation = pbfx.explain(Coder(), pbfx.Config(include="down.*"))
    assert [site.name for site in explanation.sites] == ["down.0", "down.2"]
    assert explanation.skipped == (("up", "linear", "no pattern of include matches it"),)
    assert explanation == pbfx.explain(pbfx.transform(Coder(), pbfx.Config(include="down.*")))
    with pytest.raises(pbfx.ConfigError, match="include='dwn' matches no eligible op"):
        pbfx.explain(Coder(), pbfx.Config(include="dwn"))
    with pytest.raises(pbfx.ConfigError, match="transformed already, with a config of its own"):
        pbfx.explain(pbfx.transform(Coder()), pbfx.Config())


LSTM = (
    "it runs all its steps inside one op, where no dendrite can join; its cell form (nn.LSTMCell, "
    "nn.GRUCell, nn.RNNCell) can carry them"
)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Keeping(Recurrent):
    def reset(self) -> None:
        pass


@pytest.mark.parametrize(
    ("model", "skipped", "reason"),
    [
        (Recurrent(), (("rnn", "LSTM", LSTM),), "no op in it can grow"),
        (Keeping(), (("rnn", "LSTM", LSTM),), "its class offers more"),
        (nn.ReLU(), (), "no op in it can grow"),
    ],
    ids=["recurrent", "keeping", "relu"],
)
def test_nothing_to_grow_on(model: nn.Module, skipped: tuple, reason: str):
    explanation = pbfx.explain(model)
    assert explanation.sites == explanation.parts == ()
    assert explanation.skipped == skipped
    assert reason in explanation.kept[0].reason
    assert explanation.coverage is None
    assert "0 sites" in str(explanation)
    with pytest.raises(pbfx.CaptureError, match="no linear or conv operation"):
        pbfx.transform(model)


def test_containers_report_what_lies_beside_their_parts():
    inside = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)])
    explanation = pbfx.explain(nn.ModuleDict({"a": inside, "norm": nn.LayerNorm(2)}))
    assert [part.path for part in explanation.parts] == ["a.0"]
    assert {(s.name, s.op) for s in explanation.skipped} == {
        ("a.1", "BatchNorm1d"),
        ("norm", "LayerNorm"),
    }
    assert explanation.kept == ()


def test_what_cannot_be_cloned_is_an_error():
    with pytest.raises(pbfx.CaptureError, match="LazyLinear has no shape yet"):
        pbfx.explain(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)))
    with pytest.raises(pbfx.ConfigError, match=r"pbfx.explain: model must be.*the class Linear"):
        pbfx.explain(nn.Linear)


def test_modules_that_are_called_as_such_are_no_skipped_ops():
    model = nn.Sequential(nn.Linear(4, 4), Branch(nn.Linear(4, 4)))
    assert pbfx.explain(model).skipped == ()


def test_parts_of_a_larger_model_have_their_paths():
    model = nn.ModuleDict({"left": pbfx.transform(perceptron()), "right": nn.Linear(2, 2)})
    explanation = pbfx.explain(model)
    assert [site.name for site in explanation.sites] == ["left.0", "left.4"]
    assert [name for name, *_ in explanation.skipped] == ["left.1"]
    assert [(p.path, p.class_name) for p in explanation.parts] == [("left", "Sequential")]
    # What was not transformed is not explained.
    assert explanation.coverage == 100


def test_a_compiled_model_is_explained_as_what_it_wraps():
    model = pbfx.transform(perceptron())
    assert pbfx.explain(torch.compile(model, backend="eager")) == pbfx.explain(model)
    plain = perceptron()
    assert pbfx.explain(torch.compile(plain, backend="eager")) == pbfx.explain(plain)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 2)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.used.weight
        self.table, self.matrix = nn.Embedding(5, 3), nn.Parameter(torch.ones(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.used(self.table(x)), self.matrix)


def test_coverage_counts_each_parameter_once():
    model = Unused()
    explanation = pbfx.explain(model, pbfx.Config(exclude="matrix"))
    assert ("unused", "Linear", "no captured forward calls it") in explanation.skipped
    assert "tied" not in {name for name, *_ in explanation.skipped}
    assert explanation.growable_parameters == 12
    assert explanation.linear_conv_parameters == 12 + 8 + 6
    assert explanation.coverage == pytest.approx(100 * 12 / 26)
    assert pbfx.explain(model).growable_parameters == 18


def test_coverage_counts_projections_and_computed_weights():
    attention = pbfx.explain(CASES["attention"].build())
    # In- and out-projection of 4 features, and `mix`; nothing of the GRU.
    assert attention.linear_conv_parameters == (48 + 12) + 20 + 20
    normed = pbfx.explain(CASES["normed"].build())
    plain, weighted, spectral, head = 30, 42 + 6, 42, 14
    assert normed.linear_conv_parameters == plain + weighted + spectral + head


def test_json_holds_everything():
    explanation = pbfx.explain(pbfx.grow(pbfx.transform(Coder())))
    found = explanation.to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found == {
        "class_name": "Coder",
        "parts": [
            {
                "path": "down",
                "class_name": "Sequential",
                "rung": "submodule",
                "reason": "its class offers more than forward (decode, encode)",
            },
            {
                "path": "up",
                "class_name": "Linear",
                "rung": "op",
                "reason": "its class offers more than forward (decode, encode)",
            },
        ],
        "kept": [
            {
                "path": "",
                "class_name": "Coder",
                "reason": "its class offers more than forward (decode, encode)",
            }
        ],
        "sites": [
            {
                "name": name,
                "op": "linear",
                "norm": None,
                "calls": 1,
                "dendrites": 1,
                "parameters": parameters,
                "next_dendrite": one_more,
                "rung": rung,
                "channels": neurons,
                "neurons": neurons,
                "heldout": None,
                "p_value": None,
                "gain": None,
            }
            for name, parameters, one_more, rung, neurons in (
                ("down.0", 33, 21, "submodule", 3),
                ("down.2", 18, 12, "submodule", 2),
                ("up", 28, 20, "op", 4),
            )
        ],
        "skipped": [],
        "growable_parameters": 35,
        "linear_conv_parameters": 35,
        "lowered": None,
        "coverage": 100.0,
    }
    assert all(type(part["rung"]) is str for part in found["parts"])
    assert pbfx.explain(nn.ReLU()).to_json()["coverage"] is None


def test_the_page_names_every_field():
    page = (Path(__file__).parents[2] / "docs" / "explain.md").read_text(encoding="utf-8")
    found = pbfx.explain(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), Branch(nn.Linear(3, 3))))
    data = found.to_json()
    fields = {*data} | {
        key for name in ("parts", "kept", "sites", "skipped") for key in data[name][0]
    }
    assert not {field for field in fields if f"`{field}`" not in page}


def test_an_explanation_is_a_snapshot():
    model = pbfx.transform(perceptron())
    before = pbfx.explain(model)
    text, data = str(before), before.to_json()
    pbfx.grow(model)
    assert (str(before), before.to_json()) == (text, data)
    assert pbfx.explain(model) != before
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.sites = ()
