"""Sites to test on, and an oracle that shares no code with the package.

The oracle runs one op per dendrite and lets autograd differentiate.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pbfx_kernels import Geometry
from pbfx_kernels.neurons import pack, pack_bias

F64 = torch.float64
# Of tensors, and of None where a site has no bias.
Tensors = dict[str, Any]
ACTIVATION_MODULES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.nn.Sigmoid(),
    "tanh": torch.nn.Tanh(),
    "relu": torch.nn.ReLU(),
    "gelu": torch.nn.GELU(),
    "silu": torch.nn.SiLU(),
}


@dataclass(frozen=True)
class Site:
    """A soma to grow on: shape of its input, of its weight, and its geometry."""

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry = field(default_factory=Geometry)

    def soma(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the plain torch op."""
        g = self.geometry
        if g.spatial == 0:
            return F.linear(x, weight, bias)
        if g.transposed:
            ops = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
            return ops[g.spatial - 1](
                x, weight, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation
            )
        op = (F.conv1d, F.conv2d, F.conv3d)[g.spatial - 1]
        return op(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)

    def per_channel(self, links: Tensor) -> Tensor:
        """Line `(N,)` up with the channels of the output, batched or not."""
        return links.reshape(-1, *(1,) * self.geometry.spatial)

    @property
    def positions(self) -> tuple[int, ...]:
        """Axes of the output that are not the channels."""
        dims = len(self.x)
        return tuple(axis for axis in range(dims) if axis != dims + self.geometry.channel_axis)

    @property
    def neurons(self) -> int:
        """N: of a transposed convolution, whose weight starts with the channels, by its groups."""
        g = self.geometry
        return self.weight[1] * g.groups if g.transposed else self.weight[0]

    @property
    def op_geometry(self) -> tuple[Any, ...]:
        """The op's last six arguments."""
        g = self.geometry
        return g.stride, g.padding, g.dilation, g.groups, g.transposed, g.output_padding


def _conv(spatial: int, **form: Any) -> Geometry:
    return Geometry.convolution(spatial, **form)


def _transposed(spatial: int, **form: Any) -> Geometry:
    return Geometry.convolution(spatial, transposed=True, **form)


SITES = (
    Site("linear", (5, 4), (6, 4)),
    Site("linear-1", (1, 1), (1, 1)),
    Site("linear-63-127", (63, 127), (63, 127)),
    Site("linear-sequence", (2, 7, 5), (3, 5)),
    Site("linear-unbatched", (4,), (6, 4)),
    Site("linear-empty", (0, 4), (6, 4)),
    Site("conv1d", (2, 3, 11), (4, 3, 3), _conv(1, stride=2, padding=1)),
    Site("conv1d-127", (1, 1, 127), (1, 1, 63), _conv(1)),
    Site("conv1d-unbatched", (3, 11), (4, 3, 3), _conv(1, padding=2, dilation=2)),
    Site("conv2d", (2, 3, 7, 6), (5, 3, 3, 3), _conv(2)),
    Site(
        "conv2d-form",
        (2, 4, 9, 8),
        (6, 2, 3, 2),
        _conv(2, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
    ),
    Site("conv2d-depthwise", (2, 4, 7, 7), (4, 1, 3, 3), _conv(2, padding=1, groups=4)),
    Site("conv2d-multiplier", (2, 3, 7, 7), (6, 1, 3, 3), _conv(2, stride=2, groups=3)),
    Site("conv2d-1x1", (2, 3, 5, 5), (4, 3, 1, 1), _conv(2)),
    Site("conv2d-unbatched", (4, 7, 7), (4, 2, 3, 3), _conv(2, padding=1, groups=2)),
    Site("conv2d-empty", (0, 4, 7, 7), (4, 2, 3, 3), _conv(2, padding=1, groups=2)),
    Site("conv3d", (2, 4, 5, 4, 6), (6, 2, 2, 3, 2), _conv(3, padding=(1, 0, 1), groups=2)),
    Site("transposed1d", (2, 3, 5), (3, 4, 3), _transposed(1, stride=2, padding=1)),
    Site("transposed2d", (2, 3, 4, 5), (3, 5, 3, 2), _transposed(2)),
    Site(
        "transposed2d-form",
        (2, 4, 4, 3),
        (4, 3, 3, 2),
        _transposed(
            2,
            stride=(3, 1),
            padding=(1, 0),
            dilation=(1, 2),
            groups=2,
            output_padding=(2, 1),
        ),
    ),
    Site(
        "transposed2d-depthwise",
        (2, 4, 3, 3),
        (4, 1, 4, 4),
        _transposed(2, stride=2, padding=1, groups=4),
    ),
    Site("transposed2d-unbatched", (4, 3, 3), (4, 2, 2, 2), _transposed(2, stride=2, groups=2)),
    Site("transposed2d-empty", (0, 4, 3, 3), (4, 2, 2, 2), _transposed(2, stride=2)),
    Site(
        "transposed3d",
        (2, 4, 2, 3, 2),
        (4, 3, 2, 1, 3),
        _transposed(3, stride=(2, 1, 1), output_padding=(1, 0, 0), groups=2),
    ),
)
BY_NAME = {site.name: site for site in SITES}
# Neurons that read a channel of their own.
DEPTHWISE = (
    BY_NAME["conv2d-depthwise"],
    Site(
        "depthwise-form",
        (2, 5, 9, 11),
        (5, 1, 3, 2),
        _conv(2, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=5),
    ),
    Site("depthwise-unbatched", (17, 12, 7), (17, 1, 5, 5), _conv(2, padding=2, groups=17)),
    Site("depthwise-tall", (1, 3, 12, 9), (3, 1, 9, 3), _conv(2, padding=(4, 1), groups=3)),
    Site("depthwise-padded", (2, 3, 4, 5), (3, 1, 3, 2), _conv(2, stride=3, padding=4, groups=3)),
    Site("depthwise-bare", (1, 3, 9, 7), (3, 1, 2, 3), _conv(2, stride=(1, 2), groups=3)),
    Site("depthwise-pointwise", (2, 6, 3, 5), (6, 1, 1, 1), _conv(2, groups=6)),
    Site("depthwise-1d", (2, 4, 23), (4, 1, 5), _conv(1, stride=2, padding=2, groups=4)),
    Site("depthwise-1d-unbatched", (4, 9), (4, 1, 3), _conv(1, dilation=2, groups=4)),
)
sites = pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)


