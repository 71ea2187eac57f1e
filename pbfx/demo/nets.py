"""The nets that the demo trains: small on purpose, because dendrites pay where a net underfits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DigitsNet(nn.Module):
    """One convolution and one linear layer for 8x8 digits: 160 parameters at width 1.

    At width 1 it cannot fit even its training images (a tenth of them stay wrong), which leaves an
    error for dendrites to learn from.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled(3, width)
        self.conv = nn.Conv2d(1, channels, 3, padding=1)
        self.fc = nn.Linear(channels * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(n, 10)` for images `(n, 1, 8, 8)`."""
        return self.fc(F.max_pool2d(F.relu(self.conv(images)), 4).flatten(1))


class MnistNet(nn.Module):
    """The net of the PyTorch MNIST example: 1,199,882 parameters at width 1."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        first, second, hidden = scaled(32, width), scaled(64, width), scaled(128, width)
        self.conv1 = nn.Conv2d(1, first, 3)
        self.conv2 = nn.Conv2d(first, second, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(second * 12 * 12, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(n, 10)` for images `(n, 1, 28, 28)`."""
        x = F.relu(self.conv1(images))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = self.dropout1(x).flatten(1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return self.fc2(x)


def scaled(channels: int, width: float) -> int:
    """Return `channels` scaled by `width`, rounded down as published comparisons do, at least 1."""
    return max(1, int(channels * width))
