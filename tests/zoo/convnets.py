"""Convolutional classifiers, from LeNet to Inception."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.member import Member, images


class LeNet(nn.Module):
    """Two convolutions, three linear layers, shapes worked out by hand."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 5, padding=2)
        self.conv2 = nn.Conv2d(3, 4, 5)
        self.fc1 = nn.Linear(4 * 2 * 2, 8)
        self.fc2 = nn.Linear(8, 6)
        self.fc3 = nn.Linear(6, classes)

    def num_flat_features(self, x: Tensor) -> int:
        """Multiply the sizes of all axes but the first."""
        total = 1
        for size in x.size()[1:]:
            total *= size
        return total

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.conv1(x)), 2)
        x = F.max_pool2d(torch.tanh(self.conv2(x)), (2, 2))
        x = x.view(-1, self.num_flat_features(x))
        x = F.relu(self.fc1(x))
        x = F.dropout(F.relu(self.fc2(x)), 0.3, training=self.training)
        return F.log_softmax(self.fc3(x), dim=1)


class VGG(nn.Module):
    """Layers made from a list of widths, an "M" being a pooling layer."""

    PLAN = (4, "M", 6, 6, "M")

    def __init__(self, classes: int = 5, dropout: float = 0.5, init_weights: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for step in self.PLAN:
            if isinstance(step, int):
                layers += [nn.Conv2d(channels, step, 3, padding=1), nn.BatchNorm2d(step)]
                layers += [nn.ReLU(inplace=True)]
                channels = step
            else:
                layers += [nn.MaxPool2d(2, 2)]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 4, 12), nn.ReLU(True), nn.Dropout(dropout), nn.Linear(12, classes)
        )
        if init_weights:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out")
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class BasicBlock(nn.Module):
    """Conv, norm, relu, conv, norm, add, relu."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class PreActivationBlock(nn.Module):
    """Norm and relu before each convolution; the shortcut starts after the first pair."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class ResNet(nn.Module):
    """Stages of either block, and a head over the mean of all positions."""

    def __init__(self, block: type[nn.Module], classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(block(4, 4, 1))
        self.layer2 = nn.Sequential(block(4, 6, 2), block(6, 6, 1))
        self.fc = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        x = F.avg_pool2d(x, x.size(-1))
        return self.fc(x.view(x.size(0), -1))


class DenseLayer(nn.Module):
    """A bottleneck over all maps made so far, computed again in the backward if asked."""

    def __init__(self, inputs: int, growth: int, drop_rate: float, memory_efficient: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(2 * growth)
        self.conv1 = nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)
        self.drop_rate, self.memory_efficient = drop_rate, memory_efficient

    def bottleneck(self, maps: list[Tensor]) -> Tensor:
        """Return the narrow maps made of all older ones."""
        return self.conv1(F.relu(self.norm1(torch.cat(maps, 1))))

    def forward(self, maps: Tensor | list[Tensor]) -> Tensor:
        older = [maps] if isinstance(maps, Tensor) else maps
        if self.memory_efficient and any(t.requires_grad for t in older):
            narrow = checkpoint(lambda *t: self.bottleneck(list(t)), *older, use_reentrant=False)
        else:
            narrow = self.bottleneck(older)
        new = self.conv2(F.relu(self.norm2(narrow)))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new


class DenseBlock(nn.ModuleDict):
    """A dict of layers that each read what all before them wrote."""

    def __init__(self, layers: int, inputs: int, growth: int, memory_efficient: bool) -> None:
        super().__init__()
        for i in range(layers):
            layer = DenseLayer(inputs + i * growth, growth, 0.2, memory_efficient)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for _, layer in self.items():
            maps.append(layer(maps))
        return torch.cat(maps, 1)


class DenseNet(nn.Module):
    """Two dense blocks with a transition between them."""

    def __init__(self, memory_efficient: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, 4, 3, padding=1, bias=False))
        self.features.add_module("block1", DenseBlock(2, 4, 3, memory_efficient))
        transition = nn.Sequential(
            nn.BatchNorm2d(10), nn.ReLU(inplace=True), nn.Conv2d(10, 5, 1), nn.AvgPool2d(2)
        )
        self.features.add_module("transition1", transition)
        self.features.add_module("block2", DenseBlock(2, 5, 3, memory_efficient))
        self.features.add_module("norm5", nn.BatchNorm2d(11))
        self.classifier = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.features(x), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(maps, 1).flatten(1))


class InceptionOutputs(NamedTuple):
    """What the network gives in training."""

    logits: Tensor
    aux_logits: Tensor | None


class ConvNorm(nn.Module):
    """A convolution, its norm and its relu; further settings go to the convolution."""

    def __init__(self, inputs: int, outputs: int, **settings: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, bias=False, **settings)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionBranches(nn.Module):
    """Four branches over one input, one of them factorised, joined along the channels."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(inputs, 2, kernel_size=1)
        self.branch3x3_1 = ConvNorm(inputs, 2, kernel_size=1)
        self.branch3x3_2a = ConvNorm(2, 2, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNorm(2, 2, kernel_size=(3, 1), padding=(1, 0))
        self.branch_pool = ConvNorm(inputs, 2, kernel_size=1)

    def _forward(self, x: Tensor) -> list[Tensor]:
        narrow = self.branch3x3_1(x)
        pair = torch.cat([self.branch3x3_2a(narrow), self.branch3x3_2b(narrow)], 1)
        pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        return [self.branch1x1(x), pair, self.branch_pool(pooled)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._forward(x), 1)


class Inception(nn.Module):
    """Branches, and an auxiliary head that exists only in training."""

    def __init__(self, transform_input: bool = True, aux_logits: bool = True) -> None:
        super().__init__()
        self.transform_input, self.aux_logits = transform_input, aux_logits
        self.stem = ConvNorm(3, 4, kernel_size=3, stride=2)
        self.mixed1, self.mixed2 = InceptionBranches(4), InceptionBranches(8)
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        self.dropout, self.fc = nn.Dropout(0.2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> InceptionOutputs | Tensor:
        if self.transform_input:
            red = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
            x = torch.cat((red, x[:, 1:]), 1)
        x = self.mixed1(self.stem(x))
        aux = self.aux(x) if self.training and self.aux_logits else None
        x = F.adaptive_avg_pool2d(self.mixed2(x), (1, 1))
        logits = self.fc(torch.flatten(self.dropout(x), 1))
        if self.training and self.aux_logits:
            return InceptionOutputs(logits, aux)
        return logits


MEMBERS = [
    Member("lenet", LeNet, images(3, 1, 16, 16), 5, rungs="op"),
    Member("vgg", VGG, images(3, 3, 12, 12), 5),
    Member("resnet", lambda: ResNet(BasicBlock), images(3, 3, 8, 8), 9),
    Member("resnet, pre-activation", lambda: ResNet(PreActivationBlock), images(3, 3, 8, 8), 9),
    Member("densenet", DenseNet, images(3, 3, 8, 8), 11, rungs="whole op"),
    Member(
        "densenet, checkpointed", lambda: DenseNet(True), images(3, 3, 8, 8), 11, rungs="whole op"
    ),
    Member(
        "inception",
        Inception,
        images(3, 3, 11, 11),
        13,
        rungs="submodule op",
        silent=frozenset({"aux.2"}),
    ),
]
