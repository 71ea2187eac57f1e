"""The ops of two models' training steps, on a GPU that computes nothing: each of them is a tape."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hopper import Hopper, forget, tapes
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import pbfx_kernels.conv_neuron_op
import pbfx_kernels.neuron_op  # noqa: F401  register their ops
from pbfx_kernels import dendrite_autograd, dendrite_op, neuron_autograd
from pbfx_kernels.geometry import LINEAR, Geometry

ops = torch.ops.pbfx
_form = Geometry.convolution
D = 3


@dataclasses.dataclass(frozen=True)
class Site:
    """A soma: its input, its weight and how it slides."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry = LINEAR


SITES = {
    "mnist image": Site((1024, 1, 28, 28), (32, 1, 3, 3), _form(2)),
    "mnist conv": Site((256, 32, 26, 26), (64, 32, 3, 3), _form(2)),
    "mnist hidden": Site((1024, 9216), (128, 9216)),
    "mnist classes": Site((1024, 128), (10, 128)),
    "resnet stem": Site((32, 3, 224, 224), (64, 3, 7, 7), _form(2, 2, 3)),
    "resnet 56": Site((32, 64, 56, 56), (64, 64, 3, 3), _form(2, 1, 1)),
    "resnet 28, half": Site((32, 64, 56, 56), (128, 64, 3, 3), _form(2, 2, 1)),
    "resnet 28": Site((32, 128, 28, 28), (128, 128, 3, 3), _form(2, 1, 1)),
    "resnet 28, shortcut": Site((32, 64, 56, 56), (128, 64, 1, 1), _form(2, 2)),
    "resnet 7": Site((32, 512, 7, 7), (512, 512, 3, 3), _form(2, 1, 1)),
    "resnet head": Site((32, 512), (1000, 512)),
}


