"""The digits' splits, and the reader of idx files with the errors that it owes."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pbfx import PbfxError
from pbfx.demo.data import load_digits, load_mnist, read_idx


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, *, train: int = 60, test: int = 20, suffix: str = ".gz") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        for name, array in (
            (f"{part}-images-idx3-ubyte", draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            (f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10),
        ):
            content = gzip.compress(idx(array), mtime=0) if suffix == ".gz" else idx(array)
            (folder / f"{name}{suffix}").write_bytes(content)


def test_digits_splits_are_disjoint_stratified_and_fixed():
    first, again = load_digits(), load_digits()
    splits = (first.train, first.validation, first.test)
    assert sum(map(len, splits)) == 1797
    for split, same in zip(splits, (again.train, again.validation, again.test), strict=True):
        assert split.images.shape == (len(split), 1, 8, 8)
        assert split.images.dtype == torch.float32
        assert split.labels.dtype == torch.int64
        assert torch.equal(split.images, same.images)
        shares = torch.bincount(split.labels, minlength=10) / len(split)
        assert shares.min() > 0.085
        assert shares.max() < 0.115
    assert abs(float(first.train.images.mean())) < 1e-5
    assert abs(float(first.train.images.std()) - 1) < 1e-3
    rows = torch.cat([split.images.flatten(1) for split in splits])
    assert len(torch.unique(rows, dim=0)) == len(rows)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_round_trip(tmp_path: Path, suffix: str):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / f"values{suffix}"
    path.write_bytes(gzip.compress(idx(array), mtime=0) if suffix else idx(array))
    np.testing.assert_array_equal(read_idx(path), array)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a", b"hello world", "two zero bytes"),
        ("a", b"", "two zero bytes"),
        ("a", idx(np.zeros(4, np.uint8))[:-1], "cut short"),
        ("a", idx(np.zeros(4, np.uint8)) + b"x", "damaged"),
        ("a", idx(np.zeros(4, np.uint8))[:6], "header"),
        ("a", b"\0\0\x0d\x01" + bytes(4), "0x0d"),
        ("a.gz", b"not gzip", "could not be read"),
        ("a.gz", gzip.compress(idx(np.zeros(99, np.uint8)), mtime=0)[:-9], "could not be read"),
    ],
)
def test_idx_refuses_what_it_cannot_read(tmp_path: Path, name: str, content: bytes, says: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PbfxError, match=says) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("below", [".", "MNIST/raw"])
def test_mnist_is_found_split_and_normalised(tmp_path: Path, suffix: str, below: str):
    write_mnist(tmp_path / below, suffix=suffix)
    data, again = (load_mnist(tmp_path, validation=10) for _ in range(2))
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 10, 20)
    assert data.test.images.shape == (20, 1, 28, 28)
    assert torch.equal(data.validation.labels, again.validation.labels)
    labels = torch.cat([data.train.labels, data.validation.labels])
    assert torch.equal(torch.bincount(labels), torch.full((10,), 6))
    # A pixel p becomes (p / 255 - mean) / deviation, as in the PyTorch example.
    raw = read_idx(next((tmp_path / below).glob("t10k-images*")))
    expected = (torch.from_numpy(raw).double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(data.test.images.squeeze(1).double(), expected, rtol=0, atol=1e-5)


def test_mnist_names_every_missing_file(tmp_path: Path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(PbfxError, match="lacks 2 of MNIST's four files") as caught:
        load_mnist(tmp_path, validation=10)
    assert "train-labels-idx1-ubyte, t10k-images-idx3-ubyte" in str(caught.value)


def test_mnist_refuses_files_that_do_not_belong_together(tmp_path: Path):
    write_mnist(tmp_path)
    labels = gzip.compress(idx(np.zeros(7, np.uint8)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(labels)
    with pytest.raises(PbfxError, match="same n"):
        load_mnist(tmp_path, validation=10)


def test_mnist_refuses_a_folder_that_is_none_and_too_few_images(tmp_path: Path):
    with pytest.raises(PbfxError, match="not a folder"):
        load_mnist(tmp_path / "nowhere")
    write_mnist(tmp_path)
    with pytest.raises(PbfxError, match="too few to keep 5000"):
        load_mnist(tmp_path)
