"""Layers with dendrites to be timed one by one, and who computes them.

Every provider computes the whole neuron, soma included, from the same tensors, and learns the same
way: perforated, so the soma's weight and bias, its input and the to-soma links get gradients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import pbfx_kernels.neuron_op  # noqa: F401  registers `pbfx::perforated_linear`
from pbfx_kernels import Geometry, perforated_conv2d, perforated_linear
from pbfx_kernels.dispatch import evaluate_dendrites
from pbfx_kernels.packed import library, stacked_weight
from pbfx_kernels.problem import problem_of
from pbfx_kernels.strategy import Strategy, can_split, is_depthwise


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution of the grid.

    Attributes:
        name: in the table.
        x: shape of its input.
        weight: shape of its weight.
        geometry: linear, or a convolution over two dimensions.
        channels_last: memory format of a convolution's input.
    """

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry
    channels_last: bool = False

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the output."""
        return self.geometry.output_shape(self.x, self.weight)

    def flops(self, dendrites: int) -> int:
        """Return the multiply-adds of a forward, two each."""
        return 2 * (dendrites + 1) * math.prod(self.out) * math.prod(self.weight[1:])

    def elements(self, dendrites: int) -> int:
        """Return what a forward reads and writes at least: input, weights, output."""
        weights = (dendrites + 1) * math.prod(self.weight)
        return math.prod(self.x) + weights + math.prod(self.out)

    def soma(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the plain torch op."""
        g = self.geometry
        if g.spatial == 0:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def _linear(positions: int, neurons: int, inputs: int) -> Layer:
    name = f"linear {positions}x{neurons}x{inputs}"
    return Layer(name, (positions, inputs), (neurons, inputs), Geometry())