class Tensors:
    """A site's, as a compiled step under autocast has them; launches look at where they begin.

    Args:
        site: the site.
        last: whether images are in channels_last.
        cast: whether the weights of dendrites are in 16 bits as the soma's are.
        seed: of the numbers.
    """

    def __init__(self, site: Site, last: bool, cast: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        geometry, n = site.geometry, site.weight[0]
        form = torch.channels_last if last and geometry.spatial else torch.contiguous_format

        def filled(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full(shape, float(torch.randn((), generator=generator)), dtype=dtype)

        def low(*shape: int) -> Tensor:
            return filled(*shape, dtype=torch.bfloat16).contiguous(memory_format=form)

        self.geometry = geometry
        self.x, self.w, self.b = low(*site.x), low(*site.weight), filled(n, dtype=torch.bfloat16)
        self.v = filled(D, *site.weight, dtype=torch.bfloat16 if cast else torch.float32)
        self.c, self.to_soma, self.to_dendrite = filled(D, n), filled(D, n), filled(D, D, n)
        out = geometry.output_shape(site.x, site.weight)
        self.soma, self.grad = low(*out), low(*out)

    @property
    def form(self) -> tuple[Any, ...]:
        g = self.geometry
        return g.stride, g.padding, g.dilation, g.groups

    @property
    def links(self) -> tuple[Any, ...]:
        return self.c, self.to_soma, self.to_dendrite, "relu"


def whole(t: Tensors) -> Any:
    """Soma and dendrites in one op."""
    somas = t.x, t.w, t.b, t.v
    if t.geometry.spatial == 0:
        return ops.perforated_linear.bare(*somas, *t.links, True)
    op = ops.perforated_conv2d.bare
    return *op(*somas, *t.links, *t.form, True), op(*somas, *t.links, *t.form, False)[0]


def beside(t: Tensors) -> Any:
    """Dendrites beside a soma."""
    rest = t.v, *t.links, *t.form, False, ()
    kept, alone = (ops.dendrites.bare(t.soma, t.x, *rest, keep) for keep in (True, False))
    return *kept, alone[0]


def backward(t: Tensors) -> Any:
    """All sums for links."""
    axis, a = t.geometry.channel_axis, torch.stack([t.soma] * D).mul_(0.5)
    if t.geometry.spatial:
        stack = (t.soma.numel(), *t.soma.stride())
        a = torch.empty_strided(a.shape, stack, dtype=a.dtype).copy_(a)
    kept = ops.dendrites_backward.bare(t.grad, a, axis)
    again = ops.dendrites_recompute.bare(
        t.grad, t.x, t.v, t.c, t.to_dendrite, "relu", *t.form, False, ()
    )
    if t.geometry.spatial:
        return kept, again
    both = ops.link_and_bias_gradients.bare(t.grad, a, torch.float32, torch.bfloat16)
    return kept, again, *both


def eager(t: Tensors) -> Any:
    """What programs run that are not compiled."""
    leaf = t.to_soma.detach().requires_grad_()
    links = t.c, leaf, t.to_dendrite, "relu"
    if t.geometry.spatial:
        out = dendrite_autograd.apply(t.soma, t.x, t.v, *links, t.geometry, True)
    else:
        out = neuron_autograd.apply(t.x, t.w, t.b, t.v, *links, True)
    return *out, *torch.autograd.grad(out[0], leaf, t.grad)


RUNS = {"whole": whole, "beside": beside, "backward": backward, "eager": eager}
each_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
each_site = pytest.mark.parametrize("site", SITES.values(), ids=SITES.keys())


def cheap(x: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Stand for a library's product: of the form that it has, and read off both factors."""
    form = torch.contiguous_format
    if x.dim() == 4 and x.stride(1) == 1:
        form = torch.channels_last
    product = x[(0,) * x.dim()] * weight[(0,) * weight.dim()]
    return product.expand(shape).contiguous(memory_format=form)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hopper]:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return cheap(x, weight, (*x.shape[:-1], len(weight)))

    def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *form: Any) -> Tensor:
        return cheap(x, weight, Geometry(*form).output_shape(x.shape, weight.shape))

    def convolution(x, weight, bias, stride, padding, dilation, _, __, groups):
        return conv2d(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(functional, "linear", linear)
    monkeypatch.setattr(functional, "conv2d", conv2d)
    monkeypatch.setattr(torch, "convolution", convolution)
    forget()
    yield Hopper(monkeypatch)
    forget()


def beginnings(found: Any) -> list[Any]:
    """Return the forms of results, and what lies where launches write."""
    return [
        (t.shape, t.stride(), t.dtype, ctypes.string_at(t.data_ptr(), 16) if t.numel() else b"")
        for t in found
    ]


@pytest.mark.parametrize("cast", [False, True], ids=["float weights", "cast weights"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@each_run
@each_site
def test_every_op_of_a_step_is_a_tape_at_its_second_call(
    site: Site, run: Callable[[Tensors], Any], last: bool, cast: bool, gpu: Hopper
) -> None:
    steps = [Tensors(site, last, cast, seed) for seed in range(3)]
    for step in steps[:2]:
        run(step)
    made = [tape for op in tapes() for tape in op._tapes.values()]
    assert made
    assert all(map(callable, made))
    before = len(gpu.launches)
    played = beginnings(run(steps[2]))
    launches = gpu.launches[before:]
    forget()
    before = len(gpu.launches)
    assert played == beginnings(run(steps[2]))
    assert launches
    assert launches == gpu.launches[before:]
    assert played != beginnings(run(steps[1])), "results do not depend on what is given"


def test_playing_asks_torch_for_products_and_copies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step's ops launch is theirs: no sum, no fill and no allocation goes through torch."""
    seen: list[str] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    for site in SITES.values():
        t = Tensors(site, True, False, 0)
        for run in (whole, backward):
            for _ in range(2):
                run(t)
        a = torch.empty_strided((D, *t.soma.shape), (t.soma.numel(), *t.soma.stride())).bfloat16()
        g = t.geometry
        forms = t.grad, t.x, t.v, t.c, t.to_dendrite
        with Noted():
            summed = dendrite_op._summed((t.grad, a), g.channel_axis)
            again = dendrite_op._summed_again(forms, "relu", g, None)
        assert summed.shape == again.shape
    assert set(seen) <= {"aten._to_copy", "aten.mul", "aten.expand", "aten.clone", "aten.select"}
