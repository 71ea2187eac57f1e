"""Let GPU tests use the sites and the oracle of `tests/kernels`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
