"""The models that are measured, as users write them, and random data for them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pbfx.demo import nets

# Batches are rotated over so much memory that no cache holds them: an H200 has 50 MiB of L2.
_ROTATED_BYTES = 64 * 2**20
_MOST_BATCHES = 256

Batch = tuple[Tensor, Tensor]


class MnistNet(nets.MnistNet):
    """The demo's net, ending as the PyTorch MNIST example does."""

    def forward(self, images: Tensor) -> Tensor:
        return F.log_softmax(super().forward(images), dim=1)


class Mlp(nn.Sequential):
    """784-512-512-10, the hidden layers scaled by `width`."""

    def __init__(self, width: float = 1.0) -> None:
        hidden = nets.scaled(512, width)
        super().__init__(
            nn.Linear(784, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 10),
        )


class WideMlp(nn.Sequential):
    """4096-4096-4096-1000, the hidden layers scaled by `width`: all of it is GEMMs."""

    def __init__(self, width: float = 1.0) -> None:
        hidden = nets.scaled(4096, width)
        super().__init__(
            nn.Linear(4096, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1000),
        )


def quieten(norm: nn.BatchNorm2d) -> None:
    """Start the last norm of a block near zero (Goyal et al., arXiv 1706.02677).

    From 1, in 16 bits, the gradients of so many norms are noise, which no gate can tell from a
    fault.
    """
    nn.init.constant_(norm.weight, 0.02)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        quieten(self.norm2)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet18(nn.Module):
    """The layout of ResNet-18 (He et al., arXiv 1512.03385), its channels scaled by `width`."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels = [nets.scaled(n, width) for n in (64, 64, 128, 256, 512)]
        self.stem = nn.Conv2d(3, channels[0], 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(channels[0])
        blocks = []
        for stage, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
            blocks.append(ResidualBlock(inputs, outputs, 1 if stage == 0 else 2))
            blocks.append(ResidualBlock(outputs, outputs, 1))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the stride sits in the middle one."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * inner
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(inner)
        self.norm3 = nn.BatchNorm2d(outputs)
        quieten(self.norm3)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = F.relu(self.norm2(self.conv2(out)))
        return F.relu(self.norm3(self.conv3(out)) + self.shortcut(x))


class ResNet50(nn.Module):
    """The layout of ResNet-50 (He et al., arXiv 1512.03385), its channels scaled by `width`."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        stem, *inner = (nets.scaled(n, width) for n in (64, 64, 128, 256, 512))
        self.stem = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(stem)
        blocks, inputs = [], stem
        for stage, (channels, count) in enumerate(zip(inner, (3, 4, 6, 3), strict=True)):
            for block in range(count):
                stride = 2 if stage and not block else 1
                blocks.append(Bottleneck(inputs, channels, stride))
                inputs = 4 * channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward net, normed after each (Devlin et al., 1810.04805)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.attended = (
            nn.Linear(hidden, hidden) for _ in range(4)
        )
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.dropout(self.attended(mixed)))
        return self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))


class BertBase(nn.Module):
    """The encoder stack of BERT-base with a classifier: 12 layers, 12 heads, hidden size 768."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        heads = nets.scaled(12, width)
        hidden = 64 * heads
        self.embedding = nn.Embedding(30522, hidden)
        self.layers = nn.Sequential(*(EncoderLayer(hidden, heads) for _ in range(12)))
        self.head = nn.Linear(hidden, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens))[:, 0])


class Block(nn.Module):
    """Self-attention and a feed-forward net, normed before each (Radford et al., 2019)."""

    def __init__(self, hidden: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attend, self.attended = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.attend(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.attended(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt2(nn.Module):
    """A language model the size of GPT-2 small: 12 blocks, 12 heads, hidden size 768."""

    def __init__(self, width: float = 1.0, length: int = 512) -> None:
        super().__init__()
        heads = nets.scaled(12, width)
        hidden = 64 * heads
        self.embedding = nn.Embedding(50257, hidden)
        self.position = nn.Parameter(torch.zeros(length, hidden))
        self.blocks = nn.Sequential(*(Block(hidden, heads, causal=True) for _ in range(12)))
        self.norm = nn.LayerNorm(hidden)
        # One answer per sequence, so that its loss and its targets are those of the other models.
        self.head = nn.Linear(hidden, 50257, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)[:, -1]))


class VitB16(nn.Module):
    """The layout of ViT-B/16 (Dosovitskiy et al., arXiv 2010.11929): 12 blocks over 196 patches."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        heads = nets.scaled(12, width)
        hidden = 64 * heads
        self.patch = nn.Conv2d(3, hidden, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, hidden))
        self.position = nn.Parameter(torch.zeros(1, 197, hidden))
        self.blocks = nn.Sequential(*(Block(hidden, heads, causal=False) for _ in range(12)))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, 1000)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1) + self.position
        return self.head(self.norm(self.blocks(x)[:, 0]))


@dataclasses.dataclass(frozen=True)
class Model:
    """How to build a model at a width, and what its data look like.

    Attributes:
        build: from a width to a module with fresh weights.
        shape: of one input.
        classes: of the targets.
        loss: from outputs and targets.
        tokens: inputs are whole numbers below this, or floats if 0.
    """

    build: Callable[[float], nn.Module]
    shape: tuple[int, ...]
    classes: int
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    tokens: int = 0

    def batches(self, size: int, device: torch.device, seed: int) -> list[Batch]:
        """Return random batches to rotate over."""
        generator = torch.Generator().manual_seed(seed)
        each = 4 * size * math.prod(self.shape)
        count = min(max(math.ceil(_ROTATED_BYTES / each), 2), _MOST_BATCHES)

        def batch() -> Batch:
            if self.tokens:
                x = torch.randint(self.tokens, (size, *self.shape), generator=generator)
            else:
                x = torch.randn(size, *self.shape, generator=generator)
            y = torch.randint(self.classes, (size,), generator=generator)
            return x.to(device), y.to(device)

        return [batch() for _ in range(count)]


MODELS: dict[str, Model] = {
    "mnist": Model(MnistNet, (1, 28, 28), 10, F.nll_loss),
    "mlp": Model(Mlp, (784,), 10),
    "wide": Model(WideMlp, (4096,), 1000),
    "resnet18": Model(ResNet18, (3, 224, 224), 1000),
    "resnet50": Model(ResNet50, (3, 224, 224), 1000),
    "vit": Model(VitB16, (3, 224, 224), 1000),
    "bert": Model(BertBase, (128,), 2, tokens=30522),
    "gpt2": Model(Gpt2, (512,), 50257, tokens=50257),
}


def fresh(name: str, width: float, device: torch.device, seed: int) -> nn.Module:
    """Build a model with weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name].build(width).to(device)
