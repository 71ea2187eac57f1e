"""Digits to learn from: scikit-learn's 8x8 digits, and MNIST in its own idx format.

Every data set is three splits that never change with the run's seed: the interval over seeds then
speaks of training (initial weights, batch order), and of nothing else.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pbfx.demo.errors import DemoError

SPLIT_SEED = 20250123
"""Seed of every split: fixed, so that runs with different `--seed` have the same test images."""

MNIST_VALIDATION = 5_000
"""Images carved from MNIST's 60,000 training images to choose the epoch by."""

# The mean and deviation of MNIST's training pixels, as the PyTorch example has them.
_MNIST_MEAN, _MNIST_DEVIATION = 0.1307, 0.3081

_MNIST_STEMS = {
    "train images": ("train-images", "idx3-ubyte"),
    "train labels": ("train-labels", "idx1-ubyte"),
    "test images": ("t10k-images", "idx3-ubyte"),
    "test labels": ("t10k-labels", "idx1-ubyte"),
}

_IDX_UNSIGNED_BYTE = 0x08


@dataclass(frozen=True)
class Split:
    """Images `(n, 1, height, width)` float32, normalised, with their labels `(n,)` int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """Hold images and labels on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Digits:
    """A data set in three splits: learn from `train`, choose by `validation`, read `test` once."""

    name: str
    train: Split
    validation: Split
    test: Split

    def to(self, device: torch.device) -> Digits:
        """Hold all three splits on `device`; they are small, and loops then only index."""
        return Digits(
            self.name, self.train.to(device), self.validation.to(device), self.test.to(device)
        )


def load_digits() -> Digits:
    """Return scikit-learn's 1,797 digits of 8x8 pixels.

    Half of them train, a fifth validate, the rest test; each split has the digits in equal shares.
    They come inside scikit-learn, so nothing is fetched. Source: UCI "Optical Recognition of
    Handwritten Digits".
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = sklearn_digits(return_X_y=True)
    rows = np.arange(len(labels))
    train, rest = train_test_split(rows, train_size=0.5, stratify=labels, random_state=SPLIT_SEED)
    validation, test = train_test_split(
        rest, train_size=0.4, stratify=labels[rest], random_state=SPLIT_SEED
    )
    mean, deviation = pixels[train].mean(), pixels[train].std()

    def split(chosen: np.ndarray) -> Split:
        images = (pixels[chosen] - mean) / deviation
        return Split(
            torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8),
            torch.tensor(labels[chosen], dtype=torch.int64),
        )

    return Digits("digits", *(split(np.asarray(rows)) for rows in (train, validation, test)))


def load_mnist(directory: str | Path, *, validation: int = MNIST_VALIDATION) -> Digits:
    """Read MNIST's four idx files, gzipped or not, from `directory`.

    The training images are shuffled by a fixed seed, and the last `validation` of them validate.

    Args:
        directory: the folder that holds the files, or torchvision's root above `MNIST/raw`.
        validation: images taken from the training split to choose the epoch by.

    Raises:
        DemoError: files are missing (all of them are named), damaged, or do not belong together.
    """
    files = _find_mnist(Path(directory))
    arrays = {role: read_idx(path) for role, path in files.items()}
    for part in ("train", "test"):
        images, labels = arrays[f"{part} images"], arrays[f"{part} labels"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DemoError(
                f"{files[f'{part} images'].name} has shape {images.shape} and "
                f"{files[f'{part} labels'].name} has shape {labels.shape}: "
                "images must be (n, height, width) and labels (n,) with the same n."
            )
    count = len(arrays["train labels"])
    if not 0 < validation < count:
        raise DemoError(
            f"{files['train labels'].name} has {count} labels: too few to keep {validation} for "
            "validation. Is this the whole training file?"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED)).numpy()

    def split(part: str, chosen: np.ndarray | slice) -> Split:
        images = torch.from_numpy(arrays[f"{part} images"][chosen]).float().unsqueeze(1) / 255
        labels = torch.from_numpy(arrays[f"{part} labels"][chosen].astype(np.int64))
        return Split((images - _MNIST_MEAN) / _MNIST_DEVIATION, labels)

    return Digits(
        "mnist",
        split("train", order[:-validation]),
        split("train", order[-validation:]),
        split("test", slice(None)),
    )


def read_idx(path: str | Path) -> np.ndarray:
    """Read one idx file of unsigned bytes, gzipped if its name ends in `.gz`.

    Layout: two zero bytes, the type code, the number of dimensions, each dimension as a big-endian
    32-bit integer, then the values row by row. Source: https://yann.lecun.com/exdb/mnist.

    Raises:
        DemoError: the file cannot be read, or is not such a file, or is cut short.
    """
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DemoError(f"{path} could not be read: {error}.") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DemoError(f"{path} is not an idx file: it does not begin with two zero bytes.")
    code, dimensions = content[2], content[3]
    if code != _IDX_UNSIGNED_BYTE:
        raise DemoError(
            f"{path} holds values of type 0x{code:02x}; only 0x08, unsigned bytes, are read."
        )
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DemoError(f"{path} ends inside its header of {header} bytes: the file is cut short.")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise DemoError(
            f"{path} should hold {math.prod(shape)} values for its shape {shape}, and holds "
            f"{len(content) - header}: the file is damaged or cut short."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()


def _find_mnist(directory: Path) -> dict[str, Path]:
    if not directory.is_dir():
        raise DemoError(
            f"{directory} is not a folder: --data-dir names the folder with MNIST's idx files."
        )
    folders = (directory, directory / "MNIST" / "raw")
    found: dict[str, Path] = {}
    missing: list[str] = []
    for role, (stem, kind) in _MNIST_STEMS.items():
        names = [f"{stem}{dot}{kind}{gz}" for dot in "-." for gz in (".gz", "")]
        paths = [folder / name for folder in folders for name in names]
        existing = next((path for path in paths if path.is_file()), None)
        if existing is None:
            missing.append(f"{stem}-{kind}")
        else:
            found[role] = existing
    if missing:
        raise DemoError(
            f"{directory} lacks {len(missing)} of MNIST's four files: {', '.join(missing)}. "
            "Each may be as it is or gzipped (.gz), in this folder or in MNIST/raw below it."
        )
    return found
