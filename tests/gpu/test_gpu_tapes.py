"""Ops that are played from tapes: the bits of their bodies, for new data and as CUDA graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import pbfx_kernels.conv_neuron_op
import pbfx_kernels.depthwise_op
import pbfx_kernels.full_op
import pbfx_kernels.neuron_op  # noqa: F401  register their ops
from pbfx_kernels import LINEAR, Geometry, candidates, dendrites, full_dendrites
from pbfx_kernels.tape import Taped

pytestmark = pytest.mark.gpu
ops = torch.ops.pbfx
CALLS = 5


@dataclass(frozen=True)
class Site:
    """A soma: its input, its weight and how it slides; in channels_last if `last`."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry = LINEAR
    last: bool = False


_form = Geometry.convolution
SITES = {
    "fused": Site((4096, 64), (48, 64)),
    "wide": Site((8, 600, 96), (40, 96)),
    "few": Site((33, 128), (10, 128)),
    "long": Site((64, 4096), (33, 4096)),
    "unaligned": Site((600, 501), (33, 501)),
    "walked": Site((4, 32, 40, 40), (48, 32, 3, 3), _form(2, padding=1), True),
    "nchw": Site((4, 32, 40, 40), (48, 32, 3, 3), _form(2, 2, 1)),
    "pointwise": Site((4, 64, 40, 40), (32, 64, 1, 1), _form(2), True),
    "patches": Site((8, 1, 28, 28), (32, 1, 3, 3), _form(2)),
    "grouped": Site((4, 64, 40, 40), (96, 32, 3, 3), _form(2, 1, 1, 1, 2)),
    "depthwise": Site((3, 24, 28, 30), (24, 1, 3, 3), _form(2, 1, 1, 1, 24)),
    "conv1d": Site((3, 8, 50), (12, 8, 3), _form(1)),
}
each_site = pytest.mark.parametrize("site", SITES.values(), ids=SITES.keys())
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@dataclass
class Case:
    """Random tensors of a site's form, soma included."""

    site: Site
    dtype: torch.dtype
    d: int
    seed: int

    def __post_init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(self.seed)

        def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda").to(dtype)

        site, n = self.site, self.site.weight[0]
        self.x = random(*site.x, dtype=self.dtype)
        if site.last:
            self.x = self.x.to(memory_format=torch.channels_last)
        self.w, self.b = random(*site.weight, dtype=self.dtype), random(n, dtype=self.dtype)
        self.v, self.c = random(self.d, *site.weight), random(self.d, n)
        self.to_soma, self.to_dendrite = random(self.d, n), random(self.d, self.d, n)
        self.soma = random(*site.geometry.output_shape(site.x, site.weight), dtype=self.dtype)
        if site.last:
            self.soma = self.soma.to(memory_format=torch.channels_last)
        self.links = random(1, self.d, n)
        self.grad = torch.empty_like(self.soma).copy_(random(*self.soma.shape))

    @property
    def form(self) -> tuple[Any, ...]:
        g = self.site.geometry
        return g.stride, g.padding, g.dilation, g.groups, g.transposed, g.output_padding


def whole(case: Case) -> Any:
    """Soma and dendrites in one op, activations kept and not."""
    links = case.c, case.to_soma, case.to_dendrite, "tanh"
    g, somas = case.site.geometry, (case.x, case.w, case.b, case.v)
    if g.spatial == 0:
        op, form = ops.perforated_linear.default, ()
    elif g.groups == case.site.weight[0]:
        op, form = ops.perforated_depthwise.default, case.form[:3]
    elif g.spatial == 2:
        op, form = ops.perforated_conv2d.default, case.form[:4]
    else:
        return ()
    return *op(*somas, *links, *form, True), op(*somas, *links, *form, False)[0]


def beside(case: Case) -> Any:
    """Dendrites beside a soma, and both backwards."""
    tensors = case.soma, case.x, case.v, case.c, case.to_soma, case.to_dendrite
    out, activations = ops.dendrites.default(*tensors, "gelu", *case.form, True)
    alone = ops.dendrites.default(*tensors, "gelu", *case.form, False)[0]
    axis = case.site.geometry.channel_axis
    kept = ops.dendrites_backward.default(case.grad, activations, axis)
    cascade = case.grad, case.x, case.v, case.c, case.to_dendrite
    again = ops.dendrites_recompute.default(*cascade, "gelu", *case.form)
    return out, activations, alone, kept, again


