"""The picture shows every site and every skipped op, its boxes do not overlap, its lines end."""

from __future__ import annotations

import builtins
import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pbfx
from models import CASES, Case, each_case, perceptron
from pbfx.explain import explanation as explanation_module
from pbfx.explain.flow import APART, LEFT_OUT, SITE
from pbfx.explain.layout import place


def words(path: Path) -> list[str]:
    """Return the texts of an SVG."""
    return re.findall(r"<text [^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x)) if x.dim() == 2 else x


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


@each_case
def test_sites_and_skipped_ops_are_named(case: Case, tmp_path: Path):
    model = pbfx.grow(pbfx.transform(case.build()), 3)
    explanation = pbfx.explain(model)
    explanation.draw(tmp_path / "net.svg")
    found = words(tmp_path / "net.svg")
    assert found[0] == type(model).__name__
    names = {site.name for site in explanation.sites} | {s.name for s in explanation.skipped}
    # Attention is one call with two sites in it, and a norm after a site's op is in its box.
    inside = {"attend.in_proj_weight", "attend.out_proj"}
    norms = {"1", "norm", "norms.0"} if any(s.norm for s in explanation.sites) else set()
    shown = names - inside - norms | ({"attend", "2 sites"} if names & inside else set())
    assert shown <= set(found)
    assert not norms & set(found) - {"1"}
    # Each call of a site has a badge; the legend's shows 1.
    calls = sum(site.calls for site in explanation.sites if site.name not in inside)
    assert found.count("3") == calls + bool(names & inside)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".svg"])
def test_equal_explanations_give_equal_files(suffix: str, tmp_path: Path):
    one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
    pbfx.explain(perceptron()).draw(one)
    pbfx.explain(pbfx.transform(perceptron())).draw(str(other))
    assert one.read_bytes() == other.read_bytes()
    assert one.read_bytes()[:4] == b"\x89PNG" if suffix != ".svg" else b"<?xm"
    assert sorted(tmp_path.iterdir()) == [one, other]


def test_parts_stand_side_by_side(tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 3), Stage(), nn.Linear(3, 2))
    explanation = pbfx.explain(model)
    assert [flow.path for flow in explanation.flows] == ["", "1.fc"]
    kinds = [(s.kind, s.label) for s in explanation.flows[0].steps if s.kind in (SITE, APART)]
    assert kinds == [(SITE, "0"), (APART, "1"), (SITE, "2")]
    explanation.draw(tmp_path / "net.svg")
    assert {"Sequential (whole)", "1.fc (op)"} <= set(words(tmp_path / "net.svg"))


def test_many_parts_are_a_tree_with_repeated_layers_once(tmp_path: Path):
    pbfx.explain(Deep()).draw(tmp_path / "net.svg")
    found = words(tmp_path / "net.svg")
    row = found.index("stages.{0..7}")
    assert found[row + 1] == "Stage, own forward"
    assert {"fc", "linear, x8", "norm", "LayerNorm, x8"} <= set(found)


def test_a_graph_of_many_steps_is_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = CASES["convolutional"].build()
    monkeypatch.setattr(explanation_module, "MOST_STEPS", 3)
    pbfx.explain(model).draw(tmp_path / "net.svg")
    assert "one graph (whole)" in words(tmp_path / "net.svg")


def test_nothing_to_grow_on_can_be_drawn(tmp_path: Path):
    pbfx.explain(nn.Sequential(nn.LayerNorm(3), nn.ReLU())).draw(tmp_path / "net.svg")
    assert {"own forward", "LayerNorm"} <= set(words(tmp_path / "net.svg"))


def test_functions_with_computed_weights_are_left_out_in_the_picture():
    (flow,) = pbfx.explain(CASES["functional"].build()).flows
    left = [(step.label, step.detail) for step in flow.steps if step.kind == LEFT_OUT]
    assert left == [("conv1d_1", "conv1d")]


