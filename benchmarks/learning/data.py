"""The data sets of the studies, read from a folder, with a validation split carved from train.

Splits never change with a run's seed: an interval over seeds then speaks of training alone.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.errors import UsageError
from benchmarks.learning.problem import Problem, Split
from pbfx.demo.data import SPLIT_SEED, Digits, load_digits, load_mnist
from pbfx.demo.errors import DemoError

# Of Adult's rows: the last column is the label, these are numbers, the rest are categories.
_ADULT_NUMBERS = (0, 2, 4, 10, 11, 12)
_ADULT_COLUMNS = 15
_ADULT_VALIDATION = 6_000
# Capital gains and losses reach 99,999 and are zero for nine of ten: their logarithm is learnable.
_ADULT_LOGARITHMS = (10, 11)

CONTEXT = 64
"""Characters that the language model sees at a time."""
_SHAKESPEARE_SHARES = (0.8, 0.1)


def load(name: str, directory: Path | None) -> Problem:
    """Return the data set `name`, one of `DATA`, on the CPU.

    Args:
        name: its folder's name; `digits` needs no folder.
        directory: the folder above `mnist/`, `adult/` and `tiny_shakespeare/`.

    Raises:
        UsageError: if its files are missing or damaged.
    """
    loader, needs_folder = DATA[name]
    if needs_folder and directory is None:
        raise UsageError(
            f"the data set {name!r} needs --data-dir DIR (or PBFX_DATA_DIR), a folder that holds "
            f"{name}/"
        )
    try:
        return loader(Path() if directory is None else directory / name)
    except (DemoError, OSError) as error:
        raise UsageError(f"the data set {name!r}: {error}") from error


def _of_digits(digits: Digits) -> Problem:
    parts = (digits.train, digits.validation, digits.test)
    return Problem(digits.name, *(Split(part.images, part.labels) for part in parts))


def _adult(folder: Path) -> Problem:
    rows = [_adult_rows(folder / f"adult-{part}.csv") for part in ("train", "test")]
    known = [sorted({row[c] for row in rows[0]}) for c in range(_ADULT_COLUMNS - 1)]
    numbers = np.array([[float(row[c]) for c in _ADULT_NUMBERS] for row in rows[0]])
    order = torch.randperm(
        len(rows[0]), generator=torch.Generator().manual_seed(SPLIT_SEED)
    ).tolist()
    train = order[:-_ADULT_VALIDATION]
    usual = _adult_scaled(numbers)[train]
    mean, deviation = usual.mean(0), usual.std(0)

    def split(part: Sequence[Sequence[str]]) -> Split:
        read = np.array([[float(row[c]) for c in _ADULT_NUMBERS] for row in part])
        columns = [(_adult_scaled(read) - mean) / deviation]
        for c in range(_ADULT_COLUMNS - 1):
            if c not in _ADULT_NUMBERS:
                place = {value: i for i, value in enumerate(known[c])}
                hot = np.zeros((len(part), len(place)))
                for i, row in enumerate(part):
                    # A country that the training file lacks stays all zero.
                    if row[c] in place:
                        hot[i, place[row[c]]] = 1.0
                columns.append(hot)
        labels = [int(row[-1].rstrip(".") == ">50K") for row in part]
        return Split(
            torch.tensor(np.concatenate(columns, 1), dtype=torch.float32), torch.tensor(labels)
        )

    chosen = ([rows[0][i] for i in part] for part in (train, order[-_ADULT_VALIDATION:]))
    return Problem("adult", *(split(part) for part in (*chosen, rows[1])))


def _adult_rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    rows = [row for row in rows if len(row) == _ADULT_COLUMNS]
    if len(rows) <= 2 * _ADULT_VALIDATION:
        raise UsageError(f"{path} has {len(rows)} rows of {_ADULT_COLUMNS} cells: it is cut short")
    return rows


def _adult_scaled(numbers: np.ndarray) -> np.ndarray:
    logarithms = [_ADULT_NUMBERS.index(c) for c in _ADULT_LOGARITHMS]
    scaled = numbers.copy()
    scaled[:, logarithms] = np.log1p(scaled[:, logarithms])
    return scaled


def _shakespeare(folder: Path) -> Problem:
    text = (folder / "input.txt").read_text(encoding="utf-8")
    letters = sorted(set(text))
    place = {letter: i for i, letter in enumerate(letters)}
    codes = torch.tensor([place[letter] for letter in text])
    first, second = (int(len(codes) * share) for share in _SHAKESPEARE_SHARES)
    train, validation = codes[:first], codes[first : first + second]
    test = codes[first + second :]
    # Training windows start anywhere, those that judge do not overlap.
    return Problem(
        "tiny_shakespeare", _windows(train, 1), *(_windows(c, CONTEXT) for c in (validation, test))
    )


def _windows(codes: Tensor, stride: int) -> Split:
    views = codes.unfold(0, CONTEXT + 1, stride)
    return Split(views[:, :-1], views[:, 1:])


DATA: dict[str, tuple[Callable[[Path], Problem], bool]] = {
    "digits": (lambda _: _of_digits(load_digits()), False),
    "mnist": (lambda folder: _of_digits(load_mnist(folder)), True),
    "adult": (_adult, True),
    "tiny_shakespeare": (_shakespeare, True),
}
"""Loaders by name, and whether they read a folder."""
