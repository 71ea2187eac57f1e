"""Let GPU tests use the sites and the oracle of `tests/kernels`, and fix the seed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