@dataclass
class Dendrites:
    """The tensors of a site with dendrites, in float64; `args` casts them."""

    site: Site
    tensors: Tensors
    activation: str = "tanh"

    def args(self, dtype: torch.dtype = F64) -> Tensors:
        return {
            name: None if tensor is None else tensor.to(dtype, copy=True).requires_grad_()
            for name, tensor in self.tensors.items()
        }


def make_dendrites(site: Site, d: int, activation: str = "tanh", bias: bool = True) -> Dendrites:
    """Draw a site with D dendrites, scaled so that preactivations are of order one."""
    n = site.neurons
    fan = max(1, torch.Size(site.weight).numel() // max(n, 1))
    x, w, b = _normal(*site.x), _normal(*site.weight) * fan**-0.5, _normal(n)
    tensors = {
        "soma": site.soma(x, w, b),
        "x": x,
        "weight": _normal(d, *site.weight) * fan**-0.5,
        "bias": _normal(d, n) if bias else None,
        "to_soma": _normal(d, n),
        # Full, so that a test fails if more than the strictly lower triangle is read.
        "to_dendrite": _normal(d, d, n),
    }
    return Dendrites(site, tensors, activation)


def oracle_dendrites(site: Site, tensors: Tensors, activation: str) -> tuple[Tensor, list[Tensor]]:
    """Evaluate dendrites one by one on a detached input: autograd of it is the perforated one."""
    named = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    x, out = named["x"].detach(), named["soma"]
    activations: list[Tensor] = []
    for d in range(named["weight"].shape[0]):
        bias = named["bias"][d] if "bias" in named else None
        z = site.soma(x, named["weight"][d], bias)
        for e, a in enumerate(activations):
            z = z + site.per_channel(named["to_dendrite"][d, e]) * a
        # Frozen but for the to-soma links: that is what perforated means.
        activations.append(ACTIVATION_MODULES[activation](z).detach())
        out = out + site.per_channel(named["to_soma"][d]) * activations[-1]
    return out, activations


@dataclass
class PackedSite:
    """A site for inference: what `neurons` and `joined` take, and what they have to give.

    `together` and `apart` hold x, weight, bias, to_soma and to_dendrite, with and without the soma
    in weight and bias; `soma` and `expected` are float64.
    """

    together: list[Tensor | None]
    apart: list[Tensor | None]
    soma: Tensor
    expected: Tensor


def make_neurons(site: Site, d: int, bias: bool = True, dtype: torch.dtype = F64) -> PackedSite:
    """Draw a site with D dendrites, everything rounded to `dtype`."""
    case, n = make_dendrites(site, d, bias=bias), site.neurons
    fan = max(1, torch.Size(site.weight).numel() // max(n, 1))
    drawn = case.tensors | {
        "w": _normal(*site.weight) * fan**-0.5,
        "b": _normal(n) if bias else None,
    }
    low = {name: None if t is None else t.to(dtype) for name, t in drawn.items()}
    wide = {name: None if t is None else t.double() for name, t in low.items()}
    wide["soma"] = site.soma(wide["x"], wide["w"], wide["b"])
    links = low["to_soma"], low["to_dendrite"]
    stacks = {
        "together": (
            torch.cat([low["w"][None], low["weight"]]),
            torch.cat([low["b"][None], low["bias"]]) if bias else None,
        ),
        "apart": (low["weight"], low["bias"]),
    }
    packed = {
        name: [
            low["x"],
            pack(weight, site.geometry),
            None if offsets is None else pack_bias(offsets, site.geometry),
            *links,
        ]
        for name, (weight, offsets) in stacks.items()
    }
    return PackedSite(**packed, soma=wide["soma"], expected=oracle_dendrites(site, wide, "tanh")[0])


@dataclass
class Candidates:
    """The tensors of a site in its dendrite phase, in float64; `args` casts them."""

    site: Site
    tensors: Tensors
    grad: Tensor
    activation: str = "tanh"

    LEARN = ("weight", "bias", "to_dendrite", "moments")

    def args(self, dtype: torch.dtype = F64) -> Tensors:
        cast: Tensors = {}
        for name, tensor in self.tensors.items():
            wide = dtype if dtype == F64 else torch.float32
            to = wide if name in ("moments", "direction", "error_mean", "regression") else dtype
            cast[name] = None if tensor is None else tensor.to(to)
        for name in (*self.LEARN, "neuron"):
            tensor = cast[name]
            if tensor is not None:
                cast[name] = tensor.clone().requires_grad_()
        return cast


def make_candidates(
    site: Site,
    c: int,
    d: int,
    activation: str = "tanh",
    bias: bool = True,
    regression: bool = False,
) -> Candidates:
    """Draw a site with D accepted dendrites and C candidates per neuron.

    With a `regression`, there is one more tensor of that name, as for the correlation objective.
    """
    grown = make_dendrites(site, d).tensors
    neuron, x = grown["soma"], grown["x"]
    assert neuron is not None
    assert x is not None
    n = site.neurons
    fan = max(1, torch.Size(site.weight).numel() // max(n, 1))
    tensors = {
        "neuron": neuron,
        "x": x,
        "activations": torch.tanh(_normal(d, *neuron.shape)),
        "weight": _normal(c, *site.weight) * fan**-0.5,
        "bias": _normal(c, n) if bias else None,
        "to_dendrite": _normal(c, d, n),
        # Never read, so NaN must do no harm.
        "moments": torch.full((6 * c, n), torch.nan, dtype=F64),
        "direction": _normal(c, n),
        "error_mean": _normal(n),
        **({"regression": _normal(2, c, n)} if regression else {}),
    }
    return Candidates(site, tensors, _normal(*neuron.shape) + 0.3, activation)


def oracle_candidates(
    site: Site, tensors: Tensors, grad: Tensor, activation: str
) -> tuple[Tensors, Tensor]:
    """Differentiate the negated covariances by autograd, and sum the moments one by one.

    With a regression, half of β (a - ā)² is taken from each covariance.

    Returns the gradients of weight, bias and to_dendrite, and the moments `(6, C, N)`.
    """
    leaves = {
        name: None if tensors[name] is None else tensors[name].detach().clone().requires_grad_()
        for name in ("weight", "bias", "to_dendrite")
    }
    named = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    weight, bias, to_dendrite = leaves["weight"], leaves["bias"], leaves["to_dendrite"]
    assert weight is not None
    assert to_dendrite is not None
    x, accepted = named["x"].detach(), named["activations"].detach()
    dims = site.positions
    positions = max(1, grad.numel() // grad.shape[site.geometry.channel_axis])
    centred = grad - site.per_channel(named["error_mean"])
    loss = grad.new_zeros(())
    moments = []
    for c in range(weight.shape[0]):
        z = site.soma(x, weight[c], None if bias is None else bias[c])
        for e in range(accepted.shape[0]):
            z = z + site.per_channel(to_dendrite[c, e]) * accepted[e]
        a = ACTIVATION_MODULES[activation](z)
        mean = _sum(a, dims).detach() / positions
        gain = _sum((a - site.per_channel(mean)) * centred, dims) / positions
        if "regression" in named:
            trend, center = (site.per_channel(row) for row in named["regression"][:, c])
            gain = gain - _sum(trend * (a - center) ** 2, dims) / positions / 2
        loss = loss - (named["direction"][c] * gain).sum()
        a = a.detach()
        rows = (torch.ones_like(a), a, a * a, grad, grad * grad, a * grad)
        moments.append(torch.stack([_sum(row, dims) for row in rows]))
    loss.backward()
    gradients = {name: None if leaf is None else _gradient(leaf) for name, leaf in leaves.items()}
    return gradients, torch.stack(moments, dim=1)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _sum(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    # torch sums over everything when the list of dimensions is empty.
    return values.sum(dims) if dims else values


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)
