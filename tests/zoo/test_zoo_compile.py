"""What plain Inductor takes whole, the backend takes: forward and backward as in eager.

AOTAutograd stands in for Inductor, whose C++ compiler takes minutes per member: the lowered graph
and its derivative are the same. Where AOTAutograd without Inductor fails on the plain model already
(torch 2.13: a view of what a CPU's dropout gives back), eager execution of the lowered graph does.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported, UserError

import pbfx
from models import randomise
from pbfx.backend import compile_graph
from zoo.member import Member, tensors_of
from zoo.registry import ZOO
from zoo.test_zoo import call, distance, loss_of

each_member = pytest.mark.parametrize("member", ZOO.values(), ids=ZOO.keys())
# ‖out - ref‖ / ‖ref‖ in float32, and of gradients, which sum over all positions.
ROUNDING, GRADIENTS = 1e-5, 1e-4
# What Dynamo says of a graph that it has to break: calls it does not know, branches on values. Any
# other fault of a plain model is a fault of a test.
BREAKS = (Unsupported, UserError)
# A tensor whose gradient is all cancellation is judged by this share of the whole gradient's norm.
SMALL_SHARE = 1e-2


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiler_for(member: Member) -> str | None:
    """Return who can compile the plain model, None if Dynamo breaks its graph."""
    for backend in ("aot_eager", "eager"):
        plain = member.fresh()
        torch._dynamo.reset()
        try:
            # As users have it: a warning that is an error here would look like a break.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outs = call(torch.compile(plain, backend=backend, fullgraph=True), member, True)
                loss_of(outs).backward()
        except BREAKS:
            return None
        except RuntimeError:
            continue
        finally:
            torch._dynamo.reset()
        return backend
    raise AssertionError(f"{member.name} does not run eagerly")


def step(model: nn.Module, owner: nn.Module, member: Member) -> tuple[list[Tensor], dict]:
    state = copy.deepcopy(owner.state_dict())
    outs = call(model, member, training=True)
    loss_of(outs).backward()
    grads = {n: p.grad for n, p in owner.named_parameters() if p.grad is not None}
    owner.zero_grad(set_to_none=True)
    owner.load_state_dict(state)
    return [out.detach() for out in outs], grads


@each_member
@pytest.mark.parametrize("regional", [False, "sites"])
def test_compiled_as_in_eager(member, regional):
    compiler = compiler_for(member)
    if compiler is None:
        pytest.skip("Dynamo breaks the plain model's graph")
    model = pbfx.grow(pbfx.transform(member.fresh()), 2)
    randomise(model, scale=0.1)
    options = {"compiler": compiler, "regional": regional}
    compiled = torch.compile(model, backend=compile_graph, fullgraph=True, options=options)
    outs, grads = step(compiled, model, member)
    wanted, wanted_grads = step(model, model, member)
    assert grads.keys() == wanted_grads.keys()
    for found, expected in zip(outs, tensors_of(wanted), strict=True):
        assert distance(found, expected) <= ROUNDING
    whole = torch.stack([grad.norm() for grad in wanted_grads.values()]).norm()
    for name, expected in wanted_grads.items():
        # What is zero but for rounding, as a bias before a norm, has no direction.
        scale = max(expected.norm(), SMALL_SHARE * whole)
        assert (grads[name] - expected).norm() <= GRADIENTS * scale, name
