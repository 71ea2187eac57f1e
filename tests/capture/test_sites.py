"""Which ops become sites, which do not and why, and how a user chooses among them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pbfx
from models import CASES, Case, each_case, perceptron, randomise
from pbfx.sites import choose_sites
from pbfx.topology import dataflow, reaches_output


def names(model: nn.Module, **settings) -> list[str]:
    ours = pbfx.transform(model, pbfx.Config(**settings))
    return [site.name for site in ours.perforation.sites]


def skipped(model: nn.Module, **settings) -> dict[str, str]:
    ours = pbfx.transform(model, pbfx.Config(**settings))
    return {op.name: op.reason for op in ours.perforation.skipped}


class Net(nn.Module):
    """Parts for forwards that are given as functions of (self, x)."""

    def __init__(self, body) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.w, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.kernel = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("fixed", torch.randn(4, 4))
        self.body = body

    def forward(self, x):
        return self.body(self, x)


COMPUTED = "its weight is computed, not a parameter"
NOT_A_PARAMETER = "its weight is no parameter and is not made from one (a buffer, or quantised)"
DEAD = "its output does not reach the model's output"
TWO_FORMS = "its weight is used with two different geometries"


@pytest.mark.parametrize(
    ("body", "reasons"),
    [
        (lambda s, x: s.a(F.linear(x, s.w * 2)), {"linear": COMPUTED}),
        (lambda s, x: s.a(F.linear(x, x)), {"linear": COMPUTED}),
        (lambda s, x: s.a(F.linear(x, s.fixed)), {"fixed": NOT_A_PARAMETER}),
        (lambda s, x: (s.b(x), s.a(x))[1], {"b": DEAD}),
        (lambda s, x: (s.c(s.b(x)), s.a(x))[1], {"b": DEAD, "c": DEAD}),
        (
            lambda s, x: s.a(
                F.conv1d(x[:, None, :, None].flatten(2), s.kernel).mean(1)
                + F.conv1d(x[:, None], s.kernel, padding=1).mean((1, 2))[:, None]
            ),
            {"kernel": TWO_FORMS},
        ),
        (
            lambda s, x: s.a(
                F.conv1d(x[:, None], s.kernel).mean(1)
                + F.conv_transpose1d(x[:, :, None], s.kernel).flatten(1)
            ),
            {"kernel": TWO_FORMS},
        ),
        (lambda s, x: s.a(x) + s.a(s.a(x)), {}),
        # Dendrites have a bias of their own, so those of the soma may differ.
        (lambda s, x: s.a(F.linear(x, s.w, s.bias * 2)), {}),
        (lambda s, x: s.a(F.linear(x, s.w) + F.linear(x, s.w, s.bias)), {}),
        # A call that comes to nothing takes nothing from the one that counts.
        (lambda s, x: (s.a(x), s.a(x * 2))[0], {}),
        # What is written in place is read later.
        (lambda s, x: [y := s.a(x), y.add_(s.b(x)), y * 2][2], {}),
        (lambda s, x: [y := s.a(x), z := y * 2, y.add_(s.b(x)), z][3], {"b": DEAD}),
    ],
)
def test_reasons(body, reasons: dict[str, str]):
    model = Net(body)
    found = skipped(model)
    assert found.keys() == reasons.keys()
    assert not {*names(model)} & found.keys()
    assert all(found[name].startswith(reason) for name, reason in reasons.items())


def test_calls_are_counted_and_ordered_by_the_first():
    model = pbfx.transform(Net(lambda s, x: s.b(s.a(s.b(x))) + s.b(F.linear(x, s.w))))
    assert [(s.name, s.calls) for s in model.perforation.sites] == [("b", 3), ("a", 1), ("w", 1)]


@pytest.mark.parametrize("first", [True, False])
def test_a_weight_that_serves_a_module_and_a_function_has_one_set_of_dendrites(first: bool):
    def body(self, x):
        called, by_hand = self.c(x), lambda: F.linear(x, self.c.weight, self.bias)
        return called + by_hand() if first else by_hand() + called

    model = Net(body)
    x = torch.randn(2, 4)
    ours = pbfx.transform(model)
    (site,) = ours.perforation.sites
    assert (site.name, site.calls, site.dendrites) == ("c", 2, "c.dendrites")
    randomise(pbfx.grow(ours))
    keys = [key for key in ours.state_dict() if "dendrites" in key]
    assert keys == [f"c.dendrites.{role}" for role in ("weight", "bias", "to_soma", "to_dendrite")]
    # Both calls read x, so both gain the same.
    (dendrites,) = ours.grown().values()
    added = dendrites.to_soma[0] * torch.tanh(x @ dendrites.weight[0].T + dendrites.bias[0])
    torch.testing.assert_close(ours(x), model(x) + 2 * added)


def test_a_function_over_a_layers_weight_is_the_layer():
    model = pbfx.transform(Net(lambda s, x: F.linear(F.linear(x, s.a.weight, s.a.bias), s.w)))
    found = [(s.name, s.weight, s.bias, s.dendrites) for s in model.perforation.sites]
    assert found == [
        ("a", "a.weight", "a.bias", "a.dendrites"),
        ("w", "w", None, "w_dendrites"),
    ]


def test_a_layer_that_is_the_whole_model_has_no_name():
    model = pbfx.transform(nn.Linear(4, 3))
    (site,) = model.perforation.sites
    assert (site.name, site.weight, site.dendrites) == ("", "weight", "dendrites")
    randomise(pbfx.grow(model))
    assert [key for key in model.state_dict() if "." in key] == [
        f"dendrites.{role}" for role in ("weight", "bias", "to_soma", "to_dendrite")
    ]
    x = torch.randn(2, 4)
    added = model.grown()[""]
    torch.testing.assert_close(
        model(x),
        F.linear(x, model.weight, model.bias)
        + added.to_soma[0] * torch.tanh(F.linear(x, added.weight[0], added.bias[0])),
    )


def test_what_other_ops_are_called():
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Bilinear(4, 4, 4),
        nn.Linear(4, 4, dtype=torch.complex64),
        nn.Linear(4, 2),
    )
    model[5].dendrites = "taken"
    assert skipped(model) == {
        "1": "not a linear or conv operation",
        "3": "not a linear or conv operation",
        "4": "its weight is torch.complex64, and dendrites need a floating-point one",
        "5": "it has an attribute named 'dendrites' already",
    }


def test_taken_names_beside_a_parameter():
    model = Net(lambda s, x: s.a(F.linear(x, s.w)))
    model.w_dendrites = 3
    assert skipped(model) == {
        "w": "its owner has an attribute of the name that its dendrites would take"
    }


def test_a_subclass_that_computes_something_else_keeps_what_it_adds():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Circular(nn.Conv1d):
        def _conv_forward(self, x, weight, bias):
            return F.conv1d(x.roll(1, -1), weight, bias)

    model = nn.Sequential(Circular(4, 4, 1), nn.Flatten(), Doubled(4, 4), nn.Linear(4, 4))
    ours = pbfx.transform(model)
    # Both are traced into, and the functions that they call are their sites.
    assert [s.name for s in ours.perforation.sites] == ["0", "2", "3"]
    x = torch.randn(2, 4, 1)
    expected = ours(x)
    randomise(pbfx.grow(ours), scale=0.0)
    assert torch.equal(ours(x), expected)


def test_patterns():
    def model() -> nn.Module:
        return CASES["residual"].build()

    every = ["blocks.0.fc", "blocks.1.fc", "head"]
    assert names(model()) == every
    assert names(model(), include="blocks.*") == every[:2]
    assert names(model(), include=["*.1.*", "head"]) == every[1:]
    assert names(model(), exclude="head") == every[:2]
    assert names(model(), include="blocks.*", exclude="*.0.fc") == every[1:2]
    reasons = skipped(model(), include="blocks.*", exclude="*.0.fc")
    assert reasons["blocks.0.fc"] == "excluded by '*.0.fc'"
    assert reasons["head"] == "no pattern of include matches it"


@pytest.mark.parametrize("setting", ["include", "exclude"])
def test_a_pattern_that_matches_nothing(setting: str):
    config = pbfx.Config(**{setting: ("head", "block.*.fc")})
    message = rf"{setting}='block\.\*\.fc' matches no eligible op; did you mean 'blocks.\d.fc' or"
    with pytest.raises(pbfx.ConfigError, match=message) as caught:
        pbfx.transform(CASES["residual"].build(), config)
    assert "valid: 'blocks.0.fc', 'blocks.1.fc', 'head'" in str(caught.value)


def test_patterns_see_the_sites_of_all_parts():
    """What a part is called from outside decides, and a pattern may match in any part."""
    roots = {"": CASES["residual"].build(), "tail": nn.Linear(4, 4), "tail.end": perceptron()}
    parts = {}
    for path, model in roots.items():
        ours = pbfx.transform(model)
        parts[path] = ours, ours.perforation.sites

    def chosen(**settings) -> dict[str, list[str]]:
        found = choose_sites(parts, pbfx.Config(**settings))
        assert found.keys() == parts.keys()
        for path, (kept, unwanted) in found.items():
            names = {site.name for site in kept}, {op.name for op in unwanted}
            assert sorted(names[0] | names[1]) == sorted(site.name for site in parts[path][1])
            assert not names[0] & names[1]
        return {path: [site.name for site in kept] for path, (kept, _) in found.items()}

    assert chosen(include="tail*") == {"": [], "tail": [""], "tail.end": ["0", "4"]}
    assert chosen(include=["tail", "*.4"]) == {"": [], "tail": [""], "tail.end": ["4"]}
    assert chosen(exclude="tail.*")["tail"] == [""]
    asked = []
    chosen(filter_fn=lambda module, path: asked.append(path) is None)
    assert asked[-3:] == ["tail", "tail.end.0", "tail.end.4"]
    with pytest.raises(pbfx.ConfigError, match=r"include='end.\*' matches.*did you mean 'tail.end"):
        chosen(include="end.*")
    with pytest.raises(pbfx.ConfigError, match=r"leave no site.*'tail.end.4' \(linear\): no pat"):
        chosen(include="tail", exclude="tail")


def test_the_hint_stays_short():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(30)])
    with pytest.raises(pbfx.ConfigError, match="and 18 more") as caught:
        pbfx.transform(model, pbfx.Config(include="fc"))
    assert len(str(caught.value)) < 250


def test_patterns_of_norms_match_nothing():
    with pytest.raises(pbfx.ConfigError, match="'1' matches no eligible op"):
        pbfx.transform(CASES["perceptron"].build(), pbfx.Config(exclude="1"))


def test_a_filter_is_asked_last_with_the_owner_and_the_path():
    asked = []

    def small(module: nn.Module, path: str) -> bool:
        asked.append((type(module).__name__, path))
        return path != "head"

    model = CASES["residual"].build()
    found = names(model, exclude="blocks.0.fc", filter_fn=small)
    assert found == ["blocks.1.fc"]
    assert asked == [("Linear", "blocks.1.fc"), ("Linear", "head")]
    assert skipped(model, filter_fn=small)["head"] == "filter_fn said no"
    asked.clear()
    pbfx.transform(CASES["functional"].build(), pbfx.Config(filter_fn=small))
    assert asked == [
        ("Functional", "kernel"),
        ("ParameterList", "heads.0"),
        ("ParameterList", "heads.1"),
    ]


def test_skipped_ops_are_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="pbfx"):
        pbfx.transform(Net(lambda s, x: (s.b(x), s.a(x))[1]))
    assert f"no dendrites at b (Linear): {DEAD}" in caplog.text.replace("(linear)", "(Linear)")


@each_case
def test_flow(case: Case):
    graph = pbfx.transform(case.build()).perforation.source
    flow = dataflow(graph)
    assert set(flow) == set(graph.nodes)
    assert all((a, b) in flow.edges for b in graph.nodes for a in b.all_input_nodes)
    useful = reaches_output(graph)
    # Nothing in these models is dead but reads that fx records and nobody uses.
    assert {n for n in graph.nodes if n not in useful and n.users} == set()
    assert {n for n in graph.nodes if n.op == "placeholder"} <= useful