def stepped(evaluate: Callable[..., Any]) -> Callable[[Case], Any]:
    def run(case: Case) -> Any:
        learners = [case.soma, case.to_soma, case.x, case.v, case.c, case.to_dendrite]
        leaves = [learner.detach().requires_grad_() for learner in learners]
        out = evaluate(*leaves, case.site.geometry)
        grads = torch.autograd.grad(out, leaves, case.grad, allow_unused=True)
        return out.detach(), *(g for g in grads if g is not None)

    return run


@stepped
def eager(soma, to_soma, x, v, c, to_dendrite, geometry):
    return dendrites(soma, x, v, c, to_soma, to_dendrite, geometry=geometry, keep=False)[0]


@stepped
def full(soma, to_soma, x, v, c, to_dendrite, geometry):
    return full_dendrites(soma, x, v, c, to_soma, to_dendrite, geometry=geometry)[0]


def candidate(case: Case) -> Any:
    """One candidate over D dendrites, whose moments are gradients."""
    activations = torch.tanh(torch.stack([case.soma * (d + 1) for d in range(case.d)]))
    moments = torch.zeros(6, case.site.weight[0], device="cuda")
    learners = [case.v[:1], case.c[:1], case.links, moments, case.soma]
    leaves = [learner.detach().clone().requires_grad_() for learner in learners]
    v, c, u, m, soma = leaves
    direction, mean = case.to_soma[:1].contiguous(), case.c[0].contiguous()
    out, z = candidates(
        soma, case.x, activations, v, c, u, m, direction, mean, "tanh", case.site.geometry
    )
    return z.detach(), *torch.autograd.grad(out, leaves, case.grad)


RUNS = {"whole": whole, "beside": beside, "eager": eager, "full": full, "candidate": candidate}
each_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())


def tapes() -> Iterator[Taped]:
    modules = [m for name, m in sys.modules.items() if name.startswith("pbfx_kernels.")]
    yield from {
        id(v): v for m in modules for v in vars(m).values() if isinstance(v, Taped)
    }.values()


def forget() -> None:
    for taped in tapes():
        taped._tapes.clear()


def played() -> int:
    return sum(callable(tape) for taped in tapes() for tape in taped._tapes.values())


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Libraries choose the same algorithm for the same call; ours do anyway."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    forget()
    yield
    forget()


def assert_same(found: Any, wanted: Any) -> None:
    assert len(found) == len(wanted)
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), index


@each_run
@each_dtype
@each_site
def test_a_tape_gives_the_bits_of_its_body(
    site: Site, dtype: torch.dtype, run: Callable[[Case], Any]
) -> None:
    found = [run(Case(site, dtype, 3, seed)) for seed in range(CALLS)]
    if found[0]:
        assert played(), "nothing was recorded"
    for seed, each in enumerate(found):
        forget()
        assert_same(each, run(Case(site, dtype, 3, seed)))


@each_run
@pytest.mark.parametrize("name", ["fused", "long", "walked", "patches", "depthwise"])
def test_a_tape_can_be_captured(name: str, run: Callable[[Case], Any]) -> None:
    case, other = (Case(SITES[name], torch.bfloat16, 2, seed) for seed in (0, 1))
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run(case)
    torch.cuda.current_stream().wait_stream(aside)
    assert played()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(case)
    names = ("x", "w", "b", "v", "c", "to_soma", "to_dendrite", "soma", "links", "grad")
    for name in names:
        getattr(case, name).copy_(getattr(other, name))
    graph.replay()
    forget()
    assert_same(found, run(other))


def test_another_stream_gets_the_launches() -> None:
    site = SITES["fused"]
    for seed in range(3):
        whole(Case(site, torch.bfloat16, 3, seed))
    case, aside = Case(site, torch.bfloat16, 3, 7), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        # What the default stream does meanwhile must not matter.
        torch.cuda._sleep(10**7)
        case.x.mul_(2)
        found = whole(case)
    aside.synchronize()
    forget()
    assert_same(found, whole(case))


def test_memory_is_not_held_longer_than_by_the_body() -> None:
    """Patches come 256 MiB at a time; all of them would be four times as much."""
    site = Site((512, 3, 112, 112), (16, 3, 7, 7), _form(2, 2, 3))
    case, peaks = Case(site, torch.bfloat16, 3, 0), []
    for _ in range(4):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        whole(case)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert played()
    # Nor by who records it.
    assert max(peaks[1:]) <= 1.05 * peaks[0], peaks