def _conv(
    name: str,
    batch: int,
    channels: int,
    size: int,
    neurons: int,
    taps: int,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> tuple[Layer, Layer]:
    geometry = Geometry.convolution(2, stride, padding, 1, groups)
    x, weight = (batch, channels, size, size), (neurons, channels // groups, taps, taps)
    return (
        Layer(f"{name} NCHW", x, weight, geometry),
        Layer(f"{name} NHWC", x, weight, geometry, True),
    )


def _resnet(taps: int, channels: int, neurons: int, size: int, stride: int = 1) -> Layer:
    """Return a convolution of ResNet-50 at batch 64, NHWC, over images of `size` squared."""
    name = f"{taps}x{taps} {channels}-{neurons} {size}" + f" /{stride}" * (stride > 1)
    return _conv(name, 64, channels, size, neurons, taps, stride, taps // 2)[1]


def _depthwise(channels: int, size: int, stride: int = 1) -> tuple[Layer, Layer]:
    """Return a depthwise convolution of MobileNetV2 at batch 64."""
    name = f"depthwise 3x3 {channels} {size}" + f" /{stride}" * (stride > 1)
    return _conv(name, 64, channels, size, channels, 3, stride, 1, channels)


LAYERS: tuple[Layer, ...] = (
    _linear(8192, 4096, 4096),
    _linear(16384, 3072, 768),
    _linear(16384, 768, 3072),
    _linear(65536, 256, 256),
    _linear(262144, 64, 64),
    _linear(4096, 1024, 1024),
    _linear(256, 1024, 1024),
    _linear(128, 128, 9216),
    _linear(128, 10, 128),
    _linear(1, 4096, 4096),
    _linear(1000, 1001, 999),
    *_conv("mnist conv1 b64", 64, 1, 28, 32, 3),
    *_conv("mnist conv2 b64", 64, 32, 26, 64, 3),
    *_conv("mnist conv1 b1024", 1024, 1, 28, 32, 3),
    *_conv("mnist conv2 b1024", 1024, 32, 26, 64, 3),
    *_conv("7x7 3-64 224", 64, 3, 224, 64, 7, 2, 3),
    *_conv("3x3 64 56", 64, 64, 56, 64, 3, 1, 1),
    *_conv("3x3 128 28", 64, 128, 28, 128, 3, 1, 1),
    *_conv("3x3 256 14", 64, 256, 14, 256, 3, 1, 1),
    *_conv("3x3 512 7", 64, 512, 7, 512, 3, 1, 1),
    *(_resnet(3, n, n, size, 2) for n, size in ((128, 56), (256, 28), (512, 14))),
    *_conv("1x1 64-256 56", 64, 64, 56, 256, 1),
    *_conv("1x1 256-64 56", 64, 256, 56, 64, 1),
    *(_resnet(1, *each) for each in ((64, 64, 56), (256, 128, 56), (128, 512, 28))),
    *(_resnet(1, *each) for each in ((512, 128, 28), (512, 256, 28), (256, 1024, 14))),
    *(_resnet(1, *each) for each in ((1024, 256, 14), (1024, 512, 14), (512, 2048, 7))),
    *(_resnet(1, *each) for each in ((2048, 512, 7), (256, 512, 56, 2))),
    *(_resnet(1, *each) for each in ((512, 1024, 28, 2), (1024, 2048, 14, 2))),
    *_depthwise(32, 112),
    *_depthwise(96, 112, 2),
    *_depthwise(144, 56),
    *_depthwise(144, 56, 2),
    *_depthwise(192, 28),
    *_depthwise(192, 28, 2),
    *_depthwise(384, 14),
    *_depthwise(576, 14),
    *_depthwise(576, 14, 2),
    *_depthwise(960, 7),
)


@dataclasses.dataclass(frozen=True)
class Tensors:
    """What a layer computes with: several inputs to rotate over, and weights."""

    layer: Layer
    inputs: list[Tensor]
    weight: Tensor
    bias: Tensor
    dendrites: tuple[Tensor, Tensor, Tensor, Tensor]
    grad: Tensor

    @property
    def learning(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, bias and to-soma links."""
        return self.weight, self.bias, self.dendrites[2]


# Of x, as Tensors.weight and so on follow it in `Neuron`'s arguments.
Neuron = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Full:
    """A neuron that learns by plain backpropagation: dendrites learn, and pass errors on.

    Attributes:
        neuron: computes it.
        captured: whether its calls can be captured in a CUDA graph.
    """

    neuron: Neuron
    captured: bool = True

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Return the neuron's output."""
        return self.neuron(*tensors)


def draw(
    layer: Layer, dendrites: int, dtype: torch.dtype, device: torch.device, seed: int, copies: int
) -> Tensors:
    """Draw a layer with D dendrites whose preactivations are of order one."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device) * scale
        drawn = drawn.to(dtype)
        if layer.channels_last and drawn.dim() == 4:
            drawn = drawn.to(memory_format=torch.channels_last)
        return drawn

    fan, neurons = math.prod(layer.weight[1:]) ** -0.5, layer.weight[0]
    # Only the strictly lower triangle is read.
    older = torch.ones(dendrites, dendrites, device=device).tril(-1)[..., None].to(dtype)
    return Tensors(
        layer,
        [normal(*layer.x).requires_grad_() for _ in range(copies)],
        normal(*layer.weight, scale=fan).requires_grad_(),
        normal(neurons).requires_grad_(),
        (
            normal(dendrites, *layer.weight, scale=fan),
            normal(dendrites, neurons),
            normal(dendrites, neurons, scale=0.3).requires_grad_(),
            normal(dendrites, dendrites, neurons, scale=0.3) * older,
        ),
        normal(*layer.out),
    )


def loop(layer: Layer, frozen: bool = True) -> Neuron:
    """Return the rival that anyone can write: one op per dendrite, in the order of the equation."""
    tail = (1,) * layer.geometry.spatial

    def neuron(x: Tensor, weight: Tensor, bias: Tensor, *dendrites: Tensor) -> Tensor:
        v, c, to_soma, to_dendrite = dendrites
        out, seen = layer.soma(x, weight, bias), x.detach() if frozen else x
        activations: list[Tensor] = []
        for d in range(v.shape[0]):
            z = layer.soma(seen, v[d], c[d])
            for e, earlier in enumerate(activations):
                z = z + to_dendrite[d, e].reshape(-1, *tail) * earlier
            activations.append(torch.tanh(z))
            out = out + to_soma[d].reshape(-1, *tail) * activations[d]
        return out

    return neuron


def packed(layer: Layer, frozen: bool = True) -> Neuron:
    """Return the better rival: one GEMM or convolution over all weights, then the epilogue."""
    groups, axis = layer.geometry.groups, layer.geometry.channel_axis
    tail = (1,) * layer.geometry.spatial

    def neuron(x: Tensor, weight: Tensor, bias: Tensor, *dendrites: Tensor) -> Tensor:
        v, c, to_soma, to_dendrite = dendrites
        out = layer.soma(x, weight, bias)
        count, neurons = to_soma.shape
        if not count:
            return out
        seen = x.detach() if frozen else x
        z = library(seen, stacked_weight(v, groups), layer.geometry)
        z = z.unflatten(axis, (groups, count, neurons // groups))
        activations: list[Tensor] = []
        for d in range(count):
            z_d = z.select(axis - 1, d).flatten(axis - 1, axis) + c[d].reshape(-1, *tail)
            for e, earlier in enumerate(activations):
                z_d = z_d + to_dendrite[d, e].reshape(-1, *tail) * earlier
            activations.append(torch.tanh(z_d))
            out = out + to_soma[d].reshape(-1, *tail) * activations[d]
        return out

    return neuron


def plain(layer: Layer) -> Neuron:
    """Return the layer without dendrites."""
    return lambda x, weight, bias, *_: layer.soma(x, weight, bias)


def chosen(layer: Layer) -> Neuron:
    """Return pbfx as a user calls it."""
    g = layer.geometry
    if g.spatial == 0:
        return perforated_linear
    return lambda *tensors: perforated_conv2d(
        *tensors, "tanh", g.stride, g.padding, g.dilation, g.groups
    )


def forced(layer: Layer, strategy: Strategy) -> Neuron:
    """Return pbfx with a strategy that it may not have chosen; it has no gradient."""

    def neuron(x: Tensor, weight: Tensor, bias: Tensor, *dendrites: Tensor) -> Tensor:
        soma = layer.soma(x, weight, bias)
        arguments = (*dendrites, "tanh", layer.geometry, False, strategy)
        return evaluate_dendrites(soma, x, *arguments)[0]

    return neuron


def fused() -> Neuron:
    """Return the op that computes soma and dendrites in one kernel, where it can."""

    def neuron(x: Tensor, weight: Tensor, bias: Tensor, *dendrites: Tensor) -> Tensor:
        keep = torch.is_grad_enabled()
        op = torch.ops.pbfx.perforated_linear.default
        return op(x, weight, bias, *dendrites, "tanh", keep)[0]

    return neuron


def strategies(tensors: Tensors) -> list[Strategy]:
    """Return the strategies that can compute a layer here, but for the reference."""
    if not tensors.weight.is_cuda or not tensors.dendrites[0].shape[0]:
        return []
    problem = problem_of(tensors.grad, tensors.dendrites[0], tensors.layer.geometry)
    able = {Strategy.SPLIT: can_split(problem), Strategy.DEPTHWISE: is_depthwise(problem)}
    return [Strategy.PACKED, *(strategy for strategy, known in able.items() if known)]
