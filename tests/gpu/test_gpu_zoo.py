"""The zoo, compiled by Inductor on a GPU: whole graphs, outputs and gradients as in eager mode."""

import copy
import warnings

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import pbfx
from models import randomise
from zoo.member import Member, tensors_of
from zoo.registry import ZOO
from zoo.test_zoo import distance, loss_of
from zoo.test_zoo_compile import BREAKS, SMALL_SHARE

pytestmark = pytest.mark.gpu
# Of fp32 outputs; of gradients, which sum over all positions.
ROUNDING, GRADIENTS = 2e-5, 2e-4


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # Inductor draws as eager mode does, so that dropouts fall alike.
    with torch._inductor.config.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


def run(model: nn.Module, member: Member) -> list[Tensor]:
    args, kwargs = tree_map(
        lambda value: value.cuda() if isinstance(value, Tensor) else value, member.arguments(True)
    )
    torch.manual_seed(3)
    return tensors_of(model.train()(*args, **kwargs))


def loss(outputs: list[Tensor]) -> Tensor:
    return loss_of([out.cpu() for out in outputs])


def step(call: nn.Module, owner: nn.Module, member: Member) -> tuple[list[Tensor], dict]:
    state = copy.deepcopy(owner.state_dict())
    outputs = run(call, member)
    loss(outputs).backward()
    grads = {n: p.grad for n, p in owner.named_parameters() if p.grad is not None}
    owner.zero_grad(set_to_none=True)
    owner.load_state_dict(state)
    return [out.detach() for out in outputs], grads


@pytest.mark.parametrize("member", ZOO.values(), ids=ZOO.keys())
def test_compiled_as_in_eager(member: Member) -> None:
    plain = member.fresh().cuda()
    try:
        # As users have it: a warning that is an error here would look like a break.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss(run(torch.compile(plain, fullgraph=True), member)).backward()
    except BREAKS as fault:
        pytest.skip(f"Dynamo breaks the plain model's graph: {type(fault).__name__}")
    model = pbfx.grow(pbfx.transform(member.fresh()), 2).cuda()
    randomise(model, scale=0.1)
    outputs, grads = step(torch.compile(model, backend="pbfx", fullgraph=True), model, member)
    wanted, wanted_grads = step(model, model, member)
    assert grads.keys() == wanted_grads.keys()
    for found, expected in zip(outputs, wanted, strict=True):
        assert distance(found, expected) <= ROUNDING
    whole = torch.stack([grad.norm() for grad in wanted_grads.values()]).norm()
    for name, expected in wanted_grads.items():
        # What is zero but for rounding, as a bias before a norm, has no direction.
        scale = max(expected.norm(), SMALL_SHARE * whole)
        assert (grads[name] - expected).norm() <= GRADIENTS * scale, name


@pytest.mark.parametrize("dendrites", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_the_fused_form(autocast: bool, dtype: torch.dtype, dendrites: int) -> None:
    """Large enough for soma and dendrites to be one kernel, forward and backward."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 72))
    model = pbfx.grow(pbfx.transform(net), dendrites).cuda()
    randomise(model, scale=0.1)
    model = model if autocast else model.to(dtype)
    x = torch.randn(8192, 64, device="cuda", dtype=torch.float32 if autocast else dtype)
    compiled = torch.compile(model, backend="pbfx", fullgraph=True)

    def both(call: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cuda", dtype, enabled=autocast):
            out = call(x)
        out.float().pow(2).mean().backward()
        grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return out.detach().float(), grads

    op = torch.ops.pbfx.perforated_linear.default
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        found, grads = both(compiled)
    launched = [event.key for event in profile.key_averages()]
    assert op.name() in launched
    wanted, wanted_grads = both(model)
    tolerance = 1e-2 if dtype is torch.bfloat16 else 2e-3
    assert distance(found, wanted) <= tolerance
    assert grads.keys() == wanted_grads.keys()
    for name, expected in wanted_grads.items():
        # Through two layers, and over all positions.
        assert distance(grads[name], expected) <= 5 * tolerance, name