def test_a_layer_with_several_sites_says_how_many_dendrites_they_have():
    model = pbfx.grow(pbfx.transform(CASES["attention"].build()), sites=["attend.out_proj"])
    steps = {step.label: step for step in pbfx.explain(model).flows[0].steps}
    assert steps["attend"].detail == "2 sites, 0 to 1 dendrites"
    assert steps["attend"].dendrites == 1
    assert steps["mix"].dendrites == 0


def test_what_comes_to_nothing_is_not_drawn():
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lost = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.lost(x.tanh()).sum()
            return self.fc(x)

    (flow,) = pbfx.explain(Wasteful()).flows
    assert [step.label for step in flow.steps] == ["x", "lost", "fc", "output"]
    assert flow.edges == ((0, 2), (2, 3))


def test_names_are_no_formulas(tmp_path: Path):
    model = nn.Sequential()
    model.add_module("a$b_$<&", nn.Linear(2, 2))
    pbfx.explain(model).draw(tmp_path / "net.svg")
    assert "a$b_$&lt;&amp;" in words(tmp_path / "net.svg")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net.pdf", r"must end in \.png or \.svg, got '.*net\.pdf'"),
        ("net", "must end in"),
        ("nowhere/net.png", "there is no folder '.*nowhere'"),
    ],
)
def test_files_that_cannot_be_written(name: str, message: str, tmp_path: Path):
    with pytest.raises(pbfx.ConfigError, match=message):
        pbfx.explain(perceptron()).draw(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_file(tmp_path: Path):
    (tmp_path / "net.png").mkdir()
    with pytest.raises(pbfx.ConfigError, match=r"cannot write '.*net\.png'"):
        pbfx.explain(perceptron()).draw(tmp_path / "net.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def absent(name: str, *rest: object) -> object:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(pbfx.DependencyError, match=r"pip install 'pbfx\[plots\]'") as caught:
        pbfx.explain(perceptron()).draw(tmp_path / "net.png")
    assert isinstance(caught.value, ImportError)
    assert list(tmp_path.iterdir()) == []


def test_drawing_leaves_the_random_streams_alone(tmp_path: Path):
    model, before = perceptron(), torch.get_rng_state()
    pbfx.explain(model).draw(tmp_path / "net.png")
    assert torch.equal(torch.get_rng_state(), before)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[float], list[tuple[int, int]]]:
    count = draw(st.integers(1, 40))
    widths = draw(st.lists(st.floats(0.1, 2.0), min_size=count, max_size=count))
    pairs = [(a, b) for b in range(count) for a in range(b)]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=70, unique=True)) if pairs else []
    return widths, edges


@given(graphs())
def test_layouts_keep_steps_apart_and_lead_lines_home(
    graph: tuple[list[float], list[tuple[int, int]]],
):
    widths, edges = graph
    row, gap = 0.4, 0.1
    layout = place(widths, edges, row=row, gap=gap, gutter=0.5, aspect=1.5)
    boxes = list(zip(layout.centres, widths, strict=True))
    for ((x, y), width), ((u, v), other) in itertools.combinations(boxes, 2):
        assert abs(y - v) > 0.99 * row or abs(x - u) >= (width + other) / 2 + 0.99 * gap
    assert len(layout.routes) == len(edges)
    for (source, reader), route in zip(edges, layout.routes, strict=True):
        assert route[0] == layout.centres[source]
        assert route[-1] == layout.centres[reader]
    points = [point for route in layout.routes for point in route]
    for x, y in [*layout.centres, *points]:
        assert layout.left - 1e-6 <= x <= layout.right + 1e-6
        assert layout.top - 1e-6 <= y <= layout.bottom + 1e-6


def test_a_chain_is_a_straight_line_and_skips_go_around_it():
    # As in a residual net: four blocks of three steps, and an edge around each.
    edges = [(i, i + 1) for i in range(12)] + [(i, i + 3) for i in range(0, 12, 3)]
    layout = place([1.0] * 13, edges, row=1.0, gap=0.2, gutter=1.0, aspect=0.01)
    assert len({round(x, 6) for x, _ in layout.centres}) == 1
    x = layout.centres[0][0]
    for route in layout.routes[12:]:
        assert all(px > x + 0.5 for px, _ in route[1:-1])
