"""The nets of the studies, each scaled by a width, and the width that gives a parameter count."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.learning.data import CONTEXT
from pbfx.demo.nets import DigitsNet, MnistNet, scaled
from pbfx.parts import parameter_count

# Of Adult's one-hot columns and numbers, and of Tiny Shakespeare's letters.
ADULT_INPUTS = 108
LETTERS = 65
_HEADS = 4

Net = Callable[[float], nn.Module]


class DeepMnistNet(nn.Module):
    """The example's net with one more convolution and one more hidden layer."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        first, second, hidden = scaled(32, width), scaled(64, width), scaled(128, width)
        self.conv1 = nn.Conv2d(1, first, 3)
        self.conv2 = nn.Conv2d(first, second, 3)
        self.conv3 = nn.Conv2d(second, second, 3, padding=1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(second * 12 * 12, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(n, 10)` for images `(n, 1, 28, 28)`."""
        x = F.relu(self.conv2(F.relu(self.conv1(images))))
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        x = F.relu(self.fc1(self.dropout1(x).flatten(1)))
        return self.fc3(self.dropout2(F.relu(self.fc2(x))))


class DeepDigitsNet(nn.Module):
    """The demo's net for 8x8 digits with one more convolution."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled(3, width)
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.fc = nn.Linear(channels * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(n, 10)` for images `(n, 1, 8, 8)`."""
        x = F.relu(self.conv2(F.relu(self.conv1(images))))
        return self.fc(F.max_pool2d(x, 4).flatten(1))


class AdultNet(nn.Module):
    """An MLP on Adult's one-hot columns and numbers: 64 and 32 hidden units at width 1."""

    def __init__(self, width: float = 1.0, *, deep: bool = False) -> None:
        super().__init__()
        first, second = scaled(64, width), scaled(32, width)
        self.fc1 = nn.Linear(ADULT_INPUTS, first)
        self.fc2 = nn.Linear(first, second)
        self.more = nn.Linear(second, second) if deep else None
        self.fc3 = nn.Linear(second, 2)

    def forward(self, columns: Tensor) -> Tensor:
        """Return logits `(n, 2)` for columns `(n, 108)`."""
        x = F.relu(self.fc2(F.relu(self.fc1(columns))))
        if self.more is not None:
            x = F.relu(self.more(x))
        return self.fc3(x)


class _Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attend = nn.Linear(size, 3 * size)
        self.project = nn.Linear(size, size)
        self.fc1 = nn.Linear(size, 4 * size)
        self.fc2 = nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attend(self.norm1(x)).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class CharNet(nn.Module):
    """A small GPT over characters: 64 channels and two blocks at width 1."""

    def __init__(self, width: float = 1.0, *, blocks: int = 2) -> None:
        super().__init__()
        size = _HEADS * max(1, round(16 * width))
        self.letters = nn.Embedding(LETTERS, size)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, size))
        self.blocks = nn.Sequential(*(_Block(size) for _ in range(blocks)))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, LETTERS)

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits `(n, 64, 65)` for codes `(n, 64)`."""
        return self.head(self.norm(self.blocks(self.letters(codes) + self.places)))


def without_dropout(net: Net) -> Net:
    """Return `net` with every dropout's probability zero."""

    def bare(width: float) -> nn.Module:
        built = net(width)
        for module in built.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return built

    return bare


NETS: dict[str, tuple[Net, Net]] = {
    "digits": (DigitsNet, DeepDigitsNet),
    "mnist": (MnistNet, DeepMnistNet),
    "bare": (without_dropout(MnistNet), without_dropout(DeepMnistNet)),
    "adult": (AdultNet, lambda width: AdultNet(width, deep=True)),
    "tiny_shakespeare": (CharNet, lambda width: CharNet(width, blocks=3)),
}
"""By data set, or by a study's own name for its nets: the net, and one that is deeper."""


def parameters_at(net: Net, width: float) -> int:
    """Return the parameters of `net(width)`; nothing is allocated or drawn."""
    with torch.device("meta"):
        return parameter_count(net(width))


def width_for(net: Net, parameters: int) -> float:
    """Return the width at which `net` comes nearest to `parameters`.

    A net has at least as many parameters as a narrower one, in steps: halving finds the step, and
    the nearer of its two sides is taken.
    """
    low, high = 0.0, 1.0
    while parameters_at(net, high) < parameters:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        if parameters_at(net, middle) < parameters:
            low = middle
        else:
            high = middle
    return min(low, high, key=lambda width: abs(parameters_at(net, width) - parameters))
