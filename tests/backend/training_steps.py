"""A training step of a compiled model, compared with the one that runs eagerly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pbfx
from models import CASES, Case, randomise, run
from pbfx.backend import compile_graph

# AOTAutograd without code generation: the same graphs as for Inductor, in a fraction of the time.
QUICK = {"compiler": "aot_eager"}


# Dynamo breaks the graph at a GRU, whoever compiles it.
WHOLE = {name: case for name, case in CASES.items() if name != "attention"}
each_case = pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE.keys())


def grown(case: Case, dendrites: int = 2) -> nn.Module:
    model = pbfx.grow(pbfx.transform(case.build()), dendrites)
    randomise(model)
    return model


def compiled(model: nn.Module, **options: object) -> nn.Module:
    return torch.compile(model, backend=compile_graph, fullgraph=True, options=options)


def step(model: nn.Module, owner: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Run one training step from the same state every time; return outputs and gradients."""
    state = copy.deepcopy(owner.state_dict())
    outs = run(model, x)
    sum((out.square().sum() for out in outs), torch.zeros(())).backward()
    found = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    found |= {n: p.grad for n, p in owner.named_parameters() if p.grad is not None}
    owner.zero_grad(set_to_none=True)
    owner.load_state_dict(state)
    return found


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # ‖found - wanted‖ / ‖wanted‖ in float32, as in the kernels' table; a bias before a norm has
        # a gradient of zero, but for rounding.
        distance = (found[name] - value).norm() / value.norm().clamp(min=1)
        assert distance <= 1e-5, f"{name}: {distance}"
