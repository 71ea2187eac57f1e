"""What stands in for `torchvision.datasets.MNIST`, so that the examples here need no download.

Handwritten digits of 28x28: MNIST's own, where its four idx files lie in `root`, else those of
scikit-learn, enlarged from 8x8. Either is cut to a few dozen images, enough to see a run through.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pbfx.demo.data import read_idx

COUNTS = {True: 64, False: 64}
MEAN, DEVIATION = 0.1307, 0.3081


class MNIST(Dataset):
    """A few dozen digits, normalised as the PyTorch example does it."""

    def __init__(self, root: str, train: bool = True) -> None:
        images, labels = _mnist(Path(root), train) or _digits(train)
        count = COUNTS[train]
        self.images = ((torch.tensor(images[:count]).float() - MEAN) / DEVIATION).unsqueeze(1)
        self.labels = torch.tensor(labels[:count].astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


def _mnist(root: Path, train: bool) -> tuple[np.ndarray, np.ndarray] | None:
    part = "train" if train else "t10k"
    names = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
    found = [path for name in names for path in root.glob(f"{name}*")]
    if len(found) != len(names):
        return None
    images, labels = map(read_idx, found)
    return images / 255, labels


def _digits(train: bool) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = slice(0, 1000) if train else slice(1000, None)
    large = digits.images[rows].repeat(3, axis=1).repeat(3, axis=2) / 16
    return np.pad(large, ((0, 0), (2, 2), (2, 2))), digits.target[rows]
