"""The table says what is there, what it costs to the last parameter, and fits a terminal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pbfx
from models import CASES, Case, each_case, perceptron
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
        "site  op      calls  dendrites  parameters  one more",
        "0     linear      1          2         168       +72",
        "no dendrites at 1 (BatchNorm1d): not a linear or conv operation",
        "no dendrites at 4 (linear): excluded by '4'",
    ]


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


def test_parts_of_a_larger_model_have_their_paths():
    model = nn.ModuleDict({"left": pbfx.transform(perceptron()), "right": nn.Linear(2, 2)})
    explanation = pbfx.explain(model)
    assert [site.name for site in explanation.sites] == ["left.0", "left.4"]
    assert [name for name, *_ in explanation.skipped] == ["left.1"]


def test_a_compiled_model_is_explained_as_what_it_wraps():
    model = pbfx.transform(perceptron())
    assert pbfx.explain(torch.compile(model, backend="eager")) == pbfx.explain(model)


def test_a_plain_model_is_an_error():
    with pytest.raises(pbfx.RestructureError, match="no perforated parts; pass it through pbfx"):
        pbfx.explain(CASES["perceptron"].build())
