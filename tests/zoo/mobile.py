"""Convolutional networks for small machines, and their modern relatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.member import Member, images


def make_divisible(value: float, divisor: int = 2) -> int:
    """Round a width to a multiple of `divisor`, never down by more than a tenth."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class SqueezeExcite(nn.Module):
    """Channels weighted by what their means say."""

    def __init__(
        self, channels: int, ratio: float, gate: Callable[..., nn.Module] = nn.Sigmoid
    ) -> None:
        super().__init__()
        narrow = make_divisible(channels * ratio)
        self.conv_reduce = nn.Conv2d(channels, narrow, 1)
        self.conv_expand = nn.Conv2d(narrow, channels, 1)
        self.act, self.gate = nn.ReLU(inplace=True), gate()

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.conv_expand(self.act(self.conv_reduce(scale))))


def drop_path(x: Tensor, rate: float, training: bool, scale_by_keep: bool = True) -> Tensor:
    """Drop whole examples of a residual branch."""
    if rate == 0.0 or not training:
        return x
    keep = 1 - rate
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    if keep > 0.0 and scale_by_keep:
        mask.div_(keep)
    return x * mask


class DropPath(nn.Module):
    """Stochastic depth as a layer."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.rate, self.training)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, weigh the channels, project."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        expansion: int,
        stride: int,
        act: Callable[..., nn.Module],
        se_ratio: float = 0.25,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        wide = inputs * expansion
        self.has_skip = stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), act()]
        depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        layers += [depthwise, nn.BatchNorm2d(wide), act()]
        if se_ratio > 0:
            layers += [SqueezeExcite(wide, se_ratio)]
        layers += [nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.block = nn.Sequential(*layers)
        self.drop_path = DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.block(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class MobileNet(nn.Module):
    """Inverted residuals with hard swish."""

    def __init__(self, classes: int = 5, width_mult: float = 1.0) -> None:
        super().__init__()
        act = partial(nn.Hardswish, inplace=True)
        first = make_divisible(4 * width_mult)
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), act()),
            InvertedResidual(first, 4, 1, 1, act),
            InvertedResidual(4, 6, 2, 2, act, se_ratio=0.0),
            InvertedResidual(6, 6, 2, 1, act),
        )
        self.classifier = nn.Sequential(
            nn.Linear(6, 8), nn.Hardswish(inplace=True), nn.Dropout(0.2), nn.Linear(8, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class EfficientNet(nn.Module):
    """Scaled inverted residuals, split into features and head, with stochastic depth."""

    def __init__(self, classes: int = 5, depth: float = 1.2, drop_path_rate: float = 0.3) -> None:
        super().__init__()
        self.num_classes, self.drop_rate = classes, 0.2
        self.conv_stem = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        repeats = math.ceil(depth)
        self.blocks = nn.ModuleList()
        for i in range(repeats):
            rate = drop_path_rate * (i + 1) / repeats
            stride = 2 if i == 0 else 1
            self.blocks.append(InvertedResidual(4, 4, 3, stride, nn.SiLU, 0.25, rate))
        self.conv_head = nn.Conv2d(4, 8, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, classes)

    def get_classifier(self) -> nn.Module:
        """Return the head's last layer."""
        return self.classifier

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the maps before pooling."""
        x = F.silu(self.bn1(self.conv_stem(x)))
        for block in self.blocks:
            x = block(x)
        return F.silu(self.bn2(self.conv_head(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the maps and classify, or stop before the last layer."""
        x = x.mean((2, 3))
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of maps."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A wide depthwise convolution and a perceptron over channels, scaled by a parameter."""

    def __init__(self, channels: int, drop: float = 0.0, layer_scale: float = 1e-1) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(layer_scale * torch.ones(channels)) if layer_scale > 0 else None
        self.drop_path = DropPath(drop) if drop > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        x = self.pwconv2(F.gelu(self.pwconv1(x)))
        if self.gamma is not None:
            x = self.gamma * x
        return shortcut + self.drop_path(x.permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    """Two stages with a norm before each change of size."""

    def __init__(self, classes: int = 5, dims: tuple[int, ...] = (4, 6)) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, dims[0], 2, 2), ChannelNorm(dims[0])),
                nn.Sequential(ChannelNorm(dims[0]), nn.Conv2d(dims[0], dims[1], 2, 2)),
            ]
        )
        rates = [r.item() for r in torch.linspace(0, 0.3, len(dims))]
        self.stages = nn.ModuleList(
            ConvNeXtBlock(dim, rate) for dim, rate in zip(dims, rates, strict=True)
        )
        self.norm, self.head = nn.LayerNorm(dims[-1], eps=1e-6), nn.Linear(dims[-1], classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return one normed vector per image."""
        for i in range(len(self.stages)):
            x = self.stages[i](self.downsample_layers[i](x))
        return self.norm(x.mean([-2, -1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


_IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)

MEMBERS = [
    Member("mobilenet", MobileNet, images(3, 3, 16, 16), 15),
    Member(
        "efficientnet",
        EfficientNet,
        images(4, 3, 16, 16),
        13,
        rungs="submodule op",
        methods={
            "forward_features": lambda m: m.forward_features(_IMAGE),
            "forward_head": lambda m: m.forward_head(m.forward_features(_IMAGE), pre_logits=True),
            "get_classifier": lambda m: m.get_classifier()(torch.ones(1, 8)),
        },
    ),
    Member(
        "convnext",
        ConvNeXt,
        images(4, 3, 16, 16),
        9,
        rungs="submodule op",
        methods={"forward_features": lambda m: m.forward_features(_IMAGE)},
    ),
]
